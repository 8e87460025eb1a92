"""Training on own data around every base, on the hardware that there is: what it starts from, what it leaves, what it spares."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.check.random_retrieval import Lavis, write_lavis
from blip2_export.read.adapter import open_folder
from blip2_export.read.lavis import Parts
from blip2_export.run.generation import Graphs
from blip2_export.scenes import dataset
from blip2_export.train.frozen import fingerprint
from blip2_export.train.own import folders, hardware, language, loop, lora, questions, stages, start
from blip2_export.train.own.base import open_base
from blip2_export.train.own.batches import Sizes
from blip2_export.train.own.hardware import Precision
from blip2_export.train.own.language import Text
from blip2_export.train.own.loop import Fit, Run, Schedule, Task
from blip2_export.train.own.lora import Lora
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage2 import Stage2, Written

LAVIS = {
    "lavis-opt": Lavis(kind="opt"),
    "lavis-t5-clip": Lavis(kind="t5", vision="clip", vision_width=64, image_size=42),
    "lavis-stage1": Lavis(),
}
PLAIN: dict[str, tuple[Any, torch.dtype]] = {
    "opt": ("odd-3", torch.float32),
    "t5": ("t5", torch.float32),
    "opt-fp16": ("odd-1", torch.float16),
    "t5-bf16": ("t5-odd-1", torch.bfloat16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of every kind, and a dozen pictures."""
    folder = tmp_path_factory.mktemp("models")
    for name, (shape, dtype) in PLAIN.items():
        random_checkpoint.write(folder / name, shape, 4, dtype, shard_bytes=2 << 30 if name != "t5-bf16" else 40_000)
    assert len(list((folder / "t5-bf16").glob("*.safetensors"))) > 2, "sharded"
    random_retrieval.write(folder / "retrieval", "itm-odd", 4, torch.float16)
    for name, model in LAVIS.items():
        write_lavis(folder / name, model, 4)
    _as_bin(folder / "opt", folder / "opt-bin")
    dataset.write_dataset(folder / "data", 12, 0, 32)
    return folder


