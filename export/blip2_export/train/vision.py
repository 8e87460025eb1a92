"""Pre-training of the demo's ViT on scenes: every patch says what lies on it and where, pooled patches say what the object is."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel

from blip2_export.scenes import drawing
from blip2_export.train.loop import Evaluation, Phase, Task, fit

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CELLS = 4  # foreground is learned on 4×4 cells of a patch
RECOLOURED = 0.5  # share of objects painted in any colour, their colour not learned, so that shape does not lean on it
_SHAPES, _COLOURS, _SIZES = list(drawing.SHAPES), sorted(drawing.COLOURS), sorted(drawing.SIZES)


def config(image_size: int = 96) -> Blip2VisionConfig:
    """The demo's ViT: 64 patches of 12 px, 6 layers of width 128."""
    return Blip2VisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=12,
        initializer_range=0.02,
    )


def pixels(picture: np.ndarray) -> np.ndarray:
    """[side, side, 3] in 0..255 → normalised [3, side, side] float32."""
    scaled = (picture.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return scaled.transpose(2, 0, 1)


class Pretext(nn.Module):
    """The ViT with the heads that are thrown away afterwards."""

    def __init__(self, vision: Blip2VisionModel) -> None:
        super().__init__()
        self.vision = vision
        width = vision.config.hidden_size
        self.mask = nn.Linear(width, CELLS * CELLS)
        self.offset = nn.Linear(width, 2)
        self.count = nn.Linear(width, drawing.MAX_OBJECTS)
        self.patch = nn.ModuleList(nn.Linear(width, n) for n in (len(_SHAPES), len(_COLOURS), len(_SIZES)))
        self.pooled = nn.ModuleList(nn.Linear(width, n) for n in (len(_SHAPES), len(_COLOURS), len(_SIZES)))
        self.place = nn.Linear(width, 2)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.vision(batch["pixels"]).last_hidden_state
        patches = features[:, 1:]
        owner, share = batch["owner"], batch["share"]
        covered = owner >= 0
        out = {
            "mask": F.binary_cross_entropy_with_logits(self.mask(patches), batch["mask"]),
            "offset": F.smooth_l1_loss(self.offset(patches)[covered], batch["offset"][covered]),
            # Without this the ViT forgets where a patch lies, and no Q-Former can say what is left of what.
            "place": F.smooth_l1_loss(self.place(patches)[covered], 10 * batch["place"][covered]),
            "count": 0.5 * F.cross_entropy(self.count(features[:, 0]), batch["count"]),
        }
        pooled = torch.einsum("bop,bpd->bod", share, patches)
        there = batch["labels"][..., 0] >= 0
        for k, name in enumerate(("shape", "colour", "size")):
            label = batch["labels"][..., k]
            on_patch = torch.gather(label, 1, owner.clamp(min=0))[covered]
            out[f"patch_{name}"] = 0.5 * F.cross_entropy(self.patch[k](patches)[covered], on_patch, ignore_index=-100)
            logits = self.pooled[k](pooled)[there]
            out[name] = F.cross_entropy(logits, label[there], ignore_index=-100)
            right = (logits.argmax(-1) == label[there])[label[there] != -100]
            out[f"_{name}_right"] = right.float().mean()
        return out


@dataclass(frozen=True)
class Patches:
    """Pictures of `side` × `side` pixels in patches of `patch` × `patch`."""

    side: int
    patch: int

    @property
    def n_side(self) -> int:
        return self.side // self.patch


def make_batch(
    seed: str, size: int, patches: Patches, recoloured: float = RECOLOURED, unseen: bool = False
) -> dict[str, Tensor]:
    """`size` scenes with what each patch and each object is; -100 marks a label that is not learned."""
    rng = random.Random(seed)
    rows = [_example(drawing.sample_scene(rng, unseen=unseen), rng, patches, recoloured) for _ in range(size)]
    return {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in rows[0]}


def _example(scene: drawing.Scene, rng: random.Random, patches: Patches, recoloured: float) -> dict[str, Any]:
    side, patch, n, cell = patches.side, patches.patch, patches.n_side, patches.patch // CELLS
    canvas = np.asarray(drawing.draw(drawing.Scene((), scene.background, scene.seed), side)).astype(np.float32)
    labels = np.full((drawing.MAX_OBJECTS, 3), -1, np.int64)
    cover = np.zeros((drawing.MAX_OBJECTS, side, side), np.float32)
    for k, thing in enumerate(scene.things):
        free = rng.random() < recoloured
        colour = _any_colour(rng, canvas) if free else _jittered(rng, thing.colour)
        drawing.paint(canvas, thing, colour)
        left, top, alpha = drawing.coverage(thing, side)
        cover[k, top : top + alpha.shape[0], left : left + alpha.shape[1]] = alpha
        labels[k] = (
            _SHAPES.index(thing.shape),
            -100 if free else _COLOURS.index(thing.colour),
            _SIZES.index(thing.size),
        )
    per_patch = cover.reshape(drawing.MAX_OBJECTS, n, patch, n, patch).mean((2, 4)).reshape(drawing.MAX_OBJECTS, n * n)
    owner = np.where(per_patch.max(0) > 0.05, per_patch.argmax(0), -1)
    total = per_patch.sum(1, keepdims=True)
    centres = (np.arange(n) + 0.5) / n
    offset, place = np.zeros((n * n, 2), np.float32), np.zeros((n * n, 2), np.float32)
    for k, thing in enumerate(scene.things):
        here = owner == k
        place[here] = thing.x, thing.y
        offset[here] = (np.stack([thing.x - np.tile(centres, n), thing.y - np.repeat(centres, n)], -1) * 5)[here]
    cells = cover.sum(0).reshape(n, CELLS, cell, n, CELLS, cell).mean((2, 5)).transpose(0, 2, 1, 3)
    return {
        "pixels": pixels(np.clip(canvas, 0, 255)),
        "mask": np.clip(cells.reshape(n * n, CELLS * CELLS), 0, 1).astype(np.float32),
        "owner": owner.astype(np.int64),
        "offset": offset,
        "place": place,
        "share": (per_patch / np.maximum(total, 1e-6)).astype(np.float32),
        "labels": labels,
        "count": np.int64(len(scene.things) - 1),
    }


def _jittered(rng: random.Random, colour: str) -> np.ndarray:
    return np.array([min(255.0, max(0.0, c + rng.uniform(-10, 10))) for c in drawing.COLOURS[colour]])


def _any_colour(rng: random.Random, canvas: np.ndarray) -> np.ndarray:
    """Any colour that stands out from the background."""
    ground = canvas[::16, ::16].reshape(-1, 3).mean(0)
    while True:
        colour = np.array([rng.uniform(0, 255) for _ in range(3)])
        if np.abs(colour - ground).max() > 70:
            return colour


def pretrain(phase: Phase, batch_size: int = 64) -> Blip2VisionModel:
    """Trains (or goes on training) the ViT and returns it."""
    torch.manual_seed(0)
    vision = Blip2VisionModel(config())
    model = Pretext(vision)
    patches = Patches(vision.config.image_size, vision.config.patch_size)

    def evaluate() -> dict[str, float]:
        unseen = gate(model, patches, unseen=True)
        return {**gate(model, patches), **{f"unseen_{name}": share for name, share in unseen.items()}}

    task = Task(model, lambda step: make_batch(f"train {step}", batch_size, patches), model.losses)
    fit(phase, task, Evaluation(evaluate, every=500))
    return vision


def gate(model: Pretext, patches: Patches, unseen: bool = False) -> dict[str, float]:
    """Share of objects whose shape, colour and size are right, on scenes that training never sees (seeds of their own)."""
    totals: dict[str, float] = {}
    for k in range(4):
        parts = model.losses(make_batch(f"held-out {k}", 128, patches, recoloured=0.0, unseen=unseen))
        for name in ("shape", "colour", "size"):
            totals[name] = totals.get(name, 0.0) + float(parts[f"_{name}_right"]) / 4
    return {k: round(v, 4) for k, v in totals.items()}
