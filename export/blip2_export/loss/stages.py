"""The stages of a bundle over many pictures, a graph at a time. What reads texts behind a picture is told what it has read."""

from __future__ import annotations

import numpy as np

from blip2_export.loss.inputs import Inputs
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.run.sessions import Bundle, alone

_AT_ONCE = 16  # texts that are written side by side
Arrays = list[np.ndarray]
Seen = list[dict[str, np.ndarray]]  # outputs of each picture, or of each question about one
SEEN = {"queries": "queries", "query_states": "queries", "image_embeds": "image_embeds"}  # which stages outputs are
COMPARED = {"itm_logits": "itm_logits", "multimodal_states": "multimodal_states"}


def features(bundle: Bundle, given: Inputs) -> Arrays:
    """[positions, hidden] of every picture."""
    return [bundle.features(pixels[None])[0] for pixels in given.pixels]


class Language:
    """Behind the image encoder of a bundle with a language model."""

    def __init__(self, bundle: Graphs, given: Inputs) -> None:
        self.bundle, self.given = bundle, given

    def seen(self, features: Arrays) -> Seen:
        """`queries` of whatever is asked."""
        found = []
        for asked in self.given.asked:
            question = None if asked.question is None else [asked.question]
            found.append({"queries": self.bundle.queries(features[asked.picture][None], question)[0]})
        return found

    def write(self, seen: Seen) -> list[list[int]]:
        """Greedy tokens behind whatever is asked, up to and with the end token."""
        pairs, written = list(zip(self.given.asked, seen, strict=True)), []
        for start in range(0, len(pairs), _AT_ONCE):
            rows = pairs[start : start + _AT_ONCE]
            queries, prompts = np.stack([s["queries"] for _, s in rows]), [asked.prompt for asked, _ in rows]
            _, tokens = self.bundle.greedy(queries, prompts, max(asked.n_new for asked, _ in rows))
            written += [row[: asked.n_new] for row, (asked, _) in zip(tokens, rows, strict=True)]
        return written

    def logits(self, seen: Seen, texts: list[list[int]]) -> Arrays:
        """[tokens, vocab] at every place of a text behind whatever is asked."""
        rows = zip(self.given.asked, seen, texts, strict=True)
        return [self.bundle.forced(s["queries"], asked.prompt, text) for asked, s, text in rows]


class Retrieval:
    """Behind the image encoder of a stage-1 bundle."""

    def __init__(self, bundle: Stage1Graphs, given: Inputs) -> None:
        self.bundle, self.given = bundle, given

    def seen(self, features: Arrays) -> Seen:
        """What `qformer` gives of every picture."""
        found = [self.bundle.run("qformer", image_features=one[None]) for one in features]
        return [{name: value[0] for name, value in one.items()} for one in found]

    def read(self) -> Arrays:
        """[joint] of every text."""
        return [self.bundle.run("qformer_text", **alone(ids))["text_embeds"][0, 0] for ids in self.given.texts]

    def compared(self, features: Arrays) -> Seen:
        """`itm_logits` and `multimodal_states` of every picture with its text, and with the next one's."""
        found = []
        for i, one in enumerate(features):
            for ids in (self.given.texts[i], self.given.texts[(i + 1) % len(self.given.texts)]):
                both = self.bundle.run("qformer_itm", image_features=one[None], **alone(ids))
                found.append({name: value[0] for name, value in both.items()})
        return found

    def write(self, seen: Seen) -> list[list[int]]:
        """Greedy captions, up to and with the end token."""
        written = []
        for asked, one in zip(self.given.asked, seen, strict=True):
            written.append(self.bundle.written({name: value[None] for name, value in one.items()}, asked.n_new))
        return written

    def logits(self, seen: Seen, texts: list[list[int]]) -> Arrays:
        """[tokens, vocab] at every place of each picture's text."""
        pairs = zip(seen, texts, strict=True)
        return [self.bundle.forced({name: value[None] for name, value in one.items()}, text) for one, text in pairs]


def behind(bundle: Graphs | Stage1Graphs, given: Inputs) -> Language | Retrieval:
    """What stands behind the image encoder."""
    return Retrieval(bundle, given) if isinstance(bundle, Stage1Graphs) else Language(bundle, given)
