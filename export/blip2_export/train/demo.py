"""The whole chain behind `demo-opt`: ViT and language model side by side, then stage 1 and stage 2; each phase is resumable."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
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

    vision: Schedule = Schedule(1500, 1.5e-3, matrix_rate=5e-3, warmup=100)
    language: Schedule = Schedule(1400, 1.5e-3, matrix_rate=5e-3, warmup=100)
    stage1: Schedule = Schedule(800, 1e-3, matrix_rate=3e-3, warmup=100)
    stage2: Schedule = Schedule(1500, 1e-3, matrix_rate=3e-3, warmup=100)
    n_scenes: int = 30_000
    batch_size: int = 64


TINY = Plan(*(Schedule(3, 1e-3, warmup=1) for _ in range(4)), n_scenes=64, batch_size=8)


def train(work: Path, out: Path, plan: Plan) -> None:
    """Trains what is not yet trained in `work` and writes the Hugging Face folder `out`."""
    torch.manual_seed(0)
    opt_tokenizer, qformer_tokenizer = text.tokenizers(work)
    if _full(plan):
        _side_by_side(work, plan)
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
        lambda step: data.pairs(step, plan.batch_size, edited=0.0 if step < plan.stage1.steps // 4 else 0.5),
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


def _side_by_side(work: Path, plan: Plan) -> None:
    """Pre-trains ViT and language model at the same time; neither needs the other, and small models use many cores badly."""
    threads = max(1, torch.get_num_threads() // 2)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_pretrain, name, work, plan, threads) for name in ("vision", "language")]:
            done.result()


def _pretrain(name: str, work: Path, plan: Plan, threads: int) -> None:
    torch.set_num_threads(threads)
    if name == "vision":
        vision.pretrain(Phase(name, work, plan.vision))
    else:
        language.pretrain(Phase(name, work, plan.language, log_every=25), text.tokenizers(work)[0])


def _full(plan: Plan) -> bool:
    return plan.n_scenes >= 400


def _unchanged(module: nn.Module, fingerprint: str) -> None:
    if stage2.fingerprint(module) != fingerprint:
        raise AssertionError("the frozen vision model changed during the two stages")
