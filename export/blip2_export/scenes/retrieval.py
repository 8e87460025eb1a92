"""How well a stage-1 bundle tells true texts from false ones (ITM), and finds pictures by text (ITC, re-ranked by ITM).

Pictures are found as LAVIS finds them (`compute_sim_matrix` in `lavis/models/blip2_models/blip2.py`): by the cosine of
ITC, the largest over the queries; then the first `TOP` are put in order by ITM score + cosine. The ITM score is the logit
of class 1.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from blip2_export.scenes import drawing
from blip2_export.scenes.held_out import HeldOut

TOP = 16
Matches = list[dict[str, dict[str, float]]]  # of each picture: the engine's row about each text it was asked about


@dataclass(frozen=True)
class Group:
    """Pictures from `first` on, and as many texts that look for one of them."""

    first: int
    cosines: np.ndarray  # [texts, pictures]
    true: np.ndarray  # [texts, pictures]

    def shortlists(self) -> np.ndarray:
        """The pictures most similar to each text, [texts, at most TOP]."""
        return np.argsort(-self.cosines, axis=1, kind="stable")[:, :TOP]


def figures(held: HeldOut, tasks: Collection[str], group: int) -> dict[str, float]:
    """`match` gives the figures of ITM, `embed` that of ITC, both together that of re-ranking.

    Texts look for pictures among `group` scenes; scenes that fill no group are left out there.
    """
    captions = [drawing.caption(scene, held.rng) for scene in held.scenes]
    edits = [drawing.one_word_edit(c, s, held.rng) for c, s in zip(captions, held.scenes, strict=True)]
    groups = _groups(held, captions, group) if "embed" in tasks else []
    found: dict[str, float] = {}
    if "match" in tasks:
        matches = _match(held, captions, edits, groups)
        found |= _edits(held, captions, edits, matches)
    if groups:
        found["itc_recall_at_1"] = _recall(held, captions, [(g, g.cosines) for g in groups], "itc")
    if groups and "match" in tasks:
        reranked = [(g, _reranked(g, captions, matches)) for g in groups]
        found["itm_recall_at_1"] = _recall(held, captions, reranked, "itm")
    return found


def _groups(held: HeldOut, captions: list[str], size: int) -> list[Group]:
    n_used = len(captions) // size * size
    if not n_used:
        return []
    pictures = held.engine.vectors("image", *held.pictures[:n_used])
    texts = held.engine.vectors("text", *captions[:n_used])
    groups = []
    for first in range(0, n_used, size):
        part = slice(first, first + size)
        cosines = np.einsum("td,pqd->tpq", texts[part], pictures[part]).max(2)
        true = [[drawing.is_true(text, scene) for scene in held.scenes[part]] for text in captions[part]]
        groups.append(Group(first, cosines, np.array(true)))
    return groups


def _match(held: HeldOut, captions: list[str], edits: list[str | None], groups: list[Group]) -> Matches:
    """Each picture is asked once, about its own caption, the edited one and those that it is shortlisted for."""
    asked = [[text for text in pair if text] for pair in zip(captions, edits, strict=True)]
    for group in groups:
        for text, pictures in enumerate(group.shortlists()):
            for picture in pictures:
                asked[group.first + picture].append(captions[group.first + text])
    found = held.each("match", "text", [list(dict.fromkeys(texts)) for texts in asked])
    return [{row["text"]: row for row in rows} for rows in found]


def _edits(held: HeldOut, captions: list[str], edits: list[str | None], matches: Matches) -> dict[str, float]:
    n, n_told, n_right = 0, 0, 0
    for scene, caption, edit, of in zip(held.scenes, captions, edits, matches, strict=True):
        if edit is None:
            continue
        true, false = of[caption]["itm_probability"], of[edit]["itm_probability"]
        told, right = true > false, (true >= 0.5) + (false < 0.5)
        n, n_told, n_right = n + 1, n_told + told, n_right + right
        if not told or right < 2:
            held.missed(scene, true=caption, true_itm=true, false=edit, false_itm=false)
    shares = {"itm_edit_told": round(n_told / n, 4), "itm_edit_right": round(n_right / n / 2, 4)} if n else {}
    return {"edits": n, **shares}


def _reranked(group: Group, captions: list[str], matches: Matches) -> np.ndarray:
    """Scores [texts, pictures], -inf where a picture is not on the text's shortlist."""
    scores = np.full_like(group.cosines, -np.inf)
    for text, pictures in enumerate(group.shortlists()):
        itm = [matches[group.first + picture][captions[group.first + text]]["itm_logit"] for picture in pictures]
        scores[text, pictures] = np.array(itm) + group.cosines[text, pictures]
    return scores


def _recall(held: HeldOut, captions: list[str], scored: list[tuple[Group, np.ndarray]], by: str) -> float:
    """The share of texts that are true of the picture with the highest score."""
    hits = []
    for group, scores in scored:
        for text, picture in enumerate(scores.argmax(1)):
            hits.append(bool(group.true[text, picture]))
            if not hits[-1]:
                scene, chosen = held.scenes[group.first + text], held.scenes[group.first + picture]
                held.missed(scene, looked_for=captions[group.first + text], found=drawing.describe(chosen), by=by)
    return round(sum(hits) / len(hits), 4)
