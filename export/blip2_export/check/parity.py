"""Bundles in the engine against their checkpoints in `transformers`: the same pictures and prompts must give the same tokens."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.bundle import Choices, convert
from blip2_export.check import parity_stage1, random_shapes
from blip2_export.check.comparison import Comparison
from blip2_export.engine import run_engine
from blip2_export.reference.generation import Found, Reference
from blip2_export.scenes import drawing

PROMPTS = ("", "Question: what colour is the star? Answer:", "a photo of")
QUESTIONS = ("what colour is the star?", "how many dogs play near the blue ring on the beach?", "where?")
_TIE = 1e-5  # scores nearer than this may change places with the order in which a sum is added up
_OPTIONS = {  # of `generate()`, and the engine's words for the same
    "num_beams": "--beams",
    "length_penalty": "--length-penalty",
    "early_stopping": "--early-stopping",
    "repetition_penalty": "--repetition-penalty",
    "no_repeat_ngram_size": "--no-repeat-ngram",
    "min_new_tokens": "--min-new-tokens",
    "suppress_tokens": "--suppress-tokens",
    "begin_suppress_tokens": "--begin-suppress-tokens",
    "forced_bos_token_id": "--forced-bos-token",
    "forced_eos_token_id": "--forced-eos-tokens",
    "bad_word": "--bad-word",  # the reference is told its spellings
}
Search = dict[str, Any]
GREEDY: Search = {"num_beams": 1}
BEAMS: Search = {"num_beams": 3, "early_stopping": True}
FEW: tuple[Search, ...] = (
    GREEDY,
    {"num_beams": 2, "length_penalty": 0.0},
    BEAMS,
    {"num_beams": 5, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 1, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
)


@dataclass(frozen=True)
class Plan:
    """How much is compared. `every`: all searches and what changes scores, where otherwise `FEW` are."""

    n_pictures: int
    max_new_tokens: int
    every: bool = False


def compare(checkpoint: Path, bundle: Path, engine: Path, plan: Plan) -> Comparison:
    """Tokens and texts of drawn scenes: greedy behind every prompt, other searches behind one; and some questions."""
    facts = json.loads((bundle / "bundle.json").read_text())
    with drawn_pictures(plan.n_pictures) as (pictures, paths):
        if facts["family"] == "qformer":
            shown = list(zip(pictures, paths, strict=True))
            return parity_stage1.compare(checkpoint, bundle, engine, shown, plan.max_new_tokens)
        reference = Reference(checkpoint, facts)
        pixels = np.stack([reference.prepare(picture) for picture in pictures])
        both = _Both(reference, bundle, engine, plan.max_new_tokens, pixels, paths)
        for prompt in PROMPTS:
            greedy = both.captions(prompt, GREEDY)
        searches = list(every_search(both.reference, greedy)) if plan.every else FEW[1:]
        for k, search in enumerate(searches):
            both.captions(PROMPTS[k % len(PROMPTS)], search)
        for k, search in enumerate((GREEDY, BEAMS)):
            both.answers(k % len(paths), search)
        return both.found


def every_search(reference: Reference, greedy: list[list[int]]) -> Iterator[Search]:
    """Beams with every penalty and end; what changes scores, alone and under beams.

    `greedy`: tokens that come by themselves, so that it matters when they are forbidden.
    """
    for n, penalty, early in itertools.product((2, 3, 5), (0.0, 1.0, -1.0, 2.0), (True, False, "never")):
        yield {"num_beams": n, "length_penalty": penalty, "early_stopping": early}
    ends = reference.facts["language"]["token_ids"]["eos"]
    usual = [t for t, _ in Counter(t for row in greedy for t in row if t not in ends).most_common(8)]
    words = [word for word in (reference.text([token]) for token in usual) if word.isalnum() and word.isascii()]
    changes: list[Search] = [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
        {"begin_suppress_tokens": sorted({row[0] for row in greedy})},
        {"forced_eos_token_id": ends},
        *({"suppress_tokens": usual[:n]} for n in (1, 3) if usual),
        *({"forced_bos_token_id": token} for token in usual[1:2]),
        *({"bad_word": word} for word in words[:2]),
    ]
    for change in changes:
        yield {"num_beams": 1, **change}
        yield {"num_beams": 3, "length_penalty": 0.0, **change}


@dataclass
class _Both:
    """The engine and the reference with the same pictures, and what they agreed on so far."""

    reference: Reference
    bundle: Path
    engine: Path
    max_new_tokens: int
    pixels: np.ndarray
    paths: list[Path]
    found: Comparison = field(default_factory=Comparison)

    def captions(self, prompt: str, search: Search) -> list[list[int]]:
        """Every picture behind one prompt; gives the reference's tokens."""
        rows = self._run("caption", "--prompt", prompt, *words(search), *map(str, self.paths))
        wanted = self._search(self.pixels, prompt, "", search)
        for i, (row, (found, at)) in enumerate(zip(rows, wanted, strict=True)):
            typed = ("caption", "--prompt", prompt, str(self.paths[i]))
            one = _Case(typed, self.pixels[i : i + 1], prompt, "", search)
            self._note(row, found, at, one, f"{search} picture {i} {prompt!r}")
        return [found.tokens[at] for found, at in wanted]

    def answers(self, i: int, search: Search) -> None:
        """One picture and several questions, which the engine answers in one batch."""
        rows = self._run("ask", *words(search), str(self.paths[i]), *QUESTIONS)
        for question, row in zip(QUESTIONS, rows, strict=True):
            prompt = self.reference.facts["prompts"]["ask"].format(question)
            pixels = self.pixels[i : i + 1]
            [(found, at)] = self._search(pixels, prompt, question, search)
            one = _Case(("ask", str(self.paths[i]), question), pixels, prompt, question, search)
            self._note(row, found, at, one, f"{search} picture {i} {question!r}")

    def _run(self, command: str, *more: str) -> list[dict[str, Any]]:
        options = ("--json", "--model", str(self.bundle), "--max-new-tokens", str(self.max_new_tokens))
        return run_engine(self.engine, command, *options, *more)

    def _search(self, pixels: np.ndarray, prompt: str, question: str, search: Search) -> list[tuple[Found, int]]:
        """What the reference found, and each picture's row in it."""
        told = {key: value for key, value in search.items() if key != "bad_word"}
        if "bad_word" in search:
            told["bad_words_ids"] = self.reference.spellings(search["bad_word"])
        batches = [p[None] for p in pixels] if self.reference.mixes_pictures else [pixels]
        generate = self.reference.search
        found = [generate(b, prompt, self.max_new_tokens, question, output_scores=True, **told) for b in batches]
        return [(one, row) for one in found for row in range(len(one.tokens))]

    def _note(self, row: dict[str, Any], wanted: Found, i: int, case: _Case, what: str) -> None:
        tokens = wanted.tokens[i]
        self.found.cases += 1
        self.found.written.add(tuple(tokens))
        if (row["tokens"], row["text"]) != (tokens, self.reference.text(tokens)):
            tied = _is_tie(row, wanted, i, case.search) or self._parts_at_a_tie(case)
            kind = self.found.ties if tied else self.found.differences
            kind.append(f"{what}: {row['tokens']}, reference {tokens}")

    def _parts_at_a_tie(self, case: _Case) -> bool:
        """Whether scores leave open which beams to keep, at the first length where engine and reference keep others.

        What is kept there leads to quite other texts in the end.
        """
        search, n_beams = case.search, case.search.get("num_beams", 1)
        if n_beams == 1:
            return False
        every = {**search, "num_return_sequences": n_beams}
        for n in range(search.get("min_new_tokens", 1), self.max_new_tokens + 1):
            so_far = replace(self, max_new_tokens=n)
            [row] = so_far._run(*case.typed, *words(search), "--num-return", str(n_beams))
            kept = [(c["tokens"], c["score"]) for c in row["candidates"]]
            wanted = so_far._search(case.pixels, case.prompt, case.question, every)[0][0]
            if sorted(tokens for tokens, _ in kept) != sorted(wanted.tokens):
                finals = map(float, wanted.given.sequences_scores)
                ranks = zip(kept, wanted.tokens, finals, strict=True)
                return all(_near(a, b, max(len(one), len(other)), search) for (one, a), other, b in ranks)
        return False


