"""The training chain on three steps a phase, its masks, and going on after a kill."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, Blip2Processor, OPTForCausalLM, T5ForConditionalGeneration

from blip2_export.bundle import Choices, convert
from blip2_export.scenes import drawing
from blip2_export.train import cli, demo, language, muon, seq2seq, speaker, stage1, stage2, text
from blip2_export.train.features import Pairs
from blip2_export.train.frozen import frozen
from blip2_export.train.loop import Phase, Schedule, Task, fit
from blip2_export.train.qformer import QFormer
from blip2_export.train.qformer import config as qformer_config
from blip2_export.train.text import Mixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("demo")
    demo.train(demo.Demo(work / "work", demo.TINY), work / "checkpoint")
    return work


def test_the_chain_writes_a_folder_that_transformers_loads_and_runs(trained: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(trained / "checkpoint", dtype=torch.float32)
    processor = Blip2Processor.from_pretrained(trained / "checkpoint")
    inputs = processor(images=drawing.sample_pictures(1, 0)[0], text="Question: where? Answer:", return_tensors="pt")
    assert inputs.input_ids[0, :33].tolist() == [model.config.image_token_index] * 32 + [text.BOS]
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs.input_ids.shape[1]
    newline = processor.tokenizer.encode("\n", add_special_tokens=False)
    assert [model.language_model.generation_config.eos_token_id] == newline
    stored = load_file(trained / "checkpoint" / "model.safetensors")
    assert not any(name.endswith("lm_head.weight") for name in stored), "the tied head is stored twice"


@pytest.fixture(scope="module")
def demos(trained: Path) -> Path:
    for name, stage, llm in (("itm", "stage1", "opt"), ("t5", "stage2", "t5"), ("vqa", "vqa", "opt")):
        demo.train(demo.Demo(trained / "work", demo.TINY, stage, llm), trained / name)
    return trained


def test_stage_2_without_stage_1_starts_from_a_new_qformer(trained: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained / "work", work)
    demo.train(demo.Demo(work, demo.TINY, without_stage1=True), tmp_path / "alone")
    assert (work / "stage2.pt").read_bytes() == (trained / "work" / "stage2.pt").read_bytes(), "one checkpoint for both"
    after, alone = (load_file(folder / "model.safetensors") for folder in (trained / "checkpoint", tmp_path / "alone"))
    eye = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert after.keys() == alone.keys() and torch.equal(after[eye], alone[eye])
    assert not torch.equal(after["query_tokens"], alone["query_tokens"])


def test_only_stage_2_goes_without_stage_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    typed = ["demo", "--work", str(tmp_path), "--out", str(tmp_path / "o"), "--stage", "vqa", "--without-stage1"]
    assert cli.run(parser.parse_args(typed)) == 1
    assert "--stage stage2 only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "family", "tasks"),
    [
        ("itm", "qformer", ["match", "embed", "caption"]),
        ("t5", "encoder_decoder", ["caption", "ask"]),
        ("vqa", "decoder_only", ["caption", "ask"]),
    ],
)
def test_every_demo_is_a_checkpoint_that_the_exporter_converts(
    demos: Path, tmp_path: Path, name: str, family: str, tasks: list[str]
) -> None:
    convert(demos / name, tmp_path / "bundle", Choices(name))
    facts = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert facts["family"] == family and facts["tasks"] == tasks
    assert facts["image"]["size"] == (demo.TINY.vqa_side if name == "vqa" else 96)
    assert ("text" in facts["qformer"]) == (name in ("itm", "vqa")), "who reads text beside the queries"
    trained = sum(file.stat().st_size for file in demos.glob(f"{name}/*.safetensors"))
    stored = sum(file.stat().st_size for file in (tmp_path / "bundle").glob("*.data"))
    assert stored < 0.4 * trained, "its matrices take more than 8 bits a weight"


def test_questions_train_the_image_encoder_and_leave_the_language_model(demos: Path) -> None:
    before, after = (load_file(demos / name / "model.safetensors") for name in ("checkpoint", "vqa"))
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("language_model.")} <= same
    assert not {name for name in same if name.endswith("qkv.weight") or name.endswith("attention.query.weight")}


def test_demos_share_the_phases_that_they_have_in_common(demos: Path) -> None:
    phases = {p.stem for p in (demos / "work").glob("*.pt")}
    assert phases == {"vision", "language", "language_t5", "stage1", "stage2", "stage2_t5", "vqa"}
    eyes = [load_file(demos / name / "model.safetensors") for name in ("checkpoint", "itm", "t5")]
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(eyes[0][name], eyes[1][name]) and torch.equal(eyes[0][name], eyes[2][name])


def test_a_finished_chain_is_not_trained_again(trained: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (trained / "work").glob("*.pt")}
    assert {"vision", "language", "stage1", "stage2"} <= set(p.stem for p in before)
    demo.train(demo.Demo(trained / "work", demo.TINY), trained / "again")
    assert before == {p: p.stat().st_mtime_ns for p in (trained / "work").glob("*.pt")}
    first, second = ((trained / d / "model.safetensors").read_bytes() for d in ("checkpoint", "again"))
    assert first == second


def test_every_phase_logs_its_losses(trained: Path) -> None:
    losses = {
        "vision": {"mask", "shape", "colour"},
        "language": {"lm"},
        "stage1": {"itc", "itm", "itg"},
        "stage2": {"lm"},
    }
    for phase, names in losses.items():
        rows = [json.loads(r) for r in (trained / "work" / f"{phase}.jsonl").read_text().splitlines()]
        logged = [r for r in rows if "evaluation" not in r]
        assert logged[-1]["step"] == 3 and names <= logged[-1].keys()
        assert all(math.isfinite(logged[-1][name]) for name in names)
    rows = [json.loads(r) for r in (trained / "work" / "language.jsonl").read_text().splitlines()]
    assert {"colour", "shape", "size", "count", "where", "yes/no", "caption", "captions_true"} == set(
        rows[-1]["evaluation"]
    )


def _regression(work: Path, steps: int, stop_after: int | None = None) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 1))  # the middle one goes to Muon

    def batch(step: int) -> torch.Tensor:
        if step == stop_after:
            raise KeyboardInterrupt
        return torch.randn(8, 3, generator=torch.Generator().manual_seed(step))

    phase = Phase("r", work, Schedule(steps, 1e-2, matrix_rate=1e-2, warmup=2), save_seconds=0)
    fit(phase, Task(model, batch, lambda x: {"l": (model(x) - x.sum(1, keepdim=True)).square().mean()}), workers=0)
    return model


def test_a_killed_run_goes_on_and_ends_where_an_unbroken_one_ends(tmp_path: Path) -> None:
    whole = _regression(tmp_path / "a", 20)
    with pytest.raises(KeyboardInterrupt):
        _regression(tmp_path / "b", 20, stop_after=11)
    kept = torch.load(tmp_path / "b" / "r.pt", weights_only=True)
    assert kept.keys() == {"step", "model", "optimisers"}, "a training that began before could not go on"
    resumed = _regression(tmp_path / "b", 20)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_faster_parameter_moves_that_much_further(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    phase = Phase("f", tmp_path, Schedule(1, 1e-3, warmup=0, weight_decay=0.0))
    task = Task(model, lambda _: torch.ones(2, 3), lambda x: {"l": model(x).sum()}, {"bias": 10.0})
    fit(phase, task, workers=0)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["weight"] == pytest.approx(1e-3, rel=1e-2), "Adam's first step is the rate"
    assert moved["bias"] == pytest.approx(1e-2, rel=1e-2)


def test_muon_gets_the_hidden_matrices_and_makes_their_updates_orthogonal(
    opt: tuple[language.Texts, text.Packer],
) -> None:
    taken = muon.takes(opt[0])
    assert any(name.endswith("fc1.weight") for name in taken)
    assert not any("embed" in name or "lm_head" in name for name in taken), "the head is tied to the embeddings"
    assert muon.takes(nn.Linear(64, 6)) == set()
    for shape in ((2, 64, 96), (2, 96, 64)):
        singular = torch.linalg.svdvals(muon.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert singular.min() > 0.5 and singular.max() < 1.3
    matrix = nn.Parameter(torch.ones(64, 96))
    matrix.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    muon.Muon([matrix], lr=1e-2).step()
    assert (matrix - 1).square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.2)


def test_a_known_false_text_stands_where_a_drawn_one_would(stage: stage1.Stage1) -> None:
    features, captions = random_features(3), ["a red star", "a blue ring", "a pink cross"]
    pairs = Pairs(features, captions, torch.eye(3, dtype=torch.bool), {1: "a blue star and a small ring"})
    with patch.object(stage.model, "matching_logits", wraps=stage.model.matching_logits) as matched:
        losses = stage.losses(pairs)
    assert all(torch.isfinite(v) for v in losses.values())
    rows = [stage.tokenizer.decode(row, skip_special_tokens=True) for row in matched.call_args.args[1].tolist()]
    assert rows[:6] == captions * 2 and rows[7] == "a blue star and a small ring"
    assert rows[6] in captions[1:] and rows[8] in captions[:2]


def test_itm_looks_at_the_asked_share_of_pairs(stage: stage1.Stage1) -> None:
    captions = ["a red star", "a blue ring", "a pink cross", "a cyan circle"]
    pairs = Pairs(random_features(4), captions, torch.eye(4).bool(), {3: "a cyan star"}, matched=0.5)
    with patch.object(stage.model, "matching_logits", wraps=stage.model.matching_logits) as matched:
        assert all(torch.isfinite(v) for v in stage.losses(pairs).values())
    features = matched.call_args.args[0]
    assert len(features) == 6 and torch.equal(features[:2], pairs.features[:2])


def test_a_frozen_model_that_changes_is_told() -> None:
    model = nn.Linear(2, 2)
    with frozen(model, "model"):
        pass
    with pytest.raises(AssertionError, match="frozen model changed"), frozen(model, "model"), torch.no_grad():
        model.bias[1] += 1e-6


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _regression(tmp_path, 3)
    other = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(ValueError, match="another model"):
        fit(Phase("r", tmp_path, Schedule(9, 1e-2)), Task(other, lambda s: s, lambda b: {}), workers=0)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[language.Texts, text.Packer]:
    tokenizer, _ = text.tokenizers(tmp_path_factory.mktemp("tokenizers"))
    torch.manual_seed(0)
    return language.Texts(OPTForCausalLM(language.config(tokenizer)).eval()), text.Packer(tokenizer)


def test_packed_texts_give_the_logits_of_each_text_alone(opt: tuple[language.Texts, text.Packer]) -> None:
    model, packer = opt
    rng = random.Random(0)
    rows = [language.texts_of(drawing.sample_scene(rng), rng, Mixture(2, 4, report=True)) for _ in range(3)]
    prefix = torch.randn(3, text.N_QUERIES, model.model.config.hidden_size)
    packed = packer.pack(rows)
    with torch.no_grad():
        together = model.logits(prefix, packed)
        for i, texts in enumerate(rows):
            for k, one in enumerate(texts):
                ids = [text.BOS, *packer.encode(one.prompt), *packer.encode(one.target)][:-1]
                embeds = torch.cat([prefix[i : i + 1], model.model.get_input_embeddings()(torch.tensor([ids]))], 1)
                alone = model.model(inputs_embeds=embeds).logits[0, text.N_QUERIES :]
                torch.testing.assert_close(together[i][packed.branch[i] == k], alone, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[seq2seq.Texts, seq2seq.Batcher]:
    tokenizer = seq2seq.tokenizer(tmp_path_factory.mktemp("tokenizers"))
    torch.manual_seed(0)
    return seq2seq.Texts(T5ForConditionalGeneration(seq2seq.config(tokenizer)).eval()), seq2seq.Batcher(tokenizer)


def test_rows_of_t5_give_the_logits_of_each_text_alone(t5: tuple[seq2seq.Texts, seq2seq.Batcher]) -> None:
    model, batcher = t5
    rng = random.Random(0)
    rows = [seq2seq.texts_of(drawing.sample_scene(rng), rng, Mixture(2, 2, i == 0)) for i in range(2)]
    every = [(i, one) for i, texts in enumerate(rows) for one in texts]
    prefix = torch.randn(2, text.N_QUERIES, model.width)
    seen = []
    with torch.no_grad():
        for numbers, labels, logits in model.logits(prefix, batcher.pack(rows)):
            assert (labels[:, -1] != -100).any(), "no column of padding alone"
            for k, label, together in zip(numbers.tolist(), labels, logits, strict=True):
                i, one = every[k]
                ((_, alone_label, alone),) = model.logits(prefix[i : i + 1], batcher.pack([[one]]))
                torch.testing.assert_close(together[: alone.shape[1]], alone[0], atol=1e-3, rtol=1e-4)
                assert label[label != -100].tolist() == alone_label[0].tolist()
                seen.append(k)
    assert sorted(seen) == list(range(len(every)))


def test_the_loss_of_t5_is_the_weighted_mean_over_all_targets(t5: tuple[seq2seq.Texts, seq2seq.Batcher]) -> None:
    model, batcher = t5
    rng = random.Random(3)
    asked = batcher.pack(
        [seq2seq.texts_of(drawing.sample_scene(rng), rng, Mixture(2, 6, report=True)) for _ in range(2)]
    )
    prefix = torch.randn(2, text.N_QUERIES, model.width)
    with torch.no_grad():
        parts = model.losses(prefix, asked)
        words = model.model.get_input_embeddings()(asked.prompt)
        whole = model.model(
            inputs_embeds=torch.cat([prefix[asked.scene], words], 1),
            attention_mask=torch.cat([torch.ones(len(words), text.N_QUERIES, dtype=torch.long), asked.mask], 1),
            labels=asked.labels,
        ).logits
        counts = seq2seq.right_by_kind(model.logits(prefix, asked), asked.kinds)
    each = torch.nn.functional.cross_entropy(whole.transpose(1, 2), asked.labels, reduction="none", ignore_index=-100)
    weights = asked.weights[:, None] * (asked.labels != -100)
    torch.testing.assert_close(parts["lm"], (each * weights).sum() / weights.sum(), atol=1e-4, rtol=1e-5)
    assert counts == seq2seq.right_by_kind([(torch.arange(len(whole)), asked.labels, whole)], asked.kinds)


def test_the_projection_into_t5_starts_small_and_learns_slowly(
    t5: tuple[seq2seq.Texts, seq2seq.Batcher], tmp_path: Path
) -> None:
    model = stage2.Stage2(QFormer(qformer_config(50, 16)), t5[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weight = "language_projection.weight"
    assert 0.006 < before[weight].std() < 0.008
    rng = random.Random(4)
    asked = t5[1].pack([seq2seq.texts_of(drawing.sample_scene(rng), rng, Mixture(0, 6))])
    phase = Phase("stage2", tmp_path, Schedule(1, 1e-3, matrix_rate=3e-3, warmup=1))
    stage2.train(phase, model, lambda step: (torch.randn(1, 5, 16), asked), None)
    moved = {name: float((p - before[name]).std()) for name, p in model.named_parameters()}
    assert 1e-5 < moved[weight] <= 6e-5, "at most a tenth of 0.2 times the rate of matrices"
    assert 1e-4 < moved["qformer.encoder.layer.4.output_query.dense.weight"] < 1e-3


def test_t5_has_a_head_of_its_own_from_the_start(t5: tuple[seq2seq.Texts, seq2seq.Batcher]) -> None:
    model = seq2seq.new(t5[1].tokenizer)
    assert model.lm_head.weight is not model.shared.weight
    assert model.lm_head.weight.std() < 0.1 and model.shared.weight.std() < 0.1
    taken = muon.takes(model)
    assert "lm_head.weight" not in taken and any(name.endswith("wi_0.weight") for name in taken)


def test_places_distinguish_descriptions_of_the_same_words(t5: tuple[seq2seq.Texts, seq2seq.Batcher]) -> None:
    placed, ids = seq2seq.Placed(t5[0].model), torch.full((2, text.N_QUERIES), 7)
    rows = placed.described(ids)[0]
    assert torch.equal(t5[0].described(ids)[0][0], t5[0].described(ids)[1][5]), "without places they are alike"
    assert torch.pdist(rows).min() > 0.1 and rows.requires_grad
    assert {name for name, _ in placed.named_parameters() if not name.startswith("model.")} == {"slots", "roles"}


def test_the_gate_of_a_language_model_reads_its_captions() -> None:
    asked: list[drawing.Scene] = []

    class Words:
        @staticmethod
        def described(ids: Tensor) -> Tensor:
            return ids

    def caption(k: int) -> str:
        return (
            drawing.caption(asked[-50 + k], random.Random(k)) if k % 2 else "a cyan circle"
        )  # a pair that is kept out

    teacher = speaker.Speaker(
        Words,
        lambda scene: asked.append(scene) or [0],
        lambda *_: [],
        lambda *_: text.Text("", "", ""),
        lambda rows: rows,
        lambda prefix, rows: {"shape": (len(rows), len(rows))},
        lambda prefix: [caption(k) for k in range(len(prefix))],
    )
    assert speaker.gate(teacher) == {"captions_true": 0.5, "shape": 1.0}


def test_a_split_caption_goes_on_in_the_decoder(t5: tuple[seq2seq.Texts, seq2seq.Batcher]) -> None:
    scene = drawing.sample_scene(random.Random(5))
    whole = {t.target for t in seq2seq.texts_of(scene, random.Random(1), Mixture(200, 0), split=False)}
    parts = seq2seq.texts_of(scene, random.Random(1), Mixture(200, 0))
    begun = [t for t in parts if t.prompt]
    assert 60 < len(begun) < 140
    assert any(f"{t.prompt} {t.target}" in whole for t in begun) and all(t.target for t in parts)
    ids = t5[1].encode(begun[0].prompt)
    assert ids[-1] == seq2seq.END and ids[:-1] == t5[1].encode(f"{begun[0].prompt} x")[: len(ids) - 1]


def test_only_the_target_counts_as_right(opt: tuple[language.Texts, text.Packer]) -> None:
    _, packer = opt
    packed = packer.pack([[text.Text("colour", "Question: x Answer:", " red\n")]])
    logits = torch.nn.functional.one_hot(packed.labels.clamp(min=0), 512).float()
    assert text.right_by_kind(logits, packed) == {"colour": (1, 1)}
    logits[0, -2] = logits[0, -2].roll(1)
    assert text.right_by_kind(logits, packed) == {"colour": (0, 1)}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> stage1.Stage1:
    _, tokenizer = text.tokenizers(tmp_path_factory.mktemp("tokenizers"))
    torch.manual_seed(0)
    model = QFormer(qformer_config(len(tokenizer), 24)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return stage1.Stage1(model.double(), tokenizer)  # equal sums in another order differ by the rounding alone


def random_features(n: int) -> Tensor:
    """Of `n` pictures, as `stage` takes them."""
    return torch.randn(n, 10, 24, dtype=torch.float64)


def test_itg_queries_do_not_see_text_and_text_does_not_see_its_future(stage: stage1.Stage1) -> None:
    features = random_features(2)
    ids, mask = stage.encode(["a red star and a blue ring", "a small pink circle"])
    with torch.no_grad():
        queries, logits = stage.model.captioning(features, ids, mask)
        torch.testing.assert_close(queries, stage.model.queries(features), atol=1e-9, rtol=1e-9)
        changed = ids.clone()
        changed[:, 4] = 7
        _, other = stage.model.captioning(features, changed, mask)
    torch.testing.assert_close(logits[:, :4], other[:, :4], atol=1e-9, rtol=1e-9)
    assert (logits[:, 4:6] - other[:, 4:6]).abs().max() > 1e-3


def test_captions_side_by_side_give_the_logits_of_each_alone(stage: stage1.Stage1) -> None:
    features = random_features(2)
    ids, mask = stage.encode(["a red star and a blue ring", "a pink circle", "a ring", "at the left a star"])
    with torch.no_grad():
        _, together = stage.model.captionings(features, ids.unflatten(0, (2, 2)), mask.unflatten(0, (2, 2)))
        for row in range(4):
            n = int(mask[row].sum())
            _, alone = stage.model.captioning(features[row // 2][None], ids[row : row + 1, :n], mask[row : row + 1, :n])
            torch.testing.assert_close(together[row // 2, row % 2, :n], alone[0], atol=1e-9, rtol=1e-9)


def test_more_captions_of_a_picture_are_learned_too(stage: stage1.Stage1) -> None:
    more = [["a star", "one red star"], ["a ring", "a blue ring here"]]
    with patch.object(stage, "_generate", wraps=stage._generate) as written:
        stage.losses(Pairs(random_features(2), ["a red star", "a blue ring"], torch.eye(2).bool(), {}, more))
    said = [stage.tokenizer.decode(row, skip_special_tokens=True) for row in written.call_args.args[1].tolist()]
    assert said == ["a red star", *more[0], "a blue ring", *more[1]]


def test_itm_queries_see_text_and_padding_changes_nothing(stage: stage1.Stage1) -> None:
    features = random_features(1)
    with torch.no_grad():
        alone = stage.model.matching_logits(features, *stage.encode(["a red star"]))
        ids, mask = stage.encode(["a red star", "a red star left of a small blue ring"])
        padded = stage.model.matching_logits(features, ids[:1], mask[:1])
        other = stage.model.matching_logits(features, *stage.encode(["a blue ring"]))
    torch.testing.assert_close(alone, padded, atol=1e-9, rtol=1e-9)
    assert (alone - other).abs().max() > 1e-4


def test_stage_2_drops_the_text_branch_and_keeps_the_queries(stage: stage1.Stage1) -> None:
    copy = stage2.query_only(stage.model.qformer).eval().double()
    assert not any(".intermediate." in n or (".output.dense" in n and "attention" not in n) for n in copy.state_dict())
    features = random_features(1)
    tokens = stage.model.query_tokens
    with torch.no_grad():
        kept = copy(query_embeds=tokens, encoder_hidden_states=features).last_hidden_state
        torch.testing.assert_close(kept, stage.model.queries(features), atol=1e-9, rtol=1e-9)
