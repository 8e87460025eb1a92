"""Image–text data as the stages see it: features of the frozen ViT, and texts that go with them."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Blip2VisionModel

from blip2_export.scenes import drawing
from blip2_export.train.vision import pixels

_RELATIONS = 0.5  # share of the further captions that relate two objects, the slowest kind to learn


@dataclass
class Pairs:
    """Image features [batch, positions, width], one caption each, and which captions are true of which pictures.

    `true[i, j]`: caption `j` is known to be true of picture `i`; the diagonal always is. Off the diagonal such pairs are
    neither positives nor negatives. `false`: texts that are known not to be true of picture `i`, for some of the `i`.
    `more`: other true captions of each picture, as many of each, which ITG alone learns from. `matched`: the share of the pairs
    that ITM looks at; it costs three joint passes a pair, far more than ITC and ITG.
    """

    features: Tensor
    captions: list[str]
    true: Tensor
    false: dict[int, str] = field(default_factory=dict)
    more: list[list[str]] = field(default_factory=list)
    matched: float = 1.0


class SceneFeatures:
    """`count` drawn scenes with their ViT features, computed once and kept in a file (float16), resumed after a kill."""

    def __init__(
        self, vision: Blip2VisionModel, count: int, work: Path, name: str = "train", unseen: bool = False
    ) -> None:
        self.count, self.name, self.unseen = count, name, unseen
        cfg = vision.config
        shape = (count, (cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.hidden_size)
        self.path = work / f"features_{name}_{count}.npy"
        if not self.path.exists():
            self._compute(vision, shape)
        self.table = np.load(self.path, mmap_mode="r")

    def scene(self, i: int) -> drawing.Scene:
        return drawing.sample_scene(random.Random(f"{self.name} scene {i}"), unseen=self.unseen)

    def features(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(self.table[indices].astype(np.float32))

    def pairs(self, step: int, size: int, edited: float = 0.0, more: int = 0, matched: float = 1.0) -> Pairs:
        """The batch of a step. A share of the captions, `edited`, comes with a false one that differs in one word; each picture
        comes with `more` captions.
        """
        rng = random.Random(f"{self.name} pairs {step}")
        indices = [rng.randrange(self.count) for _ in range(size)]
        found = [self.scene(i) for i in indices]
        captions = [drawing.caption(s, rng) for s in found]
        true = torch.tensor([[drawing.is_true(c, s) for c in captions] for s in found])
        edits = {
            i: drawing.one_word_edit(c, s, rng)
            for i, (c, s) in enumerate(zip(captions, found, strict=True))
            if rng.random() < edited
        }
        false = {i: text for i, text in edits.items() if text}
        others = [
            [drawing.caption(s, rng, "relation" if rng.random() < _RELATIONS else None) for _ in range(more)]
            for s in found
        ]
        return Pairs(self.features(indices), captions, true | torch.eye(size, dtype=torch.bool), false, others, matched)

    def _compute(self, vision: Blip2VisionModel, shape: tuple[int, int, int]) -> None:
        aside = self.path.with_suffix(".part.npy")
        table = np.lib.format.open_memmap(aside, "w+", np.float16, shape)
        side = vision.config.image_size
        for start in range(0, self.count, 64):
            block = range(start, min(start + 64, self.count))
            batch = np.stack([pixels(np.asarray(drawing.draw(self.scene(i), side))) for i in block])
            with torch.inference_mode():
                table[block.start : block.stop] = vision(torch.from_numpy(batch)).last_hidden_state.numpy()
            if start % 6400 == 0:
                print(f"features {self.name}: {start} of {self.count}", file=sys.stderr, flush=True)
        table.flush()
        aside.rename(self.path)
