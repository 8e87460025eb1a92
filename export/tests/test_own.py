"""Training on own pictures: from the data to folders, losses against references, and two processes against one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import distributed
from transformers import Blip2ForConditionalGeneration

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.graphs.precision import EXACT
from blip2_export.scenes import dataset
from blip2_export.train.own import language, stages
from blip2_export.train.own.base import open_base
from blip2_export.train.own.batches import Sizes
from blip2_export.train.own.loop import Schedule
from blip2_export.train.own.stage1 import Captions, Stage1, drawn, smoothed
from blip2_export.train.own.start import Start, qformer, tokenizer

FAMILIES = {"opt": "odd-3", "t5": "t5"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for family, shape in FAMILIES.items():
        random_checkpoint.write(folder / family, shape, seed=4)
    dataset.write_dataset(folder / "data", 24, 0, 64)
    return folder


def setup(folder: Path, family: str, work: str, **more: Any) -> stages.Setup:
    places = {"data": [(folder / "data", 1.0)], "base": folder / family, "work": folder / work}
    usual = {"schedule": Schedule(4, warmup=1), "sizes": Sizes(4), "workers": 0, "measure_every": 2, "held_out": 0.2}
    usual |= {"samples": 0}
    return stages.Setup(**{**places, **usual, **more})


def test_both_stages_give_folders_that_convert(folder: Path) -> None:
    """Of Flan-T5; those of OPT are converted, verified and evaluated by one command in test_own_command.py."""
    said = setup(folder, "t5", "work", n_queries=5)
    stages.train_stage1(said, folder / "first")
    stages.train_stage2(said, folder / "second")
    before = Blip2ForConditionalGeneration.from_pretrained(folder / "t5", dtype=torch.float32)
    after = Blip2ForConditionalGeneration.from_pretrained(folder / "second", dtype=torch.float32)
    for part in ("vision_model", "language_model"):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert all(torch.equal(old[name], new[name]) for name in old), part
    assert after.query_tokens.shape[1] == 5 and not torch.equal(before.query_tokens[:, :5], after.query_tokens)
    for stage in ("first", "second"):
        convert(folder / stage, folder / f"bundle-{stage}", Choices("own", golden=False, precisions=EXACT))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_texts_is_that_of_the_reference(folder: Path, family: str) -> None:
    """`transformers` computes it from ids that hold the pictures' places, one text at a time."""
    base = open_base(folder / family)
    speaks = language.of_family(family, base.model.language_model, base.tokenizer())
    rows = [
        language.Text(0, "a photo of", "a red ring"),
        language.Text(1, "a photo of", "two large blue stars near it"),
    ]
    texts = speaks.texts(rows)
    side = base.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = base.vision(pixels).last_hidden_state
        asked = base.model.query_tokens.expand(2, -1, -1)
        hidden = base.model.qformer(query_embeds=asked, encoder_hidden_states=seen).last_hidden_state
        mine = float(language.loss(speaks, base.model.language_projection(hidden), texts) / texts.mass)
        total, n = 0.0, 0
        for row in range(2):
            read = texts.ids[row, texts.mask[row].bool()]
            places = torch.full((base.config.num_query_tokens,), base.config.image_token_index)
            ids = torch.cat([places, read])[None]
            labels = texts.labels[row, texts.labels[row] != -100]
            if family == "opt":
                labels = torch.cat([torch.full((ids.shape[1] - len(labels),), -100), labels])
            found = base.model(pixel_values=pixels[row : row + 1], input_ids=ids, labels=labels[None])
            count = int((labels != -100).sum())
            total, n = total + float(found.loss) * count, n + count
    assert mine == pytest.approx(total / n, rel=1e-5)


# Several processes


def model(folder: Path, work: Path) -> Stage1:
    base = open_base(folder / "opt")
    words = tokenizer(work, Start(), ["a red ring", "a blue star", "two boxes", "a small green disc near it"] * 9)
    made = Stage1(qformer(base, Start(), len(words)), words, max_length=8)
    # With noise, processes would each have their own.
    for part in made.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    return made.double()


def batch(made: Stage1, rows: slice) -> Captions:
    torch.manual_seed(5)
    n, width = 6, made.qformer.cfg.encoder_hidden_size
    captions = ["a red ring", "a blue star", "two boxes", "a red ring near it", "a small green disc", "it"]
    ids, mask = made.encode(captions)
    picture = torch.tensor([0, 1, 2, 3, 1, 5])
    parts = (torch.randn(n, 9, width, dtype=torch.float64), ids, mask, picture, torch.rand(n, 2))
    return Captions(*(part[rows] for part in parts))


def gradients(made: Stage1, rows: slice, trained: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    losses = trained(batch(made, rows))
    total = losses["itc"] + losses["itm"] + losses["itg"]
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def _process(rank: int, port: int, folder: Path, work: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    made = model(folder, work)
    whole = torch.nn.parallel.DistributedDataParallel(made, find_unused_parameters=False)
    loss, found = gradients(made, slice(3 * rank, 3 * rank + 3), whole)
    torch.save((loss, found), work / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_learn_what_one_does_with_twice_the_batch(folder: Path, tmp_path: Path) -> None:
    made = model(folder, tmp_path)
    loss, wanted = gradients(made, slice(0, 6), made)
    processes.two(_process, folder, tmp_path)
    (first, one), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (first + second) / 2 == pytest.approx(loss, rel=1e-6)
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        assert torch.equal(one[name], other[name]), name
        assert float((one[name] - grad).abs().max()) <= 1e-6 * scale, name


def test_negatives_are_drawn_by_weight_and_never_true() -> None:
    weights_ = torch.tensor([[0.0, 1.0, 3.0], [0.5, 0.0, 0.5], [0.0, 0.0, 0.0]])
    chances = torch.linspace(0, 1, 4001)[:-1]
    found = torch.stack([drawn(weights_, chance.expand(3)) for chance in chances])
    share = (found[:, 0] == 2).float().mean()
    assert share == pytest.approx(0.75, abs=1e-3) and not (found[:, 0] == 0).any() and not (found[:, 1] == 1).any()


def test_smoothing_is_that_of_pytorch_where_every_caption_is_a_candidate() -> None:
    logits, target = torch.randn(4, 4, dtype=torch.float64), torch.arange(4)
    wanted = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    assert smoothed(logits, target, torch.ones(4, 4, dtype=torch.bool)) == pytest.approx(float(wanted), rel=1e-6)
