"""Everything that may truly be said of a scene, as a list: `blip2 bench` counts answers that are in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from blip2_export.scenes import drawing
from blip2_export.scenes.drawing import Scene, Thing

COUNT_QUESTIONS = ("how many objects are there?", "how many things can you see?")


def of_scene(name: str, scene: Scene) -> dict[str, list[str]]:
    """By the picture's file name, and with each question that every scene has an answer to."""
    number = drawing.NUMBERS[len(scene.things)]
    return {name: captions(scene), **{f"{name}: {question}": [number] for question in COUNT_QUESTIONS}}


def captions(scene: Scene) -> list[str]:
    """Every true caption in every phrasing."""
    alone = itertools.chain.from_iterable(_of_one(thing, scene) for thing in scene.things)
    pairs = itertools.chain.from_iterable(_of_two(a, b) for a, b in itertools.permutations(scene.things, 2))
    return [*alone, *pairs]


def _of_one(thing: Thing, scene: Scene) -> Iterator[str]:
    for noun in _nouns(thing):
        yield noun
        yield f"there is {noun}"
        yield f"{noun} at the {thing.place}"
        yield f"at the {thing.place} there is {noun}"
        if len(scene.things) > 1:
            yield f"{drawing.NUMBERS[len(scene.things)]} objects, one is {noun}"


def _of_two(a: Thing, b: Thing) -> Iterator[str]:
    for first, second in itertools.product(_nouns(a), _nouns(b)):
        yield f"{first} and {second}"
        yield f"a picture of {first} and {second}"
        yield from (f"{first} {name} {second}" for name in drawing.relations(a, b))


def _nouns(thing: Thing) -> tuple[str, str]:
    return drawing.noun_of(thing), f"a {thing.size} {thing.colour} {thing.shape}"
