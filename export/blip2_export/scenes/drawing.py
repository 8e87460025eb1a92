"""Pictures of coloured shapes, drawn from a seed, with captions and questions whose truth is known.

A scene has one to four objects in the cells of a 3×3 grid. Within one scene all shapes differ and all colours differ, so
"the star" and "the red object" each mean one object. Six shape–colour pairs (`UNSEEN_PAIRS`) are kept out of training.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 32, 38),
    "orange": (246, 138, 24),
    "yellow": (250, 226, 48),
    "green": (38, 156, 56),
    "cyan": (52, 206, 220),
    "blue": (36, 70, 204),
    "purple": (122, 44, 168),
    "pink": (246, 130, 186),
}
SIZES = {"small": (0.105, 0.125), "large": (0.165, 0.19)}  # radius, as a share of the picture's side
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("zero", "one", "two", "three", "four")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "noise")
UNSEEN_PAIRS = frozenset(
    {
        ("circle", "cyan"),
        ("square", "purple"),
        ("triangle", "orange"),
        ("star", "blue"),
        ("cross", "yellow"),
        ("ring", "green"),
    }
)
RELATIONS = ("left of", "right of", "above", "below")
N_OBJECTS_WEIGHTS = (0.3, 0.4, 0.2, 0.1)
SLOT_TOKENS = 8  # words of one object in `describe`; an empty slot takes as many
MAX_OBJECTS = 4
_EMPTY_SLOT = " and nothing else to be seen here ."
_JITTER = 0.09  # of the side, around a cell's centre: neighbouring rows and columns stay 0.15 apart
_GAP = 0.02
_CORNERS = {  # distance in radii and angle in degrees, from the centre
    "square": [(1.0, 45 + 90 * k) for k in range(4)],
    "triangle": [(1.0, -90 + 120 * k) for k in range(3)],
    "star": [(1.0 if k % 2 == 0 else 0.42, -90 + 36 * k) for k in range(10)],
    "cross": [p for k in range(4) for p in ((1.0, 90 * k - 19), (1.0, 90 * k + 19), (0.45, 90 * k + 45))],
}


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` and `radius` are shares of the picture's side, `rotation` is in degrees."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    rotation: float

    @property
    def place(self) -> str:
        return place_name(self.row, self.column)


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (top to bottom, then left to right) and what is needed to draw the picture again."""

    things: tuple[Thing, ...]
    background: str
    seed: int


def place_name(row: int, column: int) -> str:
    """`top left`, `top`, …, `middle` for the centre cell."""
    if row == 1:
        return "middle" if column == 1 else COLUMNS[column]
    return ROWS[row] if column == 1 else f"{ROWS[row]} {COLUMNS[column]}"


def sample_scene(rng: random.Random, n_objects: int | None = None, unseen: bool = False) -> Scene:
    """Draws a scene. With `unseen` its first-drawn object is one of the pairs kept out of training; without, none is."""
    while True:
        n = n_objects or rng.choices(range(1, MAX_OBJECTS + 1), N_OBJECTS_WEIGHTS)[0]
        things = _sample_things(rng, n, unseen)
        if things is not None:
            things.sort(key=lambda t: (t.row, t.column))
            return Scene(tuple(things), rng.choice(BACKGROUNDS), rng.getrandbits(32))


def _sample_things(rng: random.Random, n: int, unseen: bool) -> list[Thing] | None:
    pairs = list(zip(rng.sample(SHAPES, n), rng.sample(sorted(COLOURS), n), strict=True))
    if unseen:
        pairs[0] = rng.choice(sorted(UNSEEN_PAIRS))
    if len({s for s, _ in pairs}) < n or len({c for _, c in pairs}) < n:
        return None
    if any(p in UNSEEN_PAIRS for p in pairs[1 if unseen else 0 :]):
        return None
    things: list[Thing] = []
    for (shape, colour), cell in zip(pairs, rng.sample(range(9), n), strict=True):
        size = rng.choice(sorted(SIZES))
        radius = rng.uniform(*SIZES[size])
        row, column = divmod(cell, 3)
        x = min(max((column + 0.5) / 3 + rng.uniform(-_JITTER, _JITTER), radius + _GAP), 1 - radius - _GAP)
        y = min(max((row + 0.5) / 3 + rng.uniform(-_JITTER, _JITTER), radius + _GAP), 1 - radius - _GAP)
        if any(math.hypot(x - t.x, y - t.y) < radius + t.radius + _GAP for t in things):
            return None
        things.append(Thing(shape, colour, size, row, column, x, y, radius, rng.uniform(-30, 30)))
    return things


# Drawing