def _as_bin(source: Path, out: Path) -> None:
    """The same base in bfloat16, in PyTorch's own format."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    held = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    torch.save(held, out / "pytorch_model.bin")


def place(folder: Path, name: str) -> tuple[Path, Parts]:
    """What --base and its parts are."""
    if name not in LAVIS:
        return folder / name, Parts()
    parts = (folder / name / part for part in ("vision.pth", "llm", "bert"))
    return folder / name / "model.pth", Parts(*(part if part.exists() else None for part in parts))


def setup(folder: Path, name: str, work: Path, **more: Any) -> stages.Setup:
    base, parts = place(folder, name)
    usual = {"schedule": Schedule(2, learning_rate=1e-2, warmup=0), "sizes": Sizes(4), "workers": 0, "held_out": 0.3}
    usual |= {"samples": 0, "measure_every": 2, "parts": parts}
    return stages.Setup(**{"data": [(folder / "data", 1.0)], "base": base, "work": work, **usual, **more})


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


# Bases


@pytest.mark.parametrize("name", ["t5-bf16", "opt-fp16", "opt-bin", "lavis-opt", "lavis-t5-clip"])
def test_stage_2_goes_around_every_base(folder: Path, tmp_path: Path, name: str) -> None:
    """What is frozen is written as it is stored; what is trained is float32; `transformers` and the exporter take it."""
    said = setup(folder, name, tmp_path / "work", qformer=place(folder, name)[0])
    stages.train_stage2(said, tmp_path / "out")
    base, out = open_base(said.base, said.parts), stored(tmp_path / "out")
    kept = [key for key in base.checkpoint.names() if key.startswith(("vision_model.", "language_model."))]
    assert len(kept) > 20
    for key in kept:
        there = base.tensor(key)
        assert out[key].dtype == there.dtype and torch.equal(out[key], there), key
    assert {value.dtype for key, value in out.items() if key not in kept} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    model, loading = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    missing = [key for key in loading["missing_keys"] if "clip" not in name or not key.endswith("patch_embedding.bias")]
    assert not missing
    start_ = base.model.qformer.state_dict()
    moved = [key for key, value in model.qformer.state_dict().items() if not torch.equal(value, start_[key])]
    assert len(moved) == len(start_), "it began with the base's own and learnt"
    if name in ("lavis-t5-clip", "opt-fp16"):
        convert(tmp_path / "out", tmp_path / "bundle", Choices("own", golden=False))


@pytest.mark.parametrize("name", ["retrieval", "lavis-stage1", "lavis-t5-clip", "t5-bf16"])
def test_stage_1_goes_around_every_base(folder: Path, tmp_path: Path, name: str) -> None:
    said = setup(folder, name, tmp_path / "work", n_queries=7)
    stages.train_stage1(said, tmp_path / "out")
    base, out = open_base(said.base, said.parts), stored(tmp_path / "out")
    assert out["query_tokens"].shape[1] == 7
    for key in base.checkpoint.names():
        if key.startswith("vision_model."):
            assert torch.equal(out[key], base.tensor(key)), key
    Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out")
    if "lavis" in name:
        convert(tmp_path / "out", tmp_path / "bundle", Choices("own", golden=False))


def test_an_image_encoder_at_another_size_is_that_of_the_exporter(folder: Path, tmp_path: Path) -> None:
    """CLIP's: its norm in front of the blocks, its grid with aligned corners, the last norm's own epsilon."""
    source, parts = place(folder, "lavis-t5-clip")
    base, pixels = open_base(source, parts), torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    eye = base.eye(70)
    assert not eye.embeddings.patch_embedding.bias.requires_grad
    assert eye.pre_layernorm.weight.requires_grad and eye.embeddings.position_embedding.requires_grad
    convert(source, tmp_path / "b", Choices("x", golden=False, image_size=70, parts=parts))
    wanted = Graphs(tmp_path / "b").features(pixels.numpy())
    with torch.no_grad():
        found = eye.eval()(pixels).last_hidden_state.numpy()
    assert abs(found - wanted).max() <= 1e-4 * abs(wanted).max()


def test_queries_are_wider_than_narrow_embeddings_as_in_transformers(folder: Path, tmp_path: Path) -> None:
    """Of OPT-350M's kind, whose embeddings are projected."""
    random_checkpoint.write(tmp_path / "narrow", "odd-2", 4)
    base = open_base(tmp_path / "narrow")
    speaks = language.of_family("opt", base.model.language_model, base.tokenizer())
    model = Stage2(base.model.qformer, base.model.query_tokens, speaks).eval()
    model.language_projection.load_state_dict(base.model.language_projection.state_dict())
    pixels, texts = (
        torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        speaks.texts([Text(0, "two", "dogs")]),
    )
    ids = torch.cat([torch.full((1, base.config.num_query_tokens), base.config.image_token_index), texts.ids], 1)
    labels = torch.cat([torch.full((1, ids.shape[1] - texts.labels.shape[1]), -100), texts.labels], 1)
    with torch.no_grad():
        found = float(model(Written(base.vision(pixels).last_hidden_state, texts))["lm"])
        wanted = float(base.model(pixel_values=pixels, input_ids=ids, labels=labels).loss)
    assert found == pytest.approx(wanted, rel=1e-5)
    stages.train_stage2(
        stages.Setup(
            **{
                **vars(setup(folder, "opt", tmp_path / "work")),
                "base": tmp_path / "narrow",
                "qformer": tmp_path / "narrow",
            }
        ),
        tmp_path / "out",
    )
    convert(tmp_path / "out", tmp_path / "bundle", Choices("own", golden=False))


def test_a_base_that_cannot_be_gone_around_is_named_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    random_checkpoint.write(tmp_path / "instruct", "instruct-t5", 1)
    random_checkpoint.write(tmp_path / "llama", "llama", 1)
    OPTForCausalLM(OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "plain"
    )
    (tmp_path / "picture.pth").write_bytes(b"no checkpoint")
    (tmp_path / "empty").mkdir()
    said = {
        "instruct": "training goes around BLIP-2, this is instructblip",
        "llama": "training goes around OPT and Flan-T5, its language model is llama",
        "plain": "model_type is `opt`; supported is BLIP-2",
        "picture.pth": "not a readable PyTorch file",
        "empty": "config.json is missing",
        "nowhere": "not a folder",
    }
    for name, sentence in said.items():
        with pytest.raises(DataError, match=sentence) as caught:
            open_base(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="has no language model"):
        stages.train_stage2(setup(folder, "retrieval", tmp_path / "work"), tmp_path / "out")
    with pytest.raises(DataError, match="Flan-T5 overflows fp16"):
        stages.train_stage2(setup(folder, "t5", tmp_path / "work", precision="fp16"), tmp_path / "out")


