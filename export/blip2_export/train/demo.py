"""The chain behind the demos: ViT and language model side by side, stage 1, then stage 2 and perhaps the questions.

Each phase is resumable, and demos in the same work folder share the phases that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import Blip2VisionModel, PreTrainedTokenizerFast

from blip2_export.train import checkpoint, language, seq2seq, stage1, stage2, text, vision, vqa
from blip2_export.train.features import Pairs, SceneFeatures
from blip2_export.train.frozen import frozen
from blip2_export.train.loop import Phase, Schedule
from blip2_export.train.qformer import QFormer
from blip2_export.train.qformer import config as qformer_config
from blip2_export.train.speaker import Speaker

_SUFFIX = {"opt": "", "t5": "_t5"}  # of the phases that a language model takes part in


@dataclass(frozen=True)
class Plan:
    """Steps of each phase, the number of drawn scenes of the two stages, and the side of the pictures that questions are about.

    `matching`: the steps of stage 1 that look at every pair; those after them look at every fourth and learn to write.
    """

    vision: Schedule = Schedule(1500, 1.5e-3, matrix_rate=5e-3, warmup=100)
    language: Schedule = Schedule(1400, 1.5e-3, matrix_rate=5e-3, warmup=100)
    language_t5: Schedule = Schedule(4100, 1.5e-3, matrix_rate=5e-3, warmup=100)
    stage1: Schedule = Schedule(2700, 1e-3, matrix_rate=3e-3, warmup=100)
    stage2: Schedule = Schedule(1150, 1e-3, matrix_rate=3e-3, warmup=100)
    stage2_t5: Schedule = Schedule(3400, 1e-3, matrix_rate=3e-3, warmup=100)
    vqa: Schedule = Schedule(500, 3e-4, matrix_rate=1e-3, warmup=50)
    matching: int = 1500
    n_scenes: int = 30_000
    batch_size: int = 64
    vqa_batch_size: int = 24
    vqa_side: int = 144


TINY = Plan(
    *(Schedule(3, 1e-3, warmup=1) for _ in range(7)),
    matching=2,
    n_scenes=64,
    batch_size=8,
    vqa_batch_size=4,
    vqa_side=120,
)


@dataclass(frozen=True)
class Demo:
    """One chain of phases in the folder `work`.

    `stage`: the last one, `stage1` (the retrieval model), `stage2` or `vqa`. `llm`: `opt` or `t5`; stage 1 needs none.
    `without_stage1`: stage 2 starts from a new Q-Former, the ablation of the paper (Li et al. 2023, section 4.1, figure 5).
    """

    work: Path
    plan: Plan
    stage: str = "stage2"
    llm: str = "opt"
    without_stage1: bool = False

    @property
    def is_full(self) -> bool:
        """Whether there is enough to learn for evaluations to say something."""
        return self.plan.n_scenes >= 400


@dataclass(frozen=True)
class _Scenes:
    """What the frozen ViT sees of the scenes that are learned, and of those that are not."""

    eye: Blip2VisionModel
    learned: SceneFeatures
    held_out: SceneFeatures


def train(demo: Demo, out: Path) -> None:
    """Trains what is not yet trained and writes the Hugging Face folder `out`."""
    torch.manual_seed(0)
    _, qformer_tokenizer = text.tokenizers(demo.work)
    if demo.is_full:
        _side_by_side(demo)
    scenes = _scenes(demo)
    torch.manual_seed(1)
    q = QFormer(qformer_config(len(qformer_tokenizer), scenes.eye.config.hidden_size))
    if not demo.without_stage1:
        _train_stage1(demo, stage1.Stage1(q, qformer_tokenizer), scenes)
    if demo.stage == "stage1":
        checkpoint.write_stage1(out, scenes.eye, q, qformer_tokenizer)
        return
    speaker, tokenizer = _speaker(demo)
    torch.manual_seed(2)
    second = stage2.Stage2(q, speaker.texts)
    _train_stage2(demo, second, speaker, scenes)
    if demo.stage == "stage2":
        checkpoint.write_stage2(out, scenes.eye, second, tokenizer, small=True)
        return
    torch.manual_seed(3)
    third = vqa.Vqa(scenes.eye, q, second, demo.plan.vqa_side)
    _train_vqa(demo, third, vqa.Asker(speaker, qformer_tokenizer, demo.plan.vqa_side))
    checkpoint.write_vqa(out, third, tokenizer, qformer_tokenizer)


def _scenes(demo: Demo) -> _Scenes:
    eye, n = _vision(demo).requires_grad_(False).eval(), demo.plan.n_scenes
    return _Scenes(eye, SceneFeatures(eye, n, demo.work), SceneFeatures(eye, min(400, n), demo.work, "held-out"))


def _train_stage1(demo: Demo, stage: stage1.Stage1, scenes: _Scenes) -> None:
    """Captions with one wrong word come in once drawn negatives are told."""
    plan = demo.plan

    def batch(step: int) -> Pairs:
        if step < plan.matching:
            return scenes.learned.pairs(step, plan.batch_size, edited=0.0 if step < plan.matching // 3 else 0.5)
        return scenes.learned.pairs(step, plan.batch_size, edited=0.5, more=6, matched=0.25)

    with frozen(scenes.eye, "vision model"):
        stage1.train(Phase("stage1", demo.work, plan.stage1), stage, batch, scenes.held_out if demo.is_full else None)


def _train_stage2(demo: Demo, second: stage2.Stage2, speaker: Speaker, scenes: _Scenes) -> None:
    """The decoder of OPT reads many texts behind one soft prompt, the encoder of T5 each text beside its own."""
    plan = demo.plan
    if demo.llm == "opt":
        schedule, size, mixture = plan.stage2, plan.batch_size, text.Mixture(4, 6, report=True)
    else:
        schedule, size, mixture = plan.stage2_t5, plan.batch_size // 2, text.Mixture(2, 6, report=True)
    phase = Phase(f"stage2{_SUFFIX[demo.llm]}{'_alone' * demo.without_stage1}", demo.work, schedule)
    gate = (lambda: stage2.gate(second, speaker, scenes.held_out)) if demo.is_full else None
    with frozen(scenes.eye, "vision model"):
        stage2.train(phase, second, stage2.scene_batches(scenes.learned, speaker, size, mixture), gate)


def _train_vqa(demo: Demo, third: vqa.Vqa, asker: vqa.Asker) -> None:
    phase = Phase(f"vqa{_SUFFIX[demo.llm]}", demo.work, demo.plan.vqa)
    vqa.train(phase, third, asker, demo.plan.vqa_batch_size, demo.is_full)


def _vision(demo: Demo) -> Blip2VisionModel:
    return vision.pretrain(Phase("vision", demo.work, demo.plan.vision))


def _speaker(demo: Demo) -> tuple[Speaker, PreTrainedTokenizerFast]:
    """The frozen language model with its tokenizer."""
    work, plan = demo.work, demo.plan
    if demo.llm == "opt":
        tokenizer = text.tokenizers(work)[0]
        phase = Phase("language", work, plan.language, log_every=25)
        mouth = language.pretrain(phase, tokenizer).requires_grad_(False).eval()
        return language.speaker(language.Texts(mouth), text.Packer(tokenizer)), tokenizer
    tokenizer = seq2seq.tokenizer(work)
    phase = Phase("language_t5", work, plan.language_t5, log_every=25)
    model = seq2seq.pretrain(phase, tokenizer).requires_grad_(False).eval()
    return seq2seq.speaker(seq2seq.Texts(model), seq2seq.Batcher(tokenizer)), tokenizer


def _side_by_side(demo: Demo) -> None:
    """Pre-trains ViT and language model at the same time; neither needs the other, and small models use many cores badly."""
    models = [_vision] if demo.stage == "stage1" else [_vision, _speaker]
    threads = max(1, torch.get_num_threads() // len(models))
    with ProcessPoolExecutor(len(models), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_pretrain, model, demo, threads) for model in models]:
            done.result()


def _pretrain(model: Callable[[Demo], object], demo: Demo, threads: int) -> None:
    """What it gives stays in the work folder."""
    torch.set_num_threads(threads)
    model(demo)
