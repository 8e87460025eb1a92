"""The whole chain behind `demo-opt`: ViT, language model, stage 1, stage 2, one after the other, each resumable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from blip2_export.train import checkpoint, language, stage1, stage2, text, vision
from blip2_export.train.features import SceneFeatures
from blip2_export.train.loop import Phase, Schedule
from blip2_export.train.qformer import QFormer
from blip2_export.train.qformer import config as qformer_config


@dataclass(frozen=True)
class Plan:
    """Steps of each phase and the number of drawn scenes of the two stages."""

    vision: Schedule = Schedule(6600, 1e-3)
    language: Schedule = Schedule(3400, 1.5e-3, warmup=200)
    stage1: Schedule = Schedule(1500, 1e-3, warmup=200)
    stage2: Schedule = Schedule(2800, 1e-3, warmup=200)
    n_scenes: int = 30_000
    batch_size: int = 64


TINY = Plan(*(Schedule(3, 1e-3, warmup=1) for _ in range(4)), n_scenes=64, batch_size=8)


def train(work: Path, out: Path, plan: Plan) -> None:
    """Trains what is not yet trained in `work` and writes the Hugging Face folder `out`."""
    torch.manual_seed(0)
    opt_tokenizer, qformer_tokenizer = text.tokenizers(work)
    eye = vision.pretrain(Phase("vision", work, plan.vision)).requires_grad_(False).eval()
    mouth = (
        language.pretrain(Phase("language", work, plan.language, log_every=25), opt_tokenizer)
        .requires_grad_(False)
        .eval()
    )
    seen = stage2.fingerprint(eye)
    data = SceneFeatures(eye, plan.n_scenes, work)
    held_out = SceneFeatures(eye, min(400, plan.n_scenes), work, "held-out")

    torch.manual_seed(1)
    q = QFormer(qformer_config(len(qformer_tokenizer), eye.config.hidden_size))
    first = stage1.Stage1(q, qformer_tokenizer)
    stage1.train(
        Phase("stage1", work, plan.stage1),
        first,
        lambda step: data.pairs(step, plan.batch_size),
        held_out if _full(plan) else None,
    )

    torch.manual_seed(2)
    second = stage2.Stage2(q, mouth)
    packer = text.Packer(opt_tokenizer)
    stage2.train(
        Phase("stage2", work, plan.stage2),
        second,
        stage2.scene_batches(data, packer, plan.batch_size),
        (lambda: stage2.gate(second, packer, held_out)) if _full(plan) else None,
    )
    _unchanged(eye, seen)
    checkpoint.write_opt(out, eye, second, opt_tokenizer)


def _full(plan: Plan) -> bool:
    return plan.n_scenes >= 400


def _unchanged(module: nn.Module, fingerprint: str) -> None:
    if stage2.fingerprint(module) != fingerprint:
        raise AssertionError("the frozen vision model changed during the two stages")
