"""BLEU-4 and CIDEr-D against other ways to reckon them, and answers as VQAv2's evaluation compares them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from blip2_export.train.own import measures, watch
from blip2_export.train.own.answers import plain
from blip2_export.train.own.records import Record
from blip2_export.train.own.scores import Caption, scores, words
from blip2_export.train.own.sources import DataError, File


def grams(text: list[str], n: int) -> list[str]:
    return [" ".join(text[i : i + n]) for i in range(len(text)) if i + n <= len(text)]


def other_bleu(captions: list[Caption]) -> float:
    """A product of ratios; every n-gram is found by going through all places."""
    product = 1.0
    for n in range(1, 5):
        right = total = 0
        for one in captions:
            said = grams(words(one.written), n)
            given = [grams(words(text), n) for text in one.given]
            total += len(said)
            for gram in sorted(set(said)):
                right += min(said.count(gram), max(text.count(gram) for text in given))
        product *= right / total if total else 0.0
    lengths = [len(words(one.written)) for one in captions]
    nearest = []
    for one, n in zip(captions, lengths, strict=True):
        given = sorted(len(words(text)) for text in one.given)
        nearest.append(min(given, key=lambda m: abs(m - n)))  # the first, so the shorter
    c, r = sum(lengths), sum(nearest)
    return product**0.25 * (1.0 if c > r else math.exp(1 - r / c))


def other_cider(captions: list[Caption]) -> float:
    """With dense vectors of all n-grams there are."""
    found = 0.0
    for n in range(1, 5):
        texts = [(grams(words(one.written), n), [grams(words(text), n) for text in one.given]) for one in captions]
        names = sorted({g for written, given in texts for text in (written, *given) for g in text})
        said_of = np.array([sum(any(g in text for text in given) for _, given in texts) for g in names], float)
        idf = np.log(len(captions) / np.maximum(1, said_of))
        for one, (written, given) in zip(captions, texts, strict=True):
            a = np.array([written.count(g) for g in names]) * idf
            for text, plain_ in zip(given, one.given, strict=True):
                b = np.array([text.count(g) for g in names]) * idf
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                gap = len(words(one.written)) - len(words(plain_))
                if norm:
                    found += 10 / 4 / len(given) * np.exp(-(gap**2) / 72) * (np.minimum(a, b) @ b) / norm
    return found / len(captions)


def drawn(seed: int) -> list[Caption]:
    """What is written is a piece of what is said, doubled in one place; once it is nothing."""
    rng = random.Random(seed)
    known = ["a", "red", "ring", "on", "the", "grass", "and", "two", "boxes"]
    found = [Caption("", ["two red rings"])]
    for _ in range(12):
        given = [rng.choices(known, k=rng.randint(5, 12)) for _ in range(rng.randint(1, 5))]
        piece = given[0][rng.randint(0, 1) :]
        found.append(Caption(" ".join(piece + piece[: rng.randint(0, 3)]), [" ".join(text) for text in given]))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_captions_are_those_of_other_formulations(seed: int) -> None:
    found, captions = scores(drawn(seed)), drawn(seed)
    assert found["bleu4"] == pytest.approx(other_bleu(captions), rel=1e-12) and found["bleu4"] > 0.01
    assert found["cider"] == pytest.approx(other_cider(captions), rel=1e-12) and found["cider"] > 0.05


def test_scores_that_are_known_by_hand() -> None:
    same = [Caption("a cat sits on it", ["A cat sits on it."]), Caption("two dogs run far", ["two dogs run far", "x"])]
    assert scores(same)["bleu4"] == 1.0
    # Of the second picture half of the people say it: 10 and 10 / 2.
    assert scores(same)["cider"] == pytest.approx(7.5, rel=1e-12)
    # Papineni's example of clipping: 2 of 7 words; with nothing of two words in common it is nothing.
    assert scores([Caption("the the the the the the the", ["the cat is on the mat"])])["bleu4"] == 0.0
    # Precisions 5/6, 4/5, 3/4 and 2/3; of the lengths 4 and 8, both as near to 6, the shorter counts: no penalty.
    given = ["a b c d", "a b c d e x y z"]
    assert scores([Caption("a b c d e f", given)])["bleu4"] == pytest.approx((1 / 3) ** 0.25, rel=1e-12)
    # One word against three, and half of two: 1/4 of it is found (n = 1), exp(-4/72) near, of a norm √3.
    two = [Caption("ring", ["ring box star"]), Caption("none", ["of these"])]
    assert scores(two)["cider"] == pytest.approx(10 / 4 * math.exp(-4 / 72) / math.sqrt(3) / 2, rel=1e-12)
    assert scores([Caption("", ["a b c d e"]), Caption("", ["x"])]) == {"bleu4": 0.0, "cider": 0.0}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A man's dog isn't here, is it?", "a man 's dog is n't here is it"),
        ("A T-shirt (red) at 3.5 m; 1,000 of them!", "a t-shirt red at 3.5 m 1,000 of them"),
        ("they’re “o'clock” snake_case", "they 're o'clock snake case"),
        ("'s... -- $ n't", "'s n't"),
        ("Ein großer Hund", "ein großer hund"),
    ],
)
def test_captions_are_cut_into_words(text: str, wanted: str) -> None:
    assert words(text) == wanted.split()


# What VQAv2's evaluation makes of answers.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("dont know", "don't know"),
        ("It isnt", "it isn't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # with both missing it is in no table
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("oclock twas maam", "o'clock 'twas ma'am"),
        ("shes hes", "shes he's"),
        ("its were well ill im shed", "its were well ill im shed"),
        ("somebody'd", "somebodyd"),
        ("girl's", "girl's"),
        ("2:50 P.M.", "2:50 pm"),
        ("3.5. 3. .5", "3.5 3 .5"),
        ("100,978", "100978"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("a/ b/c", "bc"),  # next to a space once, a mark goes without a trace everywhere
        ("1,000 b/c", "1000 bc"),  # as in an answer with a comma between digits
        ("The one and none of ten a", "1 and 0 of 10"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("don’t", "don't"),
    ],
)
def test_answers_are_made_alike_as_by_the_evaluation(text: str, wanted: str) -> None:
    assert plain(text) == wanted


def test_one_picture_cannot_be_compared_by_cider() -> None:
    with pytest.raises(DataError, match="--best-by cider compares held-out pictures, and there is one"):
        watch.stage2([1], None, None, 0, "cider")  # type: ignore[arg-type]
    told = [
        ([Record("a", File("a"), ["a red ring on it"]), Record("b", File("b"), ["two"])], ["a red ring on it", "two"])
    ]  # type: ignore[arg-type]
    assert measures.of_captions(told)["bleu4"] == pytest.approx(1.0) and measures.better("stage2", "cider")[1]