def draw(scene: Scene, side: int = 96) -> Image.Image:
    """The picture, `side`×`side` RGB, antialiased. The same scene always gives the same picture."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(scene.background, side, rng)
    for thing in scene.things:
        colour = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-10, 10, 3), 0, 255)
        paint(canvas, thing, colour)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


def paint(canvas: np.ndarray, thing: Thing, colour: np.ndarray) -> None:
    """Blends one object into `canvas` [side, side, 3] float."""
    side = canvas.shape[0]
    left, top, alpha = coverage(thing, side)
    box = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    box += alpha[..., None] * (colour - box)


def coverage(thing: Thing, side: int) -> tuple[int, int, np.ndarray]:
    """Left and top edge of the object's box in pixels, and its coverage there, 0..1."""
    scale = 4
    left, top = int((thing.x - thing.radius) * side) - 1, int((thing.y - thing.radius) * side) - 1
    left, top = max(left, 0), max(top, 0)
    extent = min(int(2 * thing.radius * side) + 4, side - left, side - top)
    mask = Image.new("L", (extent * scale, extent * scale))
    centre = (thing.x * side - left) * scale, (thing.y * side - top) * scale
    _outline(ImageDraw.Draw(mask), thing, centre, thing.radius * side * scale)
    return left, top, np.asarray(mask.reduce(scale), dtype=np.float32) / 255


def _outline(pen: ImageDraw.ImageDraw, thing: Thing, centre: tuple[float, float], r: float) -> None:
    (cx, cy), turn = centre, math.radians(thing.rotation)
    if thing.shape in ("circle", "ring"):
        q = r * 0.92
        pen.ellipse((cx - q, cy - q, cx + q, cy + q), fill=255)
        if thing.shape == "ring":
            q = r * 0.48
            pen.ellipse((cx - q, cy - q, cx + q, cy + q), fill=0)
        return
    corners = [(r * distance, math.radians(degrees) + turn) for distance, degrees in _CORNERS[thing.shape]]
    pen.polygon([(cx + d * math.cos(a), cy + d * math.sin(a)) for d, a in corners], fill=255)