# The Q-Former's first weights


def test_a_q_former_starts_from_a_lavis_file(folder: Path, tmp_path: Path) -> None:
    """Around an encoder of another width, all but cross-attention fits; `[DEC]` is the last word, where the file has it."""
    file, bert = folder / "lavis-stage1" / "model.pth", folder / "lavis-stage1" / "bert"
    with pytest.raises(DataError, match="name the folder of its tokenizer with --bert"):
        start.open_qformer(file)
    begins = start.Start(qformer=start.open_qformer(file, bert))
    words = start.tokenizer(tmp_path / "work", begins, [])
    state = torch.load(file, weights_only=True)["model"]
    assert words.bos_token == "[DEC]" and words.bos_token_id == len(state["Qformer.cls.predictions.bias"]) - 1
    made = start.qformer(open_base(*place(folder, "lavis-opt")), begins, len(words))
    own = start._own_tensors(made)
    pairs = {
        "query_tokens": "query_tokens",
        "temperature": "temp",
        "head_bias": "Qformer.cls.predictions.bias",
        "transform.0.weight": "Qformer.cls.predictions.transform.dense.weight",
        "qformer.layernorm.bias": "Qformer.bert.embeddings.LayerNorm.bias",
        "embeddings.word_embeddings.weight": "Qformer.bert.embeddings.word_embeddings.weight",
        "qformer.encoder.layer.2.output_query.dense.weight": "Qformer.bert.encoder.layer.2.output_query.dense.weight",
        "itm_head.bias": "itm_head.bias",
    }
    for here, there in pairs.items():
        assert torch.equal(own[here], state[there].float()), here


