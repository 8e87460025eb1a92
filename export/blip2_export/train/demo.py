"""The chain behind the demos: ViT and language model side by side, stage 1, then stage 2 and perhaps the questions.

Each phase is resumable, and demos in the same work folder share the phases that they have in common.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

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


def train(
    work: Path, out: Path, plan: Plan, stage: str = "stage2", llm: str = "opt", without_stage1: bool = False
) -> None:
    """Trains what is not yet trained in `work` and writes the Hugging Face folder `out`.

    `stage`: the last one, `stage1` (the retrieval model), `stage2` or `vqa`. `llm`: `opt` or `t5`; stage 1 needs none.
    `without_stage1`: stage 2 starts from a new Q-Former, the ablation of the paper (Li et al. 2023, section 4.1, figure 5).
    """
    torch.manual_seed(0)
    _, qformer_tokenizer = text.tokenizers(work)
    if _full(plan):
        _side_by_side(work, plan, None if stage == "stage1" else llm)
    eye = vision.pretrain(Phase("vision", work, plan.vision)).requires_grad_(False).eval()
    data = SceneFeatures(eye, plan.n_scenes, work)
    held_out = SceneFeatures(eye, min(400, plan.n_scenes), work, "held-out")

    torch.manual_seed(1)
    q = QFormer(qformer_config(len(qformer_tokenizer), eye.config.hidden_size))
    if not without_stage1:
        with frozen(eye, "vision model"):
            _train_stage1(work, plan, stage1.Stage1(q, qformer_tokenizer), data, held_out)
    if stage == "stage1":
        checkpoint.write_stage1(out, eye, q, qformer_tokenizer)
        return

    speaker, tokenizer = _speaker(work, plan, llm)
    torch.manual_seed(2)
    second = stage2.Stage2(q, speaker.texts)
    # The decoder of OPT reads many texts behind one soft prompt, the encoder of T5 each text beside its own.
    n_captions, n_questions, share = (4, 6, 1) if llm == "opt" else (2, 6, 2)
    schedule = plan.stage2 if llm == "opt" else plan.stage2_t5
    with frozen(eye, "vision model"):
        stage2.train(
            Phase(f"stage2{_SUFFIX[llm]}{'_alone' * without_stage1}", work, schedule),
            second,
            stage2.scene_batches(data, speaker, plan.batch_size // share, n_captions, n_questions),
            (lambda: stage2.gate(second, speaker, held_out)) if _full(plan) else None,
        )
    if stage == "stage2":
        checkpoint.write_stage2(out, eye, second, tokenizer, small=True)
        return

    torch.manual_seed(3)
    third = vqa.Vqa(eye, q, second, plan.vqa_side)
    asker = vqa.Asker(speaker, qformer_tokenizer, plan.vqa_side)
    vqa.train(Phase(f"vqa{_SUFFIX[llm]}", work, plan.vqa), third, asker, plan.vqa_batch_size, _full(plan))
    checkpoint.write_vqa(out, third, tokenizer, qformer_tokenizer)


def _train_stage1(work: Path, plan: Plan, stage: stage1.Stage1, data: SceneFeatures, held_out: SceneFeatures) -> None:
    """Captions with one wrong word come in once drawn negatives are told."""

    def batch(step: int) -> Pairs:
        if step < plan.matching:
            return data.pairs(step, plan.batch_size, edited=0.0 if step < plan.matching // 3 else 0.5)
        return data.pairs(step, plan.batch_size, edited=0.5, more=6, matched=0.25)

    stage1.train(Phase("stage1", work, plan.stage1), stage, batch, held_out if _full(plan) else None)


def _speaker(work: Path, plan: Plan, llm: str) -> tuple[Speaker, PreTrainedTokenizerFast]:
    """The frozen language model with its tokenizer."""
    if llm == "opt":
        tokenizer = text.tokenizers(work)[0]
        phase = Phase("language", work, plan.language, log_every=25)
        mouth = language.pretrain(phase, tokenizer).requires_grad_(False).eval()
        return language.speaker(language.Texts(mouth), text.Packer(tokenizer)), tokenizer
    tokenizer = seq2seq.tokenizer(work)
    phase = Phase("language_t5", work, plan.language_t5, log_every=25)
    model = seq2seq.pretrain(phase, tokenizer).requires_grad_(False).eval()
    return seq2seq.speaker(seq2seq.Texts(model), seq2seq.Batcher(tokenizer)), tokenizer


def _side_by_side(work: Path, plan: Plan, llm: str | None) -> None:
    """Pre-trains ViT and language model at the same time; neither needs the other, and small models use many cores badly."""
    models = [None, llm] if llm else [None]
    threads = max(1, torch.get_num_threads() // len(models))
    with ProcessPoolExecutor(len(models), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(_pretrain, model, work, plan, threads) for model in models]:
            done.result()


def _pretrain(llm: str | None, work: Path, plan: Plan, threads: int) -> None:
    """The language model, or without one the ViT."""
    torch.set_num_threads(threads)
    if llm:
        _speaker(work, plan, llm)
    else:
        vision.pretrain(Phase("vision", work, plan.vision))


def _full(plan: Plan) -> bool:
    return plan.n_scenes >= 400