@dataclass(frozen=True)
class _Case:
    """One text: what is typed for it, but for the options of the search, and what the reference gets."""

    typed: tuple[str, ...]
    pixels: np.ndarray
    prompt: str
    question: str
    search: Search


def words(search: Search) -> list[str]:
    """A search on the engine's command line. A bundle has defaults of its own, so the reference's are spelled out."""
    out = []
    usual = {"length_penalty": 1.0} if search.get("num_beams", 1) > 1 else {}
    for option, value in (usual | search).items():
        written = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        out += [_OPTIONS[option], written.lower() if option == "early_stopping" else written]
    return out


def _near(score: float, other: float, length: int, search: Search) -> bool:
    """Whether the sums of log-probabilities behind two scores of beams tie. A score is a sum / length ^ penalty."""
    return abs(score - other) * length ** search.get("length_penalty", 1.0) < _TIE


def _is_tie(row: dict[str, Any], wanted: Found, i: int, search: Search) -> bool:
    """Whether the reference's own scores leave open which text is the better one, or which token where the two part."""
    finals = getattr(wanted.given, "sequences_scores", None)
    if finals is not None:
        return _near(row["score"], float(finals[i]), max(len(row["tokens"]), len(wanted.tokens[i])), search)
    same = zip(row["tokens"], wanted.tokens[i], strict=False)
    parting = next((at for at, (a, b) in enumerate(same) if a != b), None)
    if parting is None:
        return False
    best = wanted.given.scores[parting][i].topk(2).values
    return float(best[0] - best[1]) < _TIE