def test_a_q_former_starts_from_another_with_fewer_queries(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """From a retrieval folder in half precision, whose tokenizer has a word more than its table."""
    base = open_base(folder / "opt")
    given = start.open_qformer(folder / "opt")
    made = start.qformer(base, start.Start(qformer=given, n_queries=40), 99)
    assert torch.equal(made.query_tokens[:, :32], base.model.query_tokens) and made.query_tokens.shape[1] == 40
    assert float(made.query_tokens[:, 32:].std()) > 0.01
    other = start.open_qformer(folder / "retrieval")
    words = start.tokenizer(tmp_path / "work", start.Start(qformer=other), [])
    rows = other.tensor("embeddings.word_embeddings.weight")
    assert len(words) == len(rows) + 1 and words.bos_token == "[DEC]"
    same = start.qformer(open_base(folder / "retrieval"), start.Start(qformer=other), len(words))
    assert torch.equal(same.embeddings.word_embeddings.weight[: len(rows)], torch.from_numpy(rows).float())
    assert same.query_tokens.shape[1] == 5 and not capsys.readouterr().err.count("warning")
    with pytest.raises(DataError, match="its Q-Former is 36 wide, that of the base 32"):
        start.qformer(base, start.Start(qformer=other), len(words))


def test_bert_gives_its_norm_and_its_head_and_others_are_refused(folder: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(vocab_size=50, **shape))
    for p in bert.parameters():
        nn.init.normal_(p)
    bert.half().save_pretrained(tmp_path / "bert")
    RobertaForMaskedLM(RobertaConfig(vocab_size=50, **shape)).save_pretrained(tmp_path / "roberta")
    BertForMaskedLM(BertConfig(vocab_size=50, **{**shape, "hidden_size": 36})).save_pretrained(tmp_path / "wide")
    base = open_base(folder / "opt")
    own, there = start._own_tensors(start.qformer(base, start.Start(tmp_path / "bert"), 51)), bert.float().state_dict()
    pairs = {
        "qformer.layernorm.weight": "bert.embeddings.LayerNorm.weight",
        "transform.0.weight": "cls.predictions.transform.dense.weight",
        "transform.2.bias": "cls.predictions.transform.LayerNorm.bias",
        "qformer.encoder.layer.1.output_query.LayerNorm.weight": "bert.encoder.layer.1.output.LayerNorm.weight",
        "qformer.encoder.layer.1.attention.attention.value.bias": "bert.encoder.layer.1.attention.self.value.bias",
    }
    for here, name in pairs.items():
        assert torch.equal(own[here], there[name]), here
    assert torch.equal(own["head_bias"][:50], there["cls.predictions.bias"])
    for name, said in {
        "roberta": "it is roberta, not BERT",
        "wide": "it is 36 wide",
        "opt": "it is blip-2, not BERT",
    }.items():
        with pytest.raises(DataError, match=said):
            start.qformer(base, start.Start((folder if name == "opt" else tmp_path) / name), 51)


# LoRA


@pytest.mark.parametrize(("name", "target"), [("opt-fp16", "language"), ("t5", "language"), ("opt-fp16", "qformer")])
def test_an_adapter_is_what_peft_loads_and_convert_merges(folder: Path, tmp_path: Path, name: str, target: str) -> None:
    """The base's own weights are as before; logits of the bundle are those of base and adapter in `peft`, within 2e-4.

    Within 1e-3 around a base in float16, to which what is merged is rounded.
    """
    by = "cider" if name == "t5" else "loss"
    said = setup(folder, name, tmp_path / "work", lora=Lora(target, 3, 6.0), better=by)
    stages.train_stage2(said, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "work" / "stage2.jsonl").read_text().splitlines()]
    looked = [row["held_out"] for row in rows if "held_out" in row]
    assert looked and all(("cider" in row) == ("bleu4" in row) == (by == "cider") for row in looked)
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    place_ = {"language": "language_model.", "qformer": "qformer."}[target]
    assert all(
        key.startswith(f"base_model.model.{place_}") and value.dtype == torch.float32 for key, value in tensors.items()
    )
    assert all(value.abs().max() > 0 for value in tensors.values()), "B begins at 0, and is learnt"
    model = Blip2ForConditionalGeneration.from_pretrained(folder / name, dtype=torch.float32).eval()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    held = {key.removeprefix("base_model.model."): value for key, value in adapted.state_dict().items()}
    for key, value in plain.items():
        assert torch.equal(
            value,
            held.get(key, held.get(key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))),
        ), key
    convert(folder / name, tmp_path / "bundle", Choices("x", golden=False, adapters=(tmp_path / "out",)))
    graphs = Graphs(tmp_path / "bundle")
    side, n = model.config.vision_config.image_size, model.config.num_query_tokens
    pixels, words = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)), [5, 6, 7]
    ids = torch.tensor([[model.config.image_token_index] * n + words] * 2)
    more = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if name == "t5" else {}
    with torch.no_grad():
        logits = [adapted(pixel_values=pixels, input_ids=ids, **more).logits[:, -1].numpy()]
        with adapted.disable_adapter():
            logits.append(adapted(pixel_values=pixels, input_ids=ids, **more).logits[:, -1].numpy())
    found, _ = graphs.greedy(graphs.queries(graphs.features(pixels.numpy())), [words] * 2, 1)
    scale = abs(logits[0]).max()
    for row in range(2):
        assert abs(found[row] - logits[0][row]).max() <= (1e-3 if "fp16" in name else 2e-4) * scale
    assert abs(logits[0] - logits[1]).max() > 1e-2 * scale, "the adapter does something"


def asking(folder: Path) -> Path:
    """Rows of questions about the pictures."""
    rows = [
        {"image": f"{i:06}.png", "question": f"how many at {i}?", "answers": ["two", "2", "a few"]} for i in range(12)
    ]
    file = folder / "data" / "asked.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize(("shape", "target"), [("vqa-opt", "both"), ("t5", "language")])
