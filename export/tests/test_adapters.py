"""LoRA adapters: what `convert` merges equals what peft merges, and every other adapter is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration, PreTrainedModel

from blip2_export.__main__ import main
from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.read import adapter
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.reference.generation import Reference
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

HALF, BRAIN = torch.float16, torch.bfloat16
EVERYWHERE = [
    "q_proj",
    "v_proj",
    "qkv",
    "query",
    "language_projection",
]  # language model, image encoder, Q-Former, bridge
OPT = "language_model.model.decoder."
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The folder of a shape, made once."""
    root = tmp_path_factory.mktemp("bases")

    def make(shape: str = "tiny", dtype: torch.dtype = torch.float32) -> Path:
        folder = root / f"{shape}-{dtype}".replace("torch.", "")
        if not folder.exists():
            random_checkpoint.write(folder, shape, 11, dtype)
        return folder

    return make


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    classes = {"blip-2": Blip2ForConditionalGeneration, "instructblip": InstructBlipForConditionalGeneration}
    return classes[kind].from_pretrained(folder, dtype=dtype)


def train(folder: Path, out: Path, dtype: torch.dtype = torch.float32, seed: int = 5, **said: Any) -> Path:
    """An adapter as if it were trained: every parameter that training would move is drawn anew."""
    model = get_peft_model(load(folder, dtype), LoraConfig(**{"r": 3, "lora_alpha": 5, **said}))
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if value.requires_grad:
            drawn = torch.randn(value.shape, generator=generator) * 0.2
            value.data.copy_(value.data * (1 + drawn) if "magnitude" in name else drawn)
    model.save_pretrained(out)
    return out