@contextmanager
def drawn_pictures(n: int) -> Iterator[tuple[list[Any], list[Path]]]:
    pictures = drawing.sample_pictures(n, seed=5, side=150)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.png" for i in range(n)]
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
        yield pictures, paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?", help="what the bundle was converted from")
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--engine", type=Path, default=Path("target/release/blip2"), help="default: %(default)s")
    parser.add_argument("--pictures", type=int, help="drawn pictures (default: 70, with --all 4 a checkpoint)")
    parser.add_argument("--max-new-tokens", type=int, default=20, help="default: %(default)s")
    every = parser.add_argument_group("random checkpoints of every family instead of one bundle")
    every.add_argument(
        "--all", action="store_true", help="draw checkpoints, convert them, and run every search on each"
    )
    every.add_argument(
        "--generations", type=int, default=0, metavar="N", help="go on until this many texts are compared"
    )
    every.add_argument("--checkpoints", type=int, default=48, metavar="N", help="at least (default %(default)s)")
    every.add_argument("--seed", type=int, default=0, help="another seed draws other checkpoints (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints what differs, then one line of counts; with `--all` one line a checkpoint before."""
    if not args.all and (args.checkpoint is None or args.bundle is None):
        raise SystemExit("parity compares a checkpoint with its bundle: name both, or say --all")
    if args.all:
        found = _sweep(args)
    else:
        found = compare(args.checkpoint, args.bundle, args.engine, Plan(args.pictures or 70, args.max_new_tokens))
        _print(found)
    print(json.dumps(found.summary()))
    return int(bool(found.differences))


def _sweep(args: argparse.Namespace) -> Comparison:
    rng, total = random.Random(args.seed), Comparison()
    plan = Plan(args.pictures or 4, args.max_new_tokens, every=True)
    for i in itertools.count():
        if i >= args.checkpoints and total.cases >= args.generations:
            return total
        drawn = random_shapes.draw(rng, i)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
            drawn.write(checkpoint, seed=rng.randrange(1 << 30))
            convert(checkpoint, bundle, Choices(drawn.family, golden=False))
            found = compare(checkpoint, bundle, args.engine, plan)
        _print(found)
        print(json.dumps({"checkpoint": i, "family": drawn.family, **found.summary()}), flush=True)
        total.add(found)
    raise AssertionError("the count of checkpoints ends the loop")


def _print(found: Comparison) -> None:
    for line in found.ties:
        print(f"tie: {line}")
    for line in found.differences:
        print(f"different: {line}")