def test_an_adapter_learns_to_answer(folder: Path, tmp_path: Path, shape: str, target: str) -> None:
    """Behind a Q-Former that reads the question, and behind one that does not; `convert` merges it as `peft` does, within 1e-6."""
    base = tmp_path / "base"
    random_checkpoint.write(base, shape, 4)
    before = stored(base)
    said = setup(base, "", tmp_path / "work", base=base, data=[(asking(folder), 1.0)], lora=Lora(target, 3, 6.0))
    with pytest.raises(DataError, match="leave --image-size out"):
        stages.train_questions(said, tmp_path / "out", 14)
    stages.train_questions(said, tmp_path / "out")
    after = stored(base)
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    trained = loop.read(tmp_path / "work" / "vqa.pt")["model"]
    assert trained and all("lora_" in name for name in trained)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    places = {"both": {"language_model", "qformer"}, "language": {"language_model"}}[target]
    assert {key.split(".")[2] for key in tensors} == places
    assert all(value.abs().max() > 0 for value in tensors.values()), "B begins at 0, and is learnt"
    model = Blip2ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    found, changed = open_folder(base, [tmp_path / "out"]), set[str]()
    for name in found.names():
        if name in merged:
            mine = torch.from_numpy(found.tensor(name).astype("float32"))
            torch.testing.assert_close(mine, merged[name], atol=1e-6, rtol=1e-6)
            changed |= set() if torch.equal(mine, before[name].float()) else {name.split(".")[0]}
    assert changed == places
    if shape == "vqa-opt":
        kept = replace(said, work=tmp_path / "kept", features=tmp_path / "cache", features_type="float32")
        stages.train_questions(kept, tmp_path / "again")
        assert len(list((tmp_path / "cache").glob("*/??/*.npy"))) == 12, "its image encoder is frozen"
        again = loop.read(tmp_path / "kept" / "vqa.pt")["model"]
        assert all(torch.equal(value, again[name]) for name, value in trained.items())
        assert losses(tmp_path / "kept", "vqa") == losses(tmp_path / "work", "vqa")
        convert(tmp_path / "out", tmp_path / "bundle", Choices("x", None, questions.PROMPT, golden=False))
        assert "ask" in json.loads((tmp_path / "bundle" / "bundle.json").read_text())["tasks"]


def test_what_lora_cannot_be_is_told(folder: Path, tmp_path: Path) -> None:
    assert Lora.parsed("qformer:4") == Lora("qformer", 4, 8.0) and Lora.parsed("language") == Lora()
    for text in ("vision", "language:0", "language:x", ":8"):
        with pytest.raises(DataError, match="expected language, qformer or both"):
            Lora.parsed(text)
    with pytest.raises(DataError, match="leave --qformer"):
        more = {"lora": Lora(), "qformer": folder / "opt"}
        stages.train_stage2(setup(folder, "opt", tmp_path / "work", **more), tmp_path / "out")


# Precision and memory


def losses(work: Path, phase: str = "stage2") -> list[float]:
    rows = [json.loads(line) for line in (work / f"{phase}.jsonl").read_text().splitlines()]
    return [row["held_out"]["loss"] for row in rows if "held_out" in row]


@pytest.fixture(scope="module")
def exact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], float]:
    """The last loss of a run in float32 around a base."""

    @functools.cache
    def of(name: str) -> float:
        root = tmp_path_factory.mktemp("exact")
        stages.train_stage2(setup(folder, name, root / "work", qformer=folder / name), root / "out")
        return losses(root / "work")[-1]

    return of


@pytest.mark.parametrize(("name", "precision"), [("opt", "fp16"), ("opt", "bf16"), ("t5", "bf16")])
def test_16_bits_train_and_leave_the_base_as_it_is(
    folder: Path, exact: Callable[[str], float], tmp_path: Path, name: str, precision: str
) -> None:
    """Frozen weights are held in 16 bits, and yet written as they were."""
    said = setup(folder, name, tmp_path / "work", qformer=folder / name, precision=precision, checkpointing=True)
    stages.train_stage2(said, tmp_path / "out")
    before, after = stored(folder / name), stored(tmp_path / "out")
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith(("vision_", "language_model.")))
    assert {value.dtype for value in after.values()} == {torch.float32}
    kept = loop.read(tmp_path / "work" / "stage2.pt")
    assert {value.dtype for value in kept["model"].values()} == {torch.float32}
    assert (kept["precision"]["scaler"] != {}) == (precision == "fp16")
    assert losses(tmp_path / "work")[-1] == pytest.approx(exact(name), rel=0.1)


