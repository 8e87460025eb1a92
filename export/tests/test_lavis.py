"""LAVIS files with their parts: bundles against the paper's formulas on the same files, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from stage1_reference import LAVIS, Stage1, clip, eva, lift, linear, norm
from table import table_type
from test_retrieval import assert_close, pictures, texts
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
)

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.check.random_retrieval import Lavis, write_lavis
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.read.lavis import LavisCheckpoint, Parts
from blip2_export.reference import load
from blip2_export.reference.pictures import drawn as golden_pictures
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs

EVA = Lavis()
CLIP = Lavis(vision="clip", vision_width=128, width=128, n_layers=4, image_size=42)
MODELS = {
    "eva": EVA,
    "clip": CLIP,
    "eva-inside": replace(EVA, vision_width=176, holds_vision=True),
    "clip-inside": replace(CLIP, holds_vision=True),
    "one-layer": replace(EVA, n_layers=1),
}
STAGE_2 = Lavis(kind="opt", n_queries=3, width=128)
N_NEW = 8


def parts(folder: Path) -> Parts:
    """What `write_lavis` put beside the file."""
    names = ("vision.pth", "llm", "bert")
    return Parts(*(folder / n if (folder / n).exists() else None for n in names))


def weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the file, and of the image encoder."""
    state = lift(torch.load(folder / "model.pth", weights_only=True)["model"])
    if (folder / "vision.pth").exists():
        return state, lift(torch.load(folder / "vision.pth", weights_only=True))
    stem = "visual_encoder."
    return state, {n.removeprefix(stem): v for n, v in state.items() if n.startswith(stem)}