def _background(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    first, second = (_muted(rng) for _ in range(2))
    ys, xs = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if kind == "plain":
        return np.tile(first, (side, side, 1))
    if kind == "noise":
        grain = rng.normal(0, 14, (side, side, 1)) + rng.normal(0, 5, (side, side, 3))
        return (first + grain).astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = xs * math.cos(angle) + ys * math.sin(angle)
    if kind == "gradient":
        share = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
    elif kind == "stripes":
        share = 0.2 * (np.sin(along * rng.uniform(20, 60)) > 0)
    else:
        n = rng.integers(4, 10)
        share = 0.2 * ((np.floor(xs * n) + np.floor(ys * n)) % 2)
    return (first + share[..., None] * (second - first)).astype(np.float32)


def _muted(rng: np.random.Generator) -> np.ndarray:
    return (rng.uniform(50, 205) + rng.uniform(-12, 12, 3)).astype(np.float32)


def sample_pictures(n: int, seed: int, side: int = 256) -> list[Image.Image]:
    """`n` pictures of scenes."""
    rng = random.Random(seed)
    return [draw(sample_scene(rng), side) for _ in range(n)]


# Words


def describe(scene: Scene) -> str:
    """The whole scene in four slots of eight words, empty ones filled: the text that a soft prompt stands in for."""
    slots = [f" a {t.size} {t.colour} {t.shape} at {ROWS[t.row]} {COLUMNS[t.column]} ." for t in scene.things]
    return "".join(slots + [_EMPTY_SLOT] * (MAX_OBJECTS - len(slots)))


def relation(a: Thing, b: Thing, rng: random.Random) -> str | None:
    """A true relation of `a` to `b`; none when they share a cell's row and column (impossible in one scene)."""
    names = relations(a, b)
    return rng.choice(names) if names else None


def relations(a: Thing, b: Thing) -> list[str]:
    """Whatever `a` is to `b`."""
    return [name for name in RELATIONS if _related(a, name, b)]


def caption(scene: Scene, rng: random.Random, kind: str | None = None) -> str:
    """One of several phrasings; says one or two true things. `kind` asks for one of those that the scene has."""
    thing = rng.choice(scene.things)
    noun = noun_of(thing)
    alone = len(scene.things) == 1
    kinds = ["size", "place"] if alone else ["size", "place", "relation", "relation", "count", "list"]
    kind = kind if kind in kinds else rng.choice(kinds)
    if kind == "size":
        sized = f"a {thing.size} {thing.colour} {thing.shape}"
        return rng.choice((sized, f"there is {sized}"))
    if kind == "place":
        return rng.choice((f"{noun} at the {thing.place}", f"at the {thing.place} there is {noun}"))
    other = rng.choice([t for t in scene.things if t is not thing])
    other_noun = noun_of(other)
    if kind == "relation":
        return f"{noun} {relation(thing, other, rng)} {other_noun}"
    if kind == "count":
        return f"{NUMBERS[len(scene.things)]} objects, one is {noun}"
    return rng.choice((f"{noun} and {other_noun}", f"a picture of {noun} and {other_noun}"))


def noun_of(thing: Thing) -> str:
    return f"{_article(thing.colour)} {thing.colour} {thing.shape}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


QUESTION_KINDS = ("colour", "shape", "size", "count", "where", "yes/no")


def question(scene: Scene, rng: random.Random, kind: str | None = None) -> tuple[str, str, str]:
    """(kind, question, answer). Half of the yes/no answers are `yes`."""
    kind = kind or rng.choice(QUESTION_KINDS)
    thing = rng.choice(scene.things)
    if kind == "colour":
        asked = rng.choice((f"what colour is the {thing.shape}?", f"which colour does the {thing.shape} have?"))
        return kind, asked, thing.colour
    if kind == "shape":
        asked = rng.choice((f"what shape is the {thing.colour} object?", f"what is the {thing.colour} object?"))
        return kind, asked, thing.shape
    if kind == "size":
        return kind, f"how big is the {rng.choice((thing.shape, f'{thing.colour} {thing.shape}'))}?", thing.size
    if kind == "count":
        asked = rng.choice(("how many objects are there?", "how many things can you see?"))
        return kind, asked, NUMBERS[len(scene.things)]
    if kind == "where":
        name = rng.choice((thing.shape, f"{thing.colour} {thing.shape}", f"{thing.colour} object"))
        return kind, f"where is the {name}?", thing.place
    return kind, *_yes_no(scene, thing, rng)


def _yes_no(scene: Scene, thing: Thing, rng: random.Random) -> tuple[str, str]:
    true = rng.random() < 0.5
    form = rng.choice(("is it", "is there a", "is there a shape", "is there a colour"))
    if form == "is there a shape":
        absent = [s for s in SHAPES if all(t.shape != s for t in scene.things)]
        return f"is there a {thing.shape if true else rng.choice(absent)}?", _word(true)
    if form == "is there a colour":
        absent = [c for c in sorted(COLOURS) if all(t.colour != c for t in scene.things)]
        named = thing.colour if true else rng.choice(absent)
        return f"is there {_article(named)} {named} object?", _word(true)
    colour = thing.colour
    if not true:
        here = [t.colour for t in scene.things if t is not thing]
        others = [c for c in sorted(COLOURS) if c != thing.colour and (thing.shape, c) not in UNSEEN_PAIRS]
        likely = [c for c in here if (thing.shape, c) not in UNSEEN_PAIRS]
        colour = rng.choice(likely if likely and rng.random() < 0.5 else others)
    if form == "is it":
        return f"is the {thing.shape} {colour}?", _word(true)
    return f"is there {_article(colour)} {colour} {thing.shape}?", _word(true)


def _word(true: bool) -> str:
    return "yes" if true else "no"


# Truth

_NOUN = rf"an? (?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_PLACES = sorted((place_name(r, c) for r in range(3) for c in range(3)), key=len, reverse=True)
_FORMS = {
    "thing": re.compile(rf"(?:there is )?{_NOUN}"),
    "place": re.compile(rf"{_NOUN} at the ({'|'.join(_PLACES)})"),
    "place first": re.compile(rf"at the ({'|'.join(_PLACES)}) there is {_NOUN}"),
    "relation": re.compile(rf"{_NOUN} ({'|'.join(RELATIONS)}) {_NOUN}"),
    "count": re.compile(rf"({'|'.join(NUMBERS)}) objects, one is {_NOUN}"),
    "list": re.compile(rf"(?:a picture of )?{_NOUN} and {_NOUN}"),
}


def is_true(text: str, scene: Scene) -> bool:
    """Whether `text` parses as a caption and everything it says of the scene is so."""
    for form, pattern in _FORMS.items():
        match = pattern.fullmatch(text.strip())
        if match:
            return _holds(form, match.groups(), scene)
    return False


def _holds(form: str, said: tuple[str | None, ...], scene: Scene) -> bool:
    if form == "thing":
        return _find(scene, said) is not None
    if form == "place":
        thing = _find(scene, said[:3])
        return thing is not None and thing.place == said[3]
    if form == "place first":
        thing = _find(scene, said[1:])
        return thing is not None and thing.place == said[0]
    if form == "count":
        return _find(scene, said[1:]) is not None and said[0] == NUMBERS[len(scene.things)]
    first, second = _find(scene, said[:3]), _find(scene, said[-3:])
    if first is None or second is None or first is second:
        return False
    return form == "list" or _related(first, said[3] or "", second)


def _find(scene: Scene, noun: tuple[str | None, ...]) -> Thing | None:
    size, colour, shape = noun
    for t in scene.things:
        if (t.colour, t.shape) == (colour, shape) and size in (None, t.size):
            return t
    return None


def _related(a: Thing, name: str, b: Thing) -> bool:
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[name]


def one_word_edit(text: str, scene: Scene, rng: random.Random) -> str | None:
    """`text` with one attribute word exchanged so that it is no longer true; none if no exchange makes it false."""
    words = text.split()
    spots = [i for i, w in enumerate(words) if _alternatives(w)]
    rng.shuffle(spots)
    for i in spots:
        options = list(_alternatives(words[i]))
        rng.shuffle(options)
        for word in options:
            before = [*words[: i - 1], _article(word)] if words[i - 1] in ("a", "an") else words[:i]
            edited = " ".join([*before, word, *words[i + 1 :]])
            if not is_true(edited, scene):
                return edited
    return None


def _alternatives(word: str) -> tuple[str, ...]:
    for group in (SHAPES, tuple(COLOURS), tuple(SIZES)):
        if word in group:
            return tuple(w for w in group if w != word)
    return ()
