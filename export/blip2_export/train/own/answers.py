"""How true an answer is, as VQAv2's evaluation counts it (Antol et al. 2015): what three people say is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ENOUGH = 3
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(n) for n, word in enumerate(_NUMBERS)}}


def accuracy(answer: str, given: Sequence[str]) -> float:
    """From 0 to 1: min(1, others who say it / 3), averaged over leaving out each of those who were asked.

    Where fewer than four were asked, all of the others have to say it; where there was one, it has to be what that one says.
    """
    n = len(given)
    said = sum(plain(one) == plain(answer) for one in given)
    if n == 1:
        return float(said)
    enough = min(_ENOUGH, n - 1)
    return (said * min(1.0, (said - 1) / enough) + (n - said) * min(1.0, said / enough)) / n


def plain(text: str) -> str:
    """Lower case without articles, numbers as digits, punctuation only within numbers.

    The evaluation does so to answers; here both sides are treated alike, so that "the car" of ten people is not missed. Apostrophes
    are dropped, where it has a table of contractions.
    """
    text = re.sub(r"['’`]", "", text.lower())
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(?<!\d)[.](?!\d)|[.](?!\d)|(?<!\d)[:](?!\d)|[^\w\s.:]|_", " ", text)
    return " ".join(_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)