def see(model: Lavis, folder: Path, pixels: np.ndarray) -> Tensor:
    """Image features by the formulas: the norm behind the image encoder has PyTorch's own epsilon."""
    state, eye = weights(folder)
    x = (clip if model.vision == "clip" else eva)(eye, torch.from_numpy(pixels), model.vision_blocks)
    return norm(state, "ln_vision", x, 1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_stage_1_file_equals_the_formulas(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    write_lavis(tmp_path / "l", model, seed=20 + sorted(MODELS).index(name))
    convert(tmp_path / "l" / "model.pth", tmp_path / "b", Choices("x", golden=False, parts=parts(tmp_path / "l")))
    graphs = Stage1Graphs(tmp_path / "b")
    ids, mask = texts(graphs)
    pixels = pictures(graphs, len(ids))
    state, _ = weights(tmp_path / "l")
    wanted = Stage1(state, LAVIS, model.width // 64)
    seen = see(model, tmp_path / "l", pixels)
    features = graphs.features(pixels)
    assert_close(features, seen, "features")
    image = graphs.run("qformer", image_features=features)
    assert_close(image["query_states"], wanted.queries(seen), "query_states")
    assert_close(image["image_embeds"], wanted.image(seen), "image_embeds")
    real, pair = mask.astype(bool), (torch.from_numpy(ids), torch.from_numpy(mask))
    text = graphs.run("qformer_text", input_ids=ids, attention_mask=mask)
    assert_close(text["text_embeds"][real], wanted.text_embeds(*pair)[real], "text_embeds")
    match = graphs.run("qformer_itm", image_features=features, input_ids=ids, attention_mask=mask)
    assert_close(match["itm_logits"], wanted.match(seen, *pair)[0], "itm_logits")
    special = graphs.facts["language"]["token_ids"]
    assert special["bos"] == state["Qformer.cls.predictions.bias"].shape[0] - 1, "[DEC] is the last id"
    rows, steps = wanted.write(seen, special["bos"], special["eos"][0], N_NEW)
    tokens, logits = graphs.write(features, N_NEW)
    assert tokens == rows
    for found, expected in zip(logits, steps, strict=True):
        assert_close(found, expected, "logits")
    assert graphs.facts["qformer"]["temperature"] == pytest.approx(float(state["temp"]), rel=1e-6)


def test_the_last_norm_has_its_own_epsilon(tmp_path: Path) -> None:
    """The image encoder's outputs are made so small that 1e-5 and 1e-6 differ."""
    write_lavis(tmp_path / "l", EVA, 3)
    eye = torch.load(tmp_path / "l" / "vision.pth", weights_only=True)
    for name, value in eye.items():
        if name in ("cls_token", "pos_embed") or name.startswith(("patch_embed", *(f"blocks.{i}" for i in range(9)))):
            if name.endswith(("fc2.weight", "fc2.bias", "attn.proj.weight", "attn.proj.bias", "_embed", "token")):
                value.mul_(1e-3)
            if name.startswith("patch_embed"):
                value.mul_(1e-3)
    torch.save(eye, tmp_path / "l" / "vision.pth")
    convert(tmp_path / "l" / "model.pth", tmp_path / "b", Choices("x", golden=False, parts=parts(tmp_path / "l")))
    graphs = Stage1Graphs(tmp_path / "b")
    pixels = pictures(graphs, 2)
    seen = see(EVA, tmp_path / "l", pixels)
    state, weights_ = weights(tmp_path / "l")
    other = norm(state, "ln_vision", eva(weights_, torch.from_numpy(pixels), EVA.vision_blocks), 1e-6)
    assert (seen - other).abs().max() / seen.abs().max() > 1e-2, "this file tells nothing"
    assert_close(graphs.features(pixels), seen, "features")


@pytest.mark.parametrize("name", ["eva", "clip"])
def test_another_image_size_is_interpolated_as_the_loader_of_that_image_encoder_does(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    write_lavis(tmp_path / "l", model, 5)
    chosen = Choices("x", golden=False, parts=parts(tmp_path / "l"), image_size=70)
    convert(tmp_path / "l" / "model.pth", tmp_path / "b", chosen)
    eye = torch.load(tmp_path / "l" / "vision.pth", weights_only=True)
    key = "positional_embedding" if name == "clip" else "pos_embed"
    table = eye[key].reshape(-1, model.vision_width)
    n = model.image_size // 14
    grid = table[1:].reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=name == "clip")
    eye[key] = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(25, -1)]).reshape(*eye[key].shape[:-2], 26, -1)
    torch.save(eye, tmp_path / "l" / "vision.pth")
    graphs = Stage1Graphs(tmp_path / "b")
    pixels = pictures(graphs, 2)
    assert pixels.shape[-1] == 70
    assert_close(graphs.features(pixels), see(model, tmp_path / "l", pixels), "features")


@pytest.mark.parametrize("weights_as", ["safetensors", "bin", "bin without prefix"])
def test_a_stage_2_file_with_opt_equals_formulas_and_transformers_end_to_end(tmp_path: Path, weights_as: str) -> None:
    folder = tmp_path / "l"
    write_lavis(folder, STAGE_2, 7)
    language = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32).eval()
    if weights_as != "safetensors":
        strip = "model." if weights_as.endswith("prefix") else ""
        held = load_file(folder / "llm" / "model.safetensors")
        torch.save({n.removeprefix(strip): v for n, v in held.items()}, folder / "llm" / "pytorch_model.bin")
        (folder / "llm" / "model.safetensors").unlink()
    convert(folder / "model.pth", tmp_path / "b", Choices("x", parts=parts(folder)))
    graphs = Graphs(tmp_path / "b")
    assert table_type(tmp_path / "b") == onnx.TensorProto.FLOAT16
    side = graphs.facts["image"]["size"]
    processor = BlipImageProcessorPil(size={"height": side, "width": side})
    drawn = random_pictures(5)
    pixels = np.stack([processor(images=p, return_tensors="np")["pixel_values"][0] for p in drawn]).astype(np.float32)
    state, _ = weights(folder)
    seen = see(STAGE_2, folder, pixels)
    features = graphs.features(pixels)
    assert_close(features, seen, "features")
    queries = linear(state, "opt_proj", Stage1(state, LAVIS, STAGE_2.width // 64).queries(seen))
    assert_close(graphs.queries(features), queries.detach(), "queries")
    prompts = [[2], [2, 40, 41, 42], [2, 17], [2, 5, 5, 9, 61], [2]]
    logits, tokens = graphs.greedy(queries.numpy(), prompts, N_NEW)
    line_feed = graphs.facts["language"]["token_ids"]["eos"]
    assert line_feed == [json.loads((folder / "llm" / "tokenizer.json").read_text())["model"]["vocab"]["Ċ"]]
    for row, prompt in enumerate(prompts):
        embeds = torch.cat([queries[row], language.get_input_embeddings()(torch.tensor(prompt))])[None]
        with torch.inference_mode():
            out = language.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=N_NEW,
                do_sample=False,
                eos_token_id=line_feed,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert_close(logits[row], out.logits[0][0], "first logits")
        assert tokens[row] == out.sequences[0].tolist()
    assert_goldens_equal_the_graphs(tmp_path / "b", graphs)


def assert_goldens_equal_the_graphs(bundle: Path, graphs: Graphs) -> None:
    cases = json.loads((bundle / "golden" / "golden.json").read_text())["cases"]
    assert len(cases) == 2 * len(golden_pictures())
    for case in cases:
        given = np.fromfile(bundle / case["queries"]["file"], "<f4").reshape(1, 3, -1)
        assert graphs.greedy(given, [case["prompt_ids"]], case["max_new_tokens"])[1] == [case["tokens"]]


def random_pictures(n: int) -> list:
    from blip2_export.scenes import drawing

    return drawing.sample_pictures(n, seed=3, side=120)


def test_a_stage_2_file_with_t5_equals_formulas_and_transformers_end_to_end(tmp_path: Path) -> None:
    folder = tmp_path / "l"
    write_lavis(folder, replace(STAGE_2, kind="t5"), 9)
    said = json.loads((folder / "llm" / "config.json").read_text())
    assert said["feed_forward_proj"] == "gated-gelu" and said.get("dense_act_fn") != "gelu"
    checkpoint = LavisCheckpoint(folder / "model.pth", parts(folder))
    config = Blip2Config(**checkpoint.config)
    assert config.text_config.dense_act_fn == "gelu" and config.text_config.is_gated_act
    assert not config.text_config.scale_decoder_outputs
    assert (config.text_config.d_model, config.text_config.num_decoder_layers) == (36, 2)
    model = load.load(checkpoint, Blip2ForConditionalGeneration, config.vision_config.image_size)
    alone = AutoModelForSeq2SeqLM.from_pretrained(folder / "llm", dtype=torch.float32).state_dict()
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, alone[name]), name
    assert not torch.equal(model.language_model.lm_head.weight, model.language_model.shared.weight)
    state, _ = weights(folder)
    pixels = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen = see(STAGE_2, folder, pixels.numpy())
        found = model.vision_model(pixels).last_hidden_state
        assert_close(found.numpy(), seen, "features")
        tokens = model.query_tokens.expand(3, -1, -1)
        bridge = model.qformer(query_embeds=tokens, encoder_hidden_states=found).last_hidden_state
        wanted = linear(state, "t5_proj", Stage1(state, LAVIS, STAGE_2.width // 64).queries(seen))
        assert_close(model.language_projection(bridge).numpy(), wanted, "queries")
    convert(folder / "model.pth", tmp_path / "b", Choices("x", parts=parts(folder)))
    graphs, table = Graphs(tmp_path / "b"), model.language_model.get_input_embeddings()
    queries, prompts = graphs.queries(graphs.features(pixels.numpy())), [[1], [40, 41, 42, 17, 1], [5, 9, 1]]
    assert_close(queries, wanted.detach(), "queries")
    logits, written = graphs.greedy(queries, prompts, N_NEW)
    for row, prompt in enumerate(prompts):
        embeds = torch.cat([wanted[row].detach(), table(torch.tensor(prompt))])[None]
        with torch.inference_mode():
            out = model.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=N_NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert_close(logits[row], out.logits[0][0], "first logits")
        assert written[row] == out.sequences[0, 1:].tolist()
    assert_goldens_equal_the_graphs(tmp_path / "b", graphs)


def test_the_image_encoder_of_a_folder_or_of_another_file_serves_too(tmp_path: Path) -> None:
    write_lavis(tmp_path / "inside", replace(EVA, holds_vision=True), 4)
    write_lavis(tmp_path / "l", EVA, 4)
    given = parts(tmp_path / "l")
    other = tmp_path / "inside" / "model.pth"
    checkpoint = LavisCheckpoint(tmp_path / "l" / "model.pth", replace(given, vision=other))
    inside = LavisCheckpoint(other, Parts(tokenizer=given.tokenizer))
    assert checkpoint.config["vision_config"] == inside.config["vision_config"]
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert np.array_equal(checkpoint.tensor(name), inside.tensor(name))
    random_checkpoint.write(tmp_path / "hf", "odd-6", 0)
    held = load_file(tmp_path / "hf" / "model.safetensors")
    checkpoint = LavisCheckpoint(tmp_path / "l" / "model.pth", replace(given, vision=tmp_path / "hf"))
    eye = checkpoint.config["vision_config"]
    assert (eye["hidden_size"], eye["num_attention_heads"], eye["qkv_bias"]) == (88, 1, False)
    name = "vision_model.embeddings.patch_embedding.weight"
    assert np.array_equal(checkpoint.tensor(name), held[name].numpy())
    mine = torch.load(tmp_path / "l" / "model.pth", weights_only=True)["model"]["ln_vision.weight"]
    assert np.array_equal(checkpoint.tensor("vision_model.post_layernorm.weight"), mine.numpy())


def test_a_folder_that_lends_its_image_encoder_lends_nothing_else(tmp_path: Path) -> None:
    write_lavis(tmp_path / "l", STAGE_2, 4)
    random_checkpoint.write(tmp_path / "hf", "odd-6", 0)
    given = replace(parts(tmp_path / "l"), vision=tmp_path / "hf")
    checkpoint = LavisCheckpoint(tmp_path / "l" / "model.pth", given)
    name = "model.decoder.layers.0.fc1.weight"
    held = load_file(tmp_path / "l" / "llm" / "model.safetensors")
    assert np.array_equal(checkpoint.tensor("language_model." + name), held[name].numpy())


def test_an_original_file_gives_up_its_last_block_only(tmp_path: Path) -> None:
    write_lavis(tmp_path / "l", replace(EVA, vision_blocks=3), 4)
    checkpoint = LavisCheckpoint(tmp_path / "l" / "model.pth", parts(tmp_path / "l"))
    assert checkpoint.config["vision_config"]["num_hidden_layers"] == 3
    assert not checkpoint.has("vision_model.encoder.layers.3.layer_norm1.weight")


class _Harm:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def _edit(change: Callable[[dict], object], name: str = "model.pth") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=True)
        change(content.get("model", content))
        torch.save(content, folder / name)

    return edit


@pytest.mark.parametrize(
    ("damage", "given", "said"),
    [
        (lambda f: (f / "model.pth").write_bytes(b"abc" * 50), {}, "not a readable PyTorch file"),
        (lambda f: os.truncate(f / "model.pth", 3000), {}, "not a readable PyTorch file"),
        (lambda f: torch.save([1, 2], f / "model.pth"), {}, "no named tensors"),
        (lambda f: torch.save({"model": {}}, f / "model.pth"), {}, "no named tensors"),
        (_edit(lambda s: s.update(note="x")), {}, "`note` is not a tensor"),
        (_edit(lambda s: s.update(surprise=torch.zeros(1))), {}, "holds `surprise`, which no BLIP-2 model has"),
        (_edit(lambda s: s.pop("itm_head.weight")), {}, "neither a stage-1 file"),
        (_edit(lambda s: s.pop("query_tokens")), {}, "`query_tokens` is missing"),
        (_edit(lambda s: s.pop("vision_proj.bias")), {}, "`vision_projection.bias` is missing"),
        (_edit(lambda s: s.pop("ln_vision.bias")), {}, "`vision_model.post_layernorm.bias` is missing"),
        (_edit(lambda s: s.update(query_tokens=torch.zeros(5, 64))), {}, "expected 3 dimensions"),
        (
            _edit(lambda s: s.update({"itm_head.weight": torch.zeros(3, 64)})),
            {},
            r"is \[3, 64\], the other tensors ask",
        ),
        (
            _edit(lambda s: s.update({"Qformer.cls.predictions.decoder.weight": torch.ones(9, 64)})),
            {},
            "to which it is tied",
        ),
        (_edit(lambda s: s.update(temp=torch.tensor(1))), {}, "has dtype torch.int64"),
        (_edit(lambda s: s.pop("blocks.0.attn.q_bias"), "vision.pth"), {}, "`blocks.0.attn.q_bias` is missing"),
        (_edit(lambda s: s.pop("patch_embed.proj.weight"), "vision.pth"), {}, "neither EVA's image encoder"),
        (_edit(lambda s: s.update({"blocks.0.gamma_1": torch.zeros(88)}), "vision.pth"), {}, "`blocks.0.gamma_1`"),
        (lambda f: None, {"vision": None}, "give one with --vision-weights"),
        (lambda f: None, {"tokenizer": None}, "with --tokenizer"),
        (lambda f: None, {"llm": Path("somewhere")}, "leave --llm out"),
        (lambda f: (f / "bert" / "tokenizer.json").unlink(), {}, "no tokenizer.json"),
        (lambda f: (f / "vision.pth").unlink(), {"vision": Path("nowhere.pth")}, "not a file"),
    ],
)
def test_what_a_stage_1_file_lacks_or_holds_too_much(tmp_path: Path, damage, given: dict, said: str) -> None:
    write_lavis(tmp_path / "l", EVA, 1)
    whole = parts(tmp_path / "l")
    damage(tmp_path / "l")
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "l" / "model.pth", tmp_path / "b", Choices("x", golden=False, parts=replace(whole, **given)))
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


def _put(name: str, change: Callable[[Tensor | None], Tensor]) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        file = folder / "llm" / "model.safetensors"
        held = load_file(file)
        save_file({**held, name: change(held.get(name))}, file, {"format": "pt"})

    return put


@pytest.mark.parametrize(
    ("damage", "given", "said"),
    [
        (lambda f: None, {"llm": None}, "with --llm"),
        (lambda f: (f / "llm" / "config.json").unlink(), {}, "config.json is missing"),
        (lambda f: (f / "llm" / "config.json").write_text('{"model_type": "t5"}'), {}, "trained with `opt`"),
        (lambda f: (f / "llm" / "model.safetensors").unlink(), {}, "neither model.safetensors"),
        (_edit(lambda s: s.pop("opt_proj.bias")), {}, "`language_projection.bias` is missing"),
        (
            _edit(lambda s: s.update({"Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(9, 128)})),
            {},
            "whose Q-Former reads text",
        ),
        (lambda f: _drop(f / "llm", "model.decoder.final_layer_norm.bias"), {}, "final_layer_norm.bias` is missing"),
        (_put("model.decoder.embed_tokens.weight", lambda old: old + 1), {}, "is not what model.pth was trained with"),
        (_put("model.decoder.embed_tokens.weight", lambda old: old[:9]), {}, "is not what model.pth was trained with"),
        (_put("somewhere.else", lambda _: torch.ones(3)), {}, "`language_model.somewhere.else`, which no part"),
        (_put("model.decoder.layers.0.fc1.SCB", lambda _: torch.ones(3)), {}, "so its weights are quantized"),
    ],
)
def test_what_a_stage_2_file_lacks_or_holds_too_much(tmp_path: Path, damage, given: dict, said: str) -> None:
    write_lavis(tmp_path / "l", STAGE_2, 1)
    whole = parts(tmp_path / "l")
    damage(tmp_path / "l")
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "l" / "model.pth", tmp_path / "b", Choices("x", golden=False, parts=replace(whole, **given)))
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


def _drop(folder: Path, name: str) -> None:
    held = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in held.items() if n != name}, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["model.pth", "vision.pth"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    write_lavis(tmp_path / "l", EVA, 1)
    content = torch.load(tmp_path / "l" / name, weights_only=True)
    torch.save({**content, "more": _Harm(tmp_path / "harmed")}, tmp_path / "l" / name)
    with pytest.raises(CheckpointError, match=r"pickle asks for `posix\.mkdir`; only files of plain tensors are read"):
        convert(tmp_path / "l" / "model.pth", tmp_path / "b", Choices("x", parts=parts(tmp_path / "l")))
    (tmp_path / "l" / name).write_bytes(pickle.dumps({"model": _Harm(tmp_path / "harmed")}))
    with pytest.raises(CheckpointError, match=r"pickle|not a readable"):
        convert(tmp_path / "l" / "model.pth", tmp_path / "b", Choices("x", parts=parts(tmp_path / "l")))
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


def test_files_in_the_older_form_are_read(tmp_path: Path) -> None:
    write_lavis(tmp_path / "l", EVA, 1)
    content = torch.load(tmp_path / "l" / "model.pth", weights_only=True)
    torch.save(content, tmp_path / "l" / "model.pth", _use_new_zipfile_serialization=False)
    checkpoint = LavisCheckpoint(tmp_path / "l" / "model.pth", parts(tmp_path / "l"))
    assert np.array_equal(checkpoint.tensor("query_tokens"), content["model"]["query_tokens"].numpy())


def test_parts_go_with_a_file_only(tmp_path: Path) -> None:
    random_checkpoint.write(tmp_path / "c", "tiny", 0)
    with pytest.raises(CheckpointError, match="go with a LAVIS file"):
        convert(tmp_path / "c", tmp_path / "b", Choices("x", parts=Parts(llm=tmp_path / "c")))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
