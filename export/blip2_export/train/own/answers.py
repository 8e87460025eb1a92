"""How true an answer is, as VQAv2's evaluation counts it (Antol et al. 2015): what three people say is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ENOUGH = 3
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(n) for n, word in enumerate(_NUMBERS)}}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# Contractions that are known with an apostrophe missing, by what they end in; not those that are other words then: `well`, `its`.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
    "": "ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at",
}
_WHOLE = [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()]
_CONTRACTIONS = {
    # The evaluation's own slip.
    "somebody'd": "somebodyd",
    **{whole[:i] + whole[i + 1 :]: whole for whole in _WHOLE for i, mark in enumerate(whole) if mark == "'"},
}


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
    """As the evaluation's `processPunctuation` and `processDigitArticle` make it.

    Marks become spaces, or nothing where one of them stands beside a space or a comma between digits; apostrophes and colons stay,
    and so do periods before a digit. Then lower case, numbers as digits, no articles, contractions with all their apostrophes.

    The evaluation spares answers of people where all ten say the same; here both sides are always treated alike, so that "the car"
    of ten people is not missed. A typographic apostrophe is one.
    """
    text = " ".join(text.replace("’", "'").split())
    has_comma, made = _COMMA.search(text) is not None, text
    for mark in _MARKS:
        goes = has_comma or f"{mark} " in text or f" {mark}" in text
        made = made.replace(mark, "" if goes else " ")
    found = (_DIGITS.get(word, word) for word in _PERIOD.sub("", made).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in found if word not in _ARTICLES)
