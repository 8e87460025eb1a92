"""The stored tensors are the truth: what is tied, what is missing, and what no part of the model reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference.generation import Reference
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

SHAPES = {"opt": "tiny", "llama": "llama", "t5": "t5"}
OPT, HEAD = "language_model.model.decoder.", "language_model.lm_head.weight"
TABLES = {
    "opt": OPT + "embed_tokens.weight",
    "llama": "language_model.model.embed_tokens.weight",
    "t5": "language_model.shared.weight",
}
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a shape, made once."""
    root = tmp_path_factory.mktemp("stored")

    def make(shape: str) -> Path:
        folder = root / shape
        if not folder.exists():
            kind = random_retrieval if shape in random_retrieval.SHAPES else random_checkpoint
            kind.write(folder, shape, seed=7)
        return folder

    return make


def changed(folder: Path, out: Path, change: Change, pickled: bool = False, **text: object) -> Path:
    """A copy with other tensors, and `text` in its text_config."""
    shutil.copytree(folder, out)
    state = load_file(out / "model.safetensors")
    change(state)
    (out / "model.safetensors").unlink()
    if pickled:
        torch.save(state, out / "pytorch_model.bin")
    else:
        save_file(state, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["text_config"].update(text)
    (out / "config.json").write_text(json.dumps(config))
    return out


def quick(folder: Path, out: Path, **choices: object) -> Path:
    convert(folder, out, Choices("x", golden=False, **choices))
    return out


def other(value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.3


def table_and_head(family: str, there: str) -> Change:
    def change(state: dict[str, Tensor]) -> None:
        table = state[TABLES[family]]
        state.pop(HEAD, None)
        if there != "table":
            state[HEAD] = other(table) if there == "both" else table.clone()
        if there == "head":
            del state[TABLES[family]]

    return change


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("there", ["both", "equal", "table", "head"])
@pytest.mark.parametrize("family", SHAPES)
def test_table_and_head_are_those_that_the_reference_loads(
    made, tmp_path: Path, family: str, there: str, tie: bool
) -> None:
    change = table_and_head(family, there)
    folder = changed(made(SHAPES[family]), tmp_path / "c", change, pickled=tie, tie_word_embeddings=tie)
    model, said = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    if said["missing_keys"]:
        with pytest.raises(CheckpointError, match="is missing") as error:
            quick(folder, tmp_path / "b")
        assert said["missing_keys"].pop() in str(error.value)
        return
    language, checkpoint = model.language_model, Checkpoint(folder)
    table, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
    assert np.array_equal(checkpoint.tensor(TABLES[family]), table.detach().numpy())
    assert np.array_equal(checkpoint.tensor(HEAD), head.detach().numpy())
    if tie or family == "t5":
        assert (HEAD in checkpoint.tied(TABLES[family])) == (head is table)


@pytest.mark.parametrize("family", SHAPES)
def test_a_head_of_its_own_writes_what_the_reference_writes(made, tmp_path: Path, family: str) -> None:
    change = table_and_head(family, "both")
    folder = changed(made(SHAPES[family]), tmp_path / "c", change, tie_word_embeddings=True)
    graphs = Graphs(quick(folder, tmp_path / "b"))
    reference = Reference(folder, graphs.facts)
    pixels, _, queries = reference.stages(drawing.sample_pictures(1, 3)[0])
    ids, logits, tokens, _ = reference.generate(pixels, "a photo of", 6)
    found, written = graphs.greedy(queries[None], [ids], 6)
    assert np.abs(found[0] - logits).max() <= 1e-4 * np.abs(logits).max()
    assert written == [tokens]


def test_the_decoder_of_t5_has_no_table_of_its_own(made, tmp_path: Path) -> None:
    name = "language_model.decoder.embed_tokens.weight"
    folder = changed(made("t5"), tmp_path / "c", lambda s: s.update({name: other(s[TABLES["t5"]])}))
    language = Blip2ForConditionalGeneration.from_pretrained(folder).language_model
    assert not torch.equal(language.decoder.embed_tokens.weight, language.shared.weight)
    with pytest.raises(UnsupportedError, match=r"decoder\.embed_tokens\.weight` is another table"):
        quick(folder, tmp_path / "b")
    folder = changed(made("t5"), tmp_path / "d", lambda s: s.update({name: s.pop(TABLES["t5"])}))
    assert np.array_equal(Checkpoint(folder).tensor(TABLES["t5"]), load_file(folder / "model.safetensors")[name])


def test_the_writer_of_stage_1_has_its_own_head_where_one_is_stored(made, tmp_path: Path) -> None:
    words, head = "embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    bias = "cls.predictions.decoder.bias"
    plain = quick(made("itg-tiny"), tmp_path / "plain")
    copies = {head: words, bias: "cls.predictions.bias"}
    folder = changed_stage1(made, tmp_path / "c", lambda s: s.update({n: s[of].clone() for n, of in copies.items()}))
    same = quick(folder, tmp_path / "same")
    assert (plain / "qformer.onnx.data").read_bytes() == (same / "qformer.onnx.data").read_bytes()
    folder = changed_stage1(made, tmp_path / "d", lambda s: s.update({head: other(s[words])}))
    convert(folder, tmp_path / "own", Choices("x"))  # with goldens, which `verify` compares
    stored = (tmp_path / "own" / "qformer.onnx.data").read_bytes()
    assert load_file(folder / "model.safetensors")[head].numpy().tobytes() in stored
    folder = changed_stage1(made, tmp_path / "e", lambda s: s.update({bias: other(s["cls.predictions.bias"])}))
    with pytest.raises(UnsupportedError, match="is not equal to"):
        quick(folder, tmp_path / "b")


def changed_stage1(made: Callable[[str], Path], out: Path, change: Change) -> Path:
    shutil.copytree(made("itg-tiny"), out)
    state = load_file(out / "model.safetensors")
    change(state)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out


ODD = {  # shape → names and shapes of what its configuration has no place for
    "odd-3": {OPT + "layers.0.fc1.bias": (64,), OPT + "final_layer_norm.weight": (32,)},
    "odd-8": {OPT + "final_layer_norm.bias": (32,)},
    "odd-6": {"vision_model.encoder.layers.0.self_attn.qkv.bias": (264,)},
    "tiny": {
        OPT + "layers.2.fc1.weight": (64, 32),
        "vision_model.encoder.layers.0.self_attn.q_bias": (32,),
        "qformer.encoder.layer.0.intermediate.dense.weight": (48, 32),
        "qformer.encoder.layer.1.crossattention.attention.query.weight": (32, 32),
        "somewhere.else": (1,),
    },
    "llama": {"language_model.model.layers.0.self_attn.q_proj.bias": (32,)},
    "t5": {"language_model.encoder.embed_tokens.weight": (9, 32)},
}


@pytest.mark.parametrize("shape", ODD)
def test_a_tensor_without_a_place_is_named_unless_it_may_be_lost(made, tmp_path: Path, shape: str, capsys) -> None:
    names = ODD[shape]
    folder = changed(
        made(shape), tmp_path / "c", lambda s: s.update({n: torch.ones(size) for n, size in names.items()})
    )
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    with pytest.raises(CheckpointError, match="--ignore-tensors") as error:
        quick(folder, tmp_path / "b")
    assert f"`{min(names)}`{more}," in str(error.value)
    quick(folder, tmp_path / "b", ignored_tensors=tuple(n[:-1] + "*" for n in names))
    assert f"warning: {folder}: `{min(names)}`{more} left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("tiny", "vision_model.embeddings.position_ids"),
        ("instruct-t5", "qformer.embeddings.position_ids"),
        ("tiny", OPT + "layers.0.self_attn.masked_bias"),
        ("llama", "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("t5", "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    ],
)
def test_buffers_of_former_versions_are_left_out_with_a_warning(
    made, tmp_path: Path, shape: str, name: str, capsys
) -> None:
    folder = changed(made(shape), tmp_path / "c", lambda s: s.update({name: torch.arange(5)[None]}))
    quick(folder, tmp_path / "b")
    assert f"`{name}` left out" in capsys.readouterr().err


def renamed(prefix: str) -> Change:
    return lambda state: state.update({prefix + name: state.pop(name) for name in list(state)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed("module."), "`module.…`, as saved by DataParallel"),
        (renamed("_orig_mod."), "`_orig_mod.…`, as saved by torch.compile"),
        (renamed("base_model.model."), "`base_model.model.…`, as saved by peft"),
        (renamed("net.inner."), "`net.inner.…`, as saved by a module around the model"),
        (lambda s: s.update({OPT + "layers.0.fc1.lora_A.default.weight": torch.ones(2, 32)}), "lora_A.* of an adapter"),
        (
            lambda s: s.update({OPT + "layers.0.fc1.base_layer.weight": s.pop(OPT + "layers.0.fc1.weight")}),
            "base_layer",
        ),
        (lambda s: s.update({OPT + "layers.0.fc1.SCB": torch.ones(64)}), "fc1.SCB`, so its weights are quantized"),
        (lambda s: s.update({OPT + "layers.0.fc1.qweight": torch.ones(64)}), "qweight`, so its weights are quantized"),
        (lambda s: s.update({OPT + "layers.0.fc1.weight.absmax": torch.ones(64)}), "absmax`, so its weights are"),
        (lambda s: s.update({OPT + "layers.0.fc1.weight": torch.ones(64, 32, dtype=torch.int8)}), "has dtype int8"),
        (lambda s: s.pop("language_projection.bias"), "`language_projection.bias` is missing"),
        (lambda s: s.update({TABLES["opt"]: torch.ones(999, 32)}), r"embed_tokens.weight` is \[999, 32\]"),
    ],
)
def test_models_in_wrappers_and_quantized_ones_are_named(made, tmp_path: Path, change: Change, said: str) -> None:
    folder = changed(made("tiny"), tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=said):
        quick(folder, tmp_path / "b")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_a_quantization_config_is_named(made, tmp_path: Path, method: str) -> None:
    shutil.copytree(made("tiny"), tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match=rf"quantization_config \({method}\)"):
        quick(tmp_path / "c", tmp_path / "b")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("model-q4.gguf",), "a GGUF file"),
        (("global_step100/mp_rank_00_model_states.pt", "latest"), "DeepSpeed's shards"),
        (("zero_to_fp32.py",), "DeepSpeed's shards"),
        (("pytorch_model_fsdp_0/__0_0.distcp",), "FSDP's shards"),
        (("tf_model.h5",), "TensorFlow or Flax"),
        (("optimizer.pt", "trainer_state.json"), "a trainer's state"),
        ((), "neither model.safetensors nor"),
    ],
)
def test_a_folder_without_weights_tells_what_lies_there(
    made, tmp_path: Path, files: tuple[str, ...], said: str
) -> None:
    folder = tmp_path / "c"
    shutil.copytree(made("tiny"), folder)
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=said):
        quick(folder, tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state": {}, "param_groups": []}, "an optimizer's state"),
        ({"state_dict": {"model.query_tokens": torch.ones(1)}, "epoch": 3}, "under `state_dict`"),
    ],
)
def test_a_file_of_a_trainer_is_named(tmp_path: Path, content: dict[str, object], said: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=said):
        quick(tmp_path / "x.pth", tmp_path / "b")
