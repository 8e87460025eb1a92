"""How captions are scored in papers: BLEU-4 and CIDEr-D against what several people say of each picture.

Words are not those of COCO's Java program (the tokenizer of the Penn Treebank, then without punctuation). As there, case and
punctuation are dropped, and `n't`, `'s` and their like are words of their own. Unlike there, symbols such as `$` are dropped as
well, abbreviations lose their last dot, and `cannot` or `gonna` stay one word; figures of such captions differ a little.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # of CIDEr-D, in words
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_WORD = re.compile(r"(?<![^\s])(?:n't|'(?:s|re|ve|ll|d|m))(?!\w)|\w+(?:[-.,']\w+)*")

Ngram = tuple[str, ...]
Counts = Counter[Ngram]


@dataclass(frozen=True)
class Caption:
    """What is written of a picture, and what people say of it."""

    written: str
    given: Sequence[str]


def words(text: str) -> list[str]:
    """Those that count."""
    return _WORD.findall(_CLITIC.sub(r" \1", text.lower().replace("’", "'").replace("_", " ")))


def scores(captions: Sequence[Caption]) -> dict[str, float]:
    """Both, of all pictures together: BLEU-4 from 0 to 1, CIDEr-D from 0 to 10, where papers tell 100 times either."""
    split = [(words(one.written), [words(text) for text in one.given]) for one in captions]
    return {"bleu4": _bleu(split), "cider": _cider(split)}


def _bleu(captions: Sequence[tuple[list[str], list[list[str]]]]) -> float:
    """Papineni et al. 2002, section 2.3: counts of the whole corpus, each picture's closest reference length, nothing smoothed."""
    right, all_, written_length, given_length = [0] * _LONGEST, [0] * _LONGEST, 0, 0
    for written, given in captions:
        written_length += len(written)
        given_length += min((abs(len(one) - len(written)), len(one)) for one in given)[1]
        for n in range(_LONGEST):
            most = Counts()
            for one in given:
                most |= _ngrams(one, n + 1)
            found = _ngrams(written, n + 1)
            right[n] += (found & most).total()
            all_[n] += found.total()
    if not all(right):
        return 0.0
    precision = sum(math.log(r / a) for r, a in zip(right, all_, strict=True)) / _LONGEST
    return math.exp(precision + min(0.0, 1 - given_length / written_length))


def _cider(captions: Sequence[tuple[list[str], list[list[str]]]]) -> float:
    """Vedantam et al. 2015, section 3 and, for -D, 6.2: n-grams weigh by how few of these pictures they are said of.

    Counts are not divided by a text's length, as COCO's evaluation has it: what is clipped depends on that. Of one picture alone
    nothing weighs anything.
    """
    known = Counts()
    for _, given in captions:
        known.update({ngram for one in given for n in range(_LONGEST) for ngram in _ngrams(one, n + 1)})
    log = math.log(len(captions))
    total = 0.0
    for written, given in captions:
        for one in given:
            near = math.exp(-((len(written) - len(one)) ** 2) / (2 * _SIGMA**2))
            alike = sum(
                _cosine(*(_weighed(text, n + 1, known, log) for text in (written, one))) for n in range(_LONGEST)
            )
            total += 10 * near * alike / _LONGEST / len(given)
    return total / len(captions)


def _weighed(text: list[str], n: int, known: Counts, log: float) -> dict[Ngram, float]:
    return {ngram: count * (log - math.log(max(1, known[ngram]))) for ngram, count in _ngrams(text, n).items()}


def _cosine(written: dict[Ngram, float], given: dict[Ngram, float]) -> float:
    """Where saying something more often than the other does not help."""
    lengths = math.prod(math.sqrt(sum(value**2 for value in side.values())) for side in (written, given))
    both = sum(min(value, given[ngram]) * given[ngram] for ngram, value in written.items() if ngram in given)
    return both / lengths if lengths else 0.0


def _ngrams(text: list[str], n: int) -> Counts:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