def test_held_weights_take_half_and_norms_stay(folder: Path) -> None:
    model = open_base(folder / "t5").model.language_model
    before = {name: p.clone() for name, p in model.named_parameters()}
    hardware.held(model, "bf16")
    for name, p in model.named_parameters():
        assert p.dtype == (torch.bfloat16 if p.ndim >= 2 else torch.float32)
        assert torch.equal(p, before[name].to(p.dtype)), name
    hardware.held(model.requires_grad_(True), "fp16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}, "what is trained is left alone"


def test_a_fingerprint_tells_a_bit(folder: Path) -> None:
    """Of any type; the matrices of an adapter, which are trained inside, do not count."""
    model = open_base(folder / "opt").model.language_model
    hardware.held(model, "bf16")
    adapter = lora.adapt(Lora(rank=2), model, nn.Identity(), "opt", 0)
    before = fingerprint(model)
    next(iter(adapter.parameters.values())).data.add_(1)
    assert fingerprint(model) == before
    weight = model.get_input_embeddings().weight.data
    weight.view(torch.int16)[0, 0] ^= 1
    assert fingerprint(model) != before


class Overflows(nn.Module):
    """Its gradient is so large at some steps that no scale can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)
        torch.manual_seed(3)
        nn.init.normal_(self.line.weight)

    def forward(self, part: tuple[float, int]) -> dict[str, Tensor]:
        size, step = part
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        return {"x": (self.line(x) * size).float().square().mean()}


def overflowing(work: Path, name: str, steps: int, at: tuple[int, ...], n_steps: int | None = None) -> Fit:
    def parts(step: int) -> list[tuple[float, int]]:
        return [(1e30 if step in at else 1.0, step)]

    task = Task(Overflows(), parts, lambda m, part: m(part))
    facts = {"name": name}
    run = Run(
        name, work, Schedule(steps, warmup=0, learning_rate=1e-2), workers=0, log_every=1, precision="fp16", facts=facts
    )
    return Fit(run, task, Accelerator())


def test_a_step_that_overflows_is_left_out_and_told(tmp_path: Path) -> None:
    fit = overflowing(tmp_path, "one", 8, (3, 5))
    scales, weights = [], []
    update = fit._update

    def watched(step: int, parts: list[Any]) -> dict[str, float]:
        found = update(step, parts)
        scales.append(fit.precision.scaler.get_scale())
        weights.append(fit.task.model.line.weight.detach().clone())
        return found

    fit._update = watched  # type: ignore[method-assign]
    fit.go()
    skipped = [step for step in range(1, 8) if torch.equal(weights[step], weights[step - 1])]
    assert {3, 5} <= set(skipped) < set(range(8))
    for step in skipped:
        assert scales[step] == scales[step - 1] / 2
    kept = loop.read(tmp_path / "one.pt")["precision"]
    assert kept["scaler"]["scale"] == scales[-1]
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    told = [row["skipped"] for row in rows if "skipped" in row]
    assert told == [float(scales[0] < 65536.0), *(float(step in skipped) for step in range(1, 8))]


def test_steps_that_all_overflow_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="50 steps in a row overflow fp16; take --precision bf16"):
        overflowing(tmp_path, "all", 80, tuple(range(80))).go()
    with pytest.raises(DataError, match="the precision `int4` is none of"):
        Precision("int4", torch.device("cpu"))


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_computing_twice_gives_the_same_and_keeps_less(folder: Path, name: str) -> None:
    """Also with noise, and through the frozen language model, which is in evaluation."""

    def once(twice: bool) -> tuple[float, dict[str, Tensor], int]:
        base = open_base(folder / name)
        speaks = language.of_family(name, base.model.language_model, base.tokenizer())
        torch.manual_seed(0)
        model = Stage2(base.model.qformer.requires_grad_(True), base.model.query_tokens, speaks).train()
        if twice:
            assert hardware.recomputed(model, speaks.model) == 4 + 2 * (name == "t5")
        seen, kept = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)), [0]
        texts = speaks.texts([Text(0, "two dogs", "play on the beach"), Text(1, "", "a red star")])

        def count(value: Tensor) -> Tensor:
            kept[0] += value.nbytes
            return value

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            loss = model(Written(seen, texts))["lm"]
        measured = kept[0]
        loss.backward()
        return float(loss.detach()), {key: p.grad for key, p in model.named_parameters()}, measured

    (loss, gradients, most), (again, others, fewer) = once(False), once(True)
    assert loss == again and fewer < most / 2
    for key, value in gradients.items():
        assert torch.equal(value, others[key]), key


# Several processes


def cases(folder: Path) -> dict[str, tuple[nn.Module, list[Any]]]:
    """A model without noise in float64, and a step in two parts, each of four rows."""
    found: dict[str, tuple[nn.Module, list[Any]]] = {}
    for name in ("opt", "t5", "vqa"):
        base = open_base(folder / name.replace("vqa", "opt"))
        base.model.double()
        speaks = language.of_family(base.family, base.model.language_model, base.tokenizer())
        torch.manual_seed(9)
        if name == "vqa":
            first = start.qformer(base, start.Start(), 40).double()
            model = questions.model(base, first, 28, speaks).double()
        else:
            model = Stage2(base.model.qformer.requires_grad_(True), base.model.query_tokens, speaks).double()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.0
        found[name] = model, [_written(base, speaks, name, n) for n in range(2)]
    return found


def _written(base: Any, speaks: Any, name: str, n: int) -> list[Written]:
    """For each process its rows; there are not as many, and not as long ones, for all."""
    generator = torch.Generator().manual_seed(n)
    rows = [
        [Text(0, "two dogs", "play on the beach near the water", 0.25), Text(1, "", "a red star")],
        [Text(0, "a", "blue ring", 0.75), Text(1, "two", "objects"), Text(1, "what colour is the star?", "three")],
    ]
    made = []
    for texts in rows:
        shape = (2, 3, 28, 28) if name == "vqa" else (2, 9, 32)
        seen = torch.randn(shape, generator=generator, dtype=torch.float64)
        ids = torch.randint(1, 40, (len(texts), 5), generator=generator) if name == "vqa" else None
        said = speaks.texts(texts)
        said.weights = said.weights.double()
        made.append(Written(seen, said, ids, None if ids is None else torch.ones_like(ids)))
    return made


def together_(parts: list[Written]) -> Written:
    """Both processes' rows in one."""
    one, other = parts
    texts = [part.texts for part in parts]
    read, said = (max(getattr(t, key).shape[1] for t in texts) for key in ("ids", "labels"))

    def padded(key: str, n: int, value: int) -> Tensor:
        return torch.cat(
            [nn.functional.pad(getattr(t, key), (0, n - getattr(t, key).shape[1]), value=value) for t in texts]
        )

    picture = torch.cat([one.texts.picture, other.texts.picture + len(one.seen)])
    whole = language.Texts(
        padded("ids", read, 1),
        padded("mask", read, 0),
        padded("labels", said, -100),
        torch.cat([t.weights for t in texts]),
        picture,
    )
    asked = [
        None if one.question_ids is None else torch.cat([getattr(p, key) for p in parts])
        for key in ("question_ids", "question_mask")
    ]
    return Written(torch.cat([one.seen, other.seen]), whole, *asked)


def learnt(model: nn.Module, parts: list[Written], work: Path, name: str) -> tuple[float, dict[str, Tensor]]:
    task = Task(model, lambda _: parts, lambda m, part: m(part), mass=lambda part: part.texts.mass)
    fit = Fit(Run(name, work, Schedule(1, warmup=0, clip=1e9), accumulate=len(parts)), task, Accelerator(cpu=True))
    logged = fit._update(0, parts)
    return logged["lm"], {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


def _process(rank: int, port: int, folder: Path, work: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in where.items()}, ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    found = {}
    Accelerator(cpu=True)
    for name, (model, parts) in cases(folder).items():
        found[name] = learnt(model, [part[rank] for part in parts], work / "two", name)
    torch.save(found, work / f"{rank}.pt")
    for stage in (stages.train_stage1, stages.train_stage2):
        stage(setup(folder, "t5", work / "both", sizes=Sizes(8, 2)), work / stage.__name__)
    distributed.destroy_process_group()


def test_two_processes_learn_what_one_does_with_twice_the_batch(folder: Path, tmp_path: Path) -> None:
    """Every loss around a language model, in two parts a step; and both stages from the data to a folder."""
    processes.two(_process, folder, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, (model, parts) in cases(folder).items():
        loss, wanted = learnt(model, [together_(part) for part in parts], tmp_path / "one", name)
        assert first[name][0] == second[name][0] == pytest.approx(loss, rel=1e-6), name
        scale = max(float(grad.abs().max()) for grad in wanted.values())
        for key, grad in wanted.items():
            assert torch.equal(first[name][1][key], second[name][1][key]), (name, key)
            assert float((first[name][1][key] - grad).abs().max()) <= 1e-6 * scale, (name, key)
    Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "train_stage1")
    Blip2ForConditionalGeneration.from_pretrained(tmp_path / "train_stage2")


def test_weights_of_many_gigabytes_are_written_in_shards(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 20_000)
    stages.train_stage2(setup(folder, "opt", tmp_path / "work", qformer=folder / "opt"), tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in stored(tmp_path / "out").items())