MERGES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "some": ("tiny", torch.float32, {"target_modules": EVERYWHERE}),
    "all, in half precision": ("tiny", HALF, {"target_modules": "all-linear", "exclude_modules": ["fc1"]}),
    "all, in bfloat16": ("tiny", BRAIN, {"target_modules": "all-linear"}),
    "patterns": (
        "tiny",
        torch.float32,
        {
            "target_modules": r".*(attention\.query|output_query\.dense|qkv|fc1)",
            "rank_pattern": {"layers.0.fc1": 2, "query": 6},
            "alpha_pattern": {r".*encoder\..*fc1": 3, "qkv": 7},
            "use_rslora": True,
        },
    ),
    "some layers": (
        "instruct-llama",
        HALF,
        {"target_modules": ["q_proj", "value"], "layers_to_transform": [1], "layers_pattern": ["layers", "layer"]},
    ),
    "dora": ("tiny", HALF, {"target_modules": EVERYWHERE, "use_dora": True}),
    "bias all": ("tiny", torch.float32, {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("tiny", HALF, {"target_modules": ["q_proj", "query"], "bias": "lora_only"}),
    "lora_bias": ("tiny", HALF, {"target_modules": ["q_proj", "query"], "lora_bias": True}),
    "fan_in_fan_out": ("tiny", torch.float32, {"target_modules": ["fc1"], "fan_in_fan_out": True}),
    "convolution": ("tiny", torch.float32, {"target_modules": ["patch_embedding"]}),
    "head and bridge saved": (
        "tiny",
        HALF,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "language_projection"]},
    ),
    "table saved": ("tiny", HALF, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied table": ("tiny", HALF, {"target_modules": ["embed_tokens", "fc2"]}),
    "tied head": ("tiny", BRAIN, {"target_modules": ["lm_head"]}),
    "untied table and head": ("odd-4", torch.float32, {"target_modules": ["lm_head", "embed_tokens"]}),
    "t5": ("t5", HALF, {"target_modules": ["q", "v", "wo", "shared"]}),
    "t5, two of one table": ("t5", HALF, {"target_modules": ["embed_tokens"]}),
    "t5, head saved": ("t5", torch.float32, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", MERGES)
def test_every_parameter_is_what_peft_merges(base, tmp_path: Path, name: str) -> None:
    shape, dtype, said = MERGES[name]
    folder = base(shape, dtype)
    lora = train(folder, tmp_path / "lora", dtype, **said)
    merged = PeftModel.from_pretrained(load(folder, dtype), lora).merge_and_unload()
    plain, found = load(folder, dtype).state_dict(), adapter.open_folder(folder, [lora])
    n_changed = 0
    for parameter, wanted in merged.named_parameters(remove_duplicate=False):
        value = found.tensor(parameter, tuple(wanted.shape))
        close = 1e-6 * float(wanted.detach().abs().max())
        assert np.allclose(value.astype(np.float32), wanted.detach().float().numpy(), rtol=0, atol=close), parameter
        if not torch.equal(wanted, plain[parameter]):
            n_changed += 1
            assert f"torch.{value.dtype}" == str(wanted.dtype), parameter
    assert n_changed >= 2 or said["target_modules"] == ["patch_embedding"]


@pytest.mark.parametrize("shape", ["tiny", "instruct-t5"])
def test_tokens_and_goldens_are_those_of_the_merged_model(base, tmp_path: Path, shape: str) -> None:
    targets = [*EVERYWHERE, "key"] if shape == "tiny" else ["q", "v", "wi_0", "query", "qkv"]
    said = {"target_modules": targets, "modules_to_save": ["lm_head"], "lora_alpha": 12}
    folder, merged = base(shape), tmp_path / "merged"
    lora = train(folder, tmp_path / "lora", **said)
    shutil.copytree(folder, merged)
    PeftModel.from_pretrained(load(folder), lora).merge_and_unload().save_pretrained(merged)
    convert(folder, tmp_path / "b", Choices("x", adapters=(lora,)))
    graphs = Graphs(tmp_path / "b")
    golden = json.loads((tmp_path / "b" / "golden" / "golden.json").read_text())["cases"]
    wanted, plain = Reference(merged, graphs.facts), Reference(folder, graphs.facts)
    picture = drawing.sample_pictures(1, 3)[0]
    pixels, _, queries = wanted.stages(picture, "a photo of", "what?")
    ids, logits, tokens, _ = wanted.generate(pixels, "a photo of", 8, "what?")
    asked = [wanted.question_ids("a photo of", "what?")] if wanted.question else None
    found = graphs.queries(graphs.features(pixels[None]), asked)
    assert np.abs(found[0] - queries).max() < 1e-4 * np.abs(queries).max()
    first, written = graphs.greedy(found, [ids], 8)
    assert np.abs(first[0] - logits).max() < 1e-4 * np.abs(logits).max() and written == [tokens]
    assert tokens != plain.generate(pixels, "a photo of", 8, "what?")[2], "this adapter changes nothing that is said"
    recorded = np.fromfile(tmp_path / "b" / golden[0]["features"]["file"], np.float32)
    shown = np.fromfile(tmp_path / "b" / golden[0]["pixels"]["file"], np.float32).reshape(pixels.shape)
    with torch.inference_mode():
        seen = wanted.model.vision_model(torch.from_numpy(shown)[None]).last_hidden_state.numpy().reshape(-1)
    assert np.abs(recorded - seen).max() < 1e-4 * np.abs(seen).max()


def test_adapters_are_merged_one_after_another(base, tmp_path: Path) -> None:
    folder = base(dtype=HALF)
    loras = [train(folder, tmp_path / str(i), HALF, seed=i, target_modules=EVERYWHERE) for i in range(2)]
    model = load(folder, HALF)
    for lora in loras:
        model = PeftModel.from_pretrained(model, lora).merge_and_unload()
    found = adapter.open_folder(folder, loras)
    for name in ("qformer.encoder.layer.0.attention.attention.query", OPT + "layers.1.self_attn.q_proj"):
        assert np.array_equal(found.tensor(name + ".weight"), model.get_submodule(name).weight.detach().numpy())


def test_an_adapter_beside_the_weights_is_merged_as_the_reference_loads_it(base, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(base(), folder)
    train(base(), folder, target_modules=EVERYWHERE)
    (folder / "README.md").unlink()
    model, found = load(folder), adapter.open_folder(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) > 5
    for name, module in layers.items():
        module.merge()
        weight = module.get_base_layer().weight.detach().numpy()
        assert np.allclose(found.tensor(name + ".weight"), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["safetensors", "bin", "with names", "without prefix"])
def test_an_adapter_alone_names_its_base(base, tmp_path: Path, form: str) -> None:
    """Also in the form of `.bin`, and under the names that a model's own state has."""
    lora = train(base(), tmp_path / "lora", target_modules=["q_proj"])
    wanted = adapter.open_folder(base(), [lora]).tensor(OPT + "layers.0.self_attn.q_proj.weight")
    file = lora / "adapter_model.safetensors"
    state = load_file(file)
    file.unlink()
    if form == "with names":
        state = {name.replace(".weight", ".default.weight"): value for name, value in state.items()}
    if form == "without prefix":
        state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    if form == "bin":
        torch.save(state, lora / "adapter_model.bin")
    else:
        save_file(state, file)
    assert np.array_equal(adapter.open_folder(lora).tensor(OPT + "layers.0.self_attn.q_proj.weight"), wanted)


def test_an_adapter_gives_one_bundle_alone_and_with_its_base(base, tmp_path: Path, monkeypatch) -> None:
    lora = train(base(), tmp_path / "lora", target_modules=["q_proj"])
    monkeypatch.setattr("sys.argv", ["x", "convert", str(lora), str(tmp_path / "a"), "--no-golden", "--name", "x"])
    assert main() == 0
    words = ["x", "convert", str(base()), str(tmp_path / "b"), "--no-golden", "--name", "x", "--adapter", str(lora)]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    assert (tmp_path / "a" / "bundle.json").read_bytes() == (tmp_path / "b" / "bundle.json").read_bytes()


def test_a_copy_of_one_table_of_t5_cannot_be_told_from_the_other(base, tmp_path: Path) -> None:
    lora = train(base("t5"), tmp_path / "lora", target_modules=["q"], modules_to_save=["shared"])
    with pytest.raises(UnsupportedError, match="is another table"):
        convert(base("t5"), tmp_path / "b", Choices("x", golden=False, adapters=(lora,)))


def edit(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file({name: value.clone() for name, value in state.items()}, folder / "adapter_model.safetensors")


A, B = (f"base_model.model.{OPT}layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *((lambda f, k=kind: edit(f, peft_type=k), f"of kind `{kind}`") for kind in ("IA3", "ADALORA", "LOHA", None)),
        (lambda f: edit(f, trainable_token_indices=[3]), "sets trainable_token_indices to"),
        (lambda f: edit(f, layer_replication=[[0, 2]]), "sets layer_replication to"),
        (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "sets init_lora_weights to 'pissa_niter_4'"),
        (lambda f: edit(f, ensure_weight_tying=True), "sets ensure_weight_tying"),
        (lambda f: edit(f, some_new_kind={"of": "sum"}), "sets some_new_kind to"),
        (lambda f: edit(f, r=4), "has rank 3, adapter_config.json says 4"),
        (lambda f: edit(f, r="many"), "rank_pattern or r is not understood"),
        (lambda f: edit(f, rank_pattern={"(": 3}), "rank_pattern or r is not understood"),
        (lambda f: edit(f, r=0), "the rank 0"),
        (lambda f: edit(f, use_dora=True), "`lora_magnitude_vector.weight` of .* is missing"),
        (lambda f: edit(f, base_model_name_or_path=None), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path=str(f)), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path="/nowhere"), "`/nowhere` is no folder here"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "neither adapter_model.safetensors nor adapter_model.bin",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "not a readable safetensors file"),
        (lambda f: edit_tensors(f, lambda s: s.pop(A)), "`lora_A.weight` of .*q_proj` is missing"),
        (lambda f: edit_tensors(f, lambda s: s.update({B: s[B][:9]})), "is not of the shape"),
        (lambda f: edit_tensors(f, lambda s: s.update({B.replace("weight", "bias"): s[B][:, 0]})), "no place there"),
        (
            lambda f: edit_tensors(f, lambda s: s.update({"base_model.model.lost.weight": s[B]})),
            "changes `lost.weight`",
        ),
        (
            lambda f: edit_tensors(f, lambda s: s.update({A.replace(OPT, "x."): s[A], B.replace(OPT, "x."): s[B]})),
            "`x.lay",
        ),
        (lambda f: edit_tensors(f, lambda s: s.update({A.replace("A.w", "A.a.w"): s[A]})), "several adapters in one"),
        (lambda f: edit_tensors(f, lambda s: s.clear()), "changes nothing"),
        (lambda f: [(f / n / "adapter_config.json").parent.mkdir() for n in "a"] and _move(f, "a"), "of its own: a"),
    ],
)
def test_what_cannot_be_merged_gets_one_sentence(
    base, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    lora = train(base(), tmp_path / "lora", target_modules=["q_proj"])
    damage(lora)
    with pytest.raises(CheckpointError, match=said):
        convert(lora, tmp_path / "b", Choices("x", golden=False))


def _move(folder: Path, into: str) -> None:
    """As peft saves an adapter that is not called `default`."""
    for file in folder.glob("adapter_*"):
        file.rename(folder / into / file.name)


def test_an_adapter_of_another_kind_is_named(base, tmp_path: Path) -> None:
    model = get_peft_model(load(base()), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(CheckpointError, match="of kind `IA3`; only LoRA is merged"):
        convert(base(), tmp_path / "b", Choices("x", golden=False, adapters=(tmp_path / "ia3",)))
