"""Stage-1 bundles against `transformers` where it has the mask, against the paper's formulas where it has not."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from converted import converted
from safetensors.torch import load_file, save_file
from stage1_reference import HUGGING_FACE, Stage1, lift
from table import table_type
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Blip2ForImageTextRetrieval

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.graphs.positions import resize
from blip2_export.graphs.targets import TARGETS
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.reference.pictures import preparation
from blip2_export.reference.retrieval import TEXTS
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.scenes import drawing

SHAPES = sorted(random_retrieval.SHAPES)
WRITING = [s for s in SHAPES if s.startswith("itg")]
TOLERANCE = 1e-4
N_NEW = 12


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(checkpoint, graphs) of a shape, made once."""
    return converted(
        tmp_path_factory,
        lambda folder, shape: random_retrieval.write(folder, shape, seed=10 + SHAPES.index(shape)),
        Stage1Graphs,
    )


@pytest.fixture(scope="session")
def told(made):
    """What `transformers` says of pictures and texts, for every target the same, and how many queries a shape has."""

    @functools.cache
    def of(shape: str) -> tuple[Any, Any, int]:
        checkpoint, graphs = made(shape)
        model = Blip2ForImageTextRetrieval.from_pretrained(checkpoint, dtype=torch.float32).eval()
        model.config.image_token_index = None  # texts come without image tokens in front
        ids, mask = texts(graphs)
        inputs = {"pixel_values": pictures(graphs, len(ids)), "input_ids": ids, "attention_mask": mask}
        with torch.inference_mode():
            given = {name: torch.from_numpy(value) for name, value in inputs.items()}
            itm = model(**given, use_image_text_matching_head=True)
            return model(**given), itm, model.query_tokens.shape[1]

    return of


def assert_close(found: np.ndarray, expected: torch.Tensor | np.ndarray, stage: str) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape, f"{stage}: {found.shape}, expected {expected.shape}"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{stage}: relative error {error:.2e}, allowed {TOLERANCE:.0e}"


def pictures(graphs: Stage1Graphs, n: int, checkpoint: Path | None = None) -> np.ndarray:
    """As the image processor beside a checkpoint makes them; of a LAVIS file as LAVIS does."""
    image = graphs.facts["image"]
    folder = None if image["alpha"] == "drop" else checkpoint or graphs.folder.parent / "c"
    prepare = preparation(folder, image)
    return np.stack([prepare(p) for p in drawing.sample_pictures(n, seed=3, side=120)])


def texts(graphs: Stage1Graphs) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of texts of three lengths, the longest cut."""
    text = graphs.facts["qformer"]["text"]
    tokenizer = Tokenizer.from_file(str(graphs.folder / text["tokenizer"]))
    tokenizer.enable_truncation(text["max_tokens"])
    tokenizer.enable_padding(pad_id=text["pad"])
    found = tokenizer.encode_batch(list(TEXTS))
    assert max(len(f.ids) for f in found) == text["max_tokens"] > min(sum(f.attention_mask) for f in found)
    return np.array([f.ids for f in found]), np.array([f.attention_mask for f in found])


def formulas(checkpoint: Path) -> Stage1:
    cfg = json.loads((checkpoint / "config.json").read_text())["qformer_config"]
    weights = lift(load_file(checkpoint / "model.safetensors"))
    return Stage1(weights, HUGGING_FACE, cfg["num_attention_heads"], cfg["cross_attention_frequency"])


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != "itg-clip"])
def test_embeddings_and_matching_equal_transformers_alone_and_in_ragged_batches(
    made, told, shape: str, target: str
) -> None:
    _, graphs = made(shape, target)
    itc, itm, n_queries = told(shape)
    ids, mask = texts(graphs)
    features = graphs.features(pictures(graphs, len(ids)))
    assert_close(features, itc.vision_model_output.last_hidden_state, "features")
    image, text = (
        graphs.run("qformer", image_features=features),
        graphs.run("qformer_text", input_ids=ids, attention_mask=mask),
    )
    assert_close(image["image_embeds"], itc.image_embeds, "image_embeds")
    assert_close(text["text_embeds"][:, 0], itc.text_embeds, "text_embeds")
    real = mask.astype(bool)
    assert_close(text["text_states"][real], itc.text_model_output.last_hidden_state.numpy()[real], "text_states")
    cosines = np.einsum("iqd,td->itq", image["image_embeds"], text["text_embeds"][:, 0]).max(-1)
    assert_close(cosines, itc.logits_per_image, "itc")
    match = graphs.run("qformer_itm", image_features=features, input_ids=ids, attention_mask=mask)
    assert_close(match["itm_logits"], itm.logits_per_image, "itm_logits")
    states = itm.text_model_output.last_hidden_state[:, :n_queries]
    assert_close(match["multimodal_states"], states, "multimodal_states")
    assert np.std(match["itm_logits"], axis=0).max() > 1e-2, "the checkpoint does not tell pairs apart"
    for row in range(len(ids)):
        n = mask[row].sum()
        one = {"input_ids": ids[row : row + 1, :n], "attention_mask": mask[row : row + 1, :n]}
        alone = graphs.run("qformer_itm", image_features=features[row : row + 1], **one)
        assert_close(alone["itm_logits"][0], match["itm_logits"][row], "itm_logits of one pair")
        alone = graphs.run("qformer_text", **one)
        assert_close(alone["text_embeds"][0, 0], text["text_embeds"][row, 0], "text_embeds of one text")


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("shape", WRITING)
def test_every_mask_equals_the_formulas(made, shape: str, target: str) -> None:
    checkpoint, graphs = made(shape, target)
    model = formulas(checkpoint)
    ids, mask = texts(graphs)
    features = graphs.features(pictures(graphs, len(ids)))
    given = torch.from_numpy(features)
    image = graphs.run("qformer", image_features=features)
    assert_close(image["query_states"], model.queries(given), "query_states")
    assert_close(image["image_embeds"], model.image(given), "image_embeds")
    real = mask.astype(bool)
    text = graphs.run("qformer_text", input_ids=ids, attention_mask=mask)["text_embeds"]
    assert_close(text[real], model.text_embeds(torch.from_numpy(ids), torch.from_numpy(mask))[real], "text_embeds")
    match = graphs.run("qformer_itm", image_features=features, input_ids=ids, attention_mask=mask)
    logits, states = model.match(given, torch.from_numpy(ids), torch.from_numpy(mask))
    assert_close(match["itm_logits"], logits, "itm_logits")
    assert_close(match["multimodal_states"], states, "multimodal_states")


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("shape", WRITING)
def test_writing_with_the_cache_equals_the_whole_sequence_at_every_step(made, shape: str, target: str) -> None:
    checkpoint, graphs = made(shape, target)
    model, ids = formulas(checkpoint), graphs.facts["language"]["token_ids"]
    features = graphs.features(pictures(graphs, 6))
    wanted, steps = model.write(torch.from_numpy(features), ids["bos"], ids["eos"][0], N_NEW)
    tokens, logits = graphs.write(features, N_NEW)
    assert tokens == wanted
    for row, expected in enumerate(steps):
        assert_close(logits[row], expected, f"logits of row {row}")
    assert max(len(set(t)) for t in wanted) > 3, "it repeats itself; these weights test little"
    assert graphs.write(features[2:3], N_NEW)[0] == wanted[2:3], "a row gives other tokens alone than in a batch"
    for n in range(1, 6):
        forced = [7, 12, 9, 31, 8][:n]
        _, logits = graphs.write(features[n : n + 1], 2, forced)
        expected = model.writing_logits(torch.from_numpy(features[n : n + 1]), torch.tensor([[ids["bos"], *forced]]))
        assert_close(logits[0][0], expected[0, -1], f"logits behind {n} given tokens")


def test_a_16_bit_checkpoint_keeps_its_size_and_equals_the_lifted_formulas(tmp_path: Path) -> None:
    random_retrieval.write(tmp_path / "c", "itg-odd-1", 1, torch.bfloat16)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    graphs, model = Stage1Graphs(tmp_path / "b"), formulas(tmp_path / "c")
    assert table_type(tmp_path / "b") == onnx.TensorProto.BFLOAT16
    features = graphs.features(pictures(graphs, 2))
    ids = graphs.facts["language"]["token_ids"]
    tokens, logits = graphs.write(features, N_NEW)
    wanted, steps = model.write(torch.from_numpy(features), ids["bos"], ids["eos"][0], N_NEW)
    assert tokens == wanted
    assert_close(logits[0], steps[0], "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_q_former_graphs_share_one_file_that_holds_every_weight_once(tmp_path: Path, dtype: torch.dtype) -> None:
    random_retrieval.write(tmp_path / "c", "itg-tiny", 4, dtype)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    facts = json.loads((tmp_path / "b" / "bundle.json").read_text())
    stored = {p.name: p.stat().st_size for p in (tmp_path / "b").glob("*.data")}
    assert set(stored) == {"vision.onnx.data", "qformer.onnx.data"}
    assert {name: facts["files"][name]["bytes"] for name in stored} == stored
    assert sum(stored.values()) < 1.05 * (tmp_path / "c" / "model.safetensors").stat().st_size
    words = load_file(tmp_path / "c" / "model.safetensors")["embeddings.word_embeddings.weight"].numpy()
    assert (tmp_path / "b" / "qformer.onnx.data").read_bytes().count(words.tobytes()) == 1


def test_facts_say_what_the_checkpoint_can(made) -> None:
    checkpoint, graphs = made("itg-odd-1")
    facts, weights = graphs.facts, load_file(checkpoint / "model.safetensors")
    assert facts["family"] == "qformer" and facts["tasks"] == ["match", "embed", "caption"]
    assert facts["qformer"]["temperature"] == pytest.approx(float(weights["temp"]), rel=1e-6)
    assert (facts["qformer"]["n_queries"], facts["qformer"]["hidden"], facts["qformer"]["joint"]) == (5, 60, 13)
    assert facts["language"]["max_positions"] == 5 + 64
    assert facts["generation"] == {"caption": {"max_new_tokens": 30, "beams": 3}} and facts["prompts"] == {
        "caption": ""
    }
    assert facts["language"]["kv_cache"]["head_dim"] == 24
    tokenizer = Tokenizer.from_file(str(graphs.folder / "qformer_tokenizer.json"))
    assert facts["language"]["token_ids"]["bos"] == tokenizer.token_to_id("[DEC]") == tokenizer.get_vocab_size() - 1
    only = made("itm-odd")[1].facts
    assert only["tasks"] == ["match", "embed"] and not only["prompts"] and not only["generation"]
    assert "language" not in only and "temperature" not in only["qformer"] and "decoder" not in only["graphs"]
    assert not (graphs.folder / "tokenizer.json").exists()


def test_goldens_of_every_task_are_recorded_and_equal_the_graphs(tmp_path: Path) -> None:
    random_retrieval.write(tmp_path / "c", "itg-clip", 0)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", caption_tokens=N_NEW, beams=1))
    graphs = Stage1Graphs(tmp_path / "b")
    assert graphs.facts["generation"] == {"caption": {"max_new_tokens": N_NEW, "beams": 1}}
    golden = json.loads((tmp_path / "b" / "golden" / "golden.json").read_text())
    assert [c["task"] for c in golden["cases"]] == ["match", "embed", "caption"] * 3

    def read(said: dict) -> np.ndarray:
        return np.fromfile(tmp_path / "b" / said["file"], "<f4").reshape(said["shape"])

    for case in golden["cases"]:
        features = graphs.features(read(case["pixels"])[None])
        assert_close(features[0], read(case["features"]), "features")
        image = graphs.run("qformer", image_features=features)
        assert_close(image["query_states"][0], read(case["queries"]), "queries")
        if case["task"] == "caption":
            tokens, logits = graphs.write(features, case["max_new_tokens"])
            assert tokens == [case["tokens"]] and case["prompt_ids"] == [graphs.facts["language"]["token_ids"]["bos"]]
            assert_close(logits[0][0], read(case["first_logits"]), "first_logits")
            continue
        for said in case["texts"] if case["task"] == "match" else [case]:
            ids = np.array([said["input_ids"]])
            text = graphs.run("qformer_text", input_ids=ids, attention_mask=np.ones_like(ids))["text_embeds"][0]
            match = graphs.run("qformer_itm", image_features=features, input_ids=ids, attention_mask=np.ones_like(ids))
            if case["task"] == "match":
                assert_close(match["itm_logits"][0], np.array(said["itm_logits"]), "itm_logits")
                assert said["probability"] == pytest.approx(
                    float(torch.tensor(said["itm_logits"]).softmax(0)[1]), rel=1e-5
                )
                assert (image["image_embeds"][0] @ text[0]).max() == pytest.approx(said["itc"], abs=1e-5)
            else:
                assert_close(text, read(said["text_embeds"]), "text_embeds")
                assert_close(image["image_embeds"][0], read(said["image_embeds"]), "image_embeds")
                assert_close(match["multimodal_states"][0], read(said["multimodal_states"]), "multimodal_states")


@pytest.mark.parametrize(("n_in", "n_out"), [(16, 26), (16, 35), (26, 16), (3, 7), (2, 5), (4, 1)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_position_embeddings_are_interpolated_as_pytorch_does(n_in: int, n_out: int, align_corners: bool) -> None:
    table = torch.randn(1, 1 + n_in**2, 6, generator=torch.Generator().manual_seed(n_in))
    grid = table[:, 1:].reshape(1, n_in, n_in, 6).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(n_out, n_out), mode="bicubic", align_corners=align_corners)
    expected = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, 6)], 1)
    assert np.abs(resize(table.numpy(), n_out, align_corners) - expected.numpy()).max() < 1e-5


def test_another_image_size_equals_transformers_interpolation(made, tmp_path: Path) -> None:
    checkpoint, _ = made("itm-tiny")
    convert(checkpoint, tmp_path / "b", Choices("x", image_size=70))
    graphs = Stage1Graphs(tmp_path / "b")
    assert graphs.facts["image"]["size"] == 70 and graphs.facts["vision"]["n_positions"] == 26
    model = Blip2ForImageTextRetrieval.from_pretrained(checkpoint, dtype=torch.float32).eval()
    pixels = pictures(graphs, 2, checkpoint)
    with torch.inference_mode():
        seen = model.vision_model(torch.from_numpy(pixels), interpolate_pos_encoding=True).last_hidden_state
    assert_close(graphs.features(pixels), seen, "features")
    with pytest.raises(UnsupportedError, match="no multiple of the patch size"):
        convert(checkpoint, tmp_path / "no", Choices("x", image_size=71))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_captions_of_stage_1_take_no_prompt_and_a_search_needs_a_beam(made, tmp_path: Path) -> None:
    for choices, said in ((Choices("x", caption_prompt="a"), "take no prompt"), (Choices("x", beams=0), "0 beams")):
        with pytest.raises(CheckpointError, match=said):
            convert(made("itg-tiny")[0], tmp_path / "b", choices)
    assert not list(tmp_path.iterdir())


def _drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({n: v for n, v in weights.items() if n != name}, folder / "model.safetensors")


def _put(folder: Path, name: str, *shape: int) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, name: torch.zeros(shape)}, folder / "model.safetensors")


def _without_start(folder: Path) -> None:
    tokenizer = random_checkpoint.word_piece_tokenizer()
    tokenizer.add_special_tokens(["[ENC]"])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: _drop(f, "itm_head.weight"), "`itm_head.weight` is missing"),
        (lambda f: _drop(f, "qformer.encoder.layer.1.intermediate.dense.bias"), "intermediate.dense.bias` is missing"),
        (lambda f: _drop(f, "cls.predictions.transform.dense.weight"), "transform.dense.weight` is missing"),
        (lambda f: _put(f, "text_projection.weight", 24, 31), r"`text_projection.weight` is \[24, 31\]"),
        (lambda f: _put(f, "cls.predictions.bias", 5), r"`cls.predictions.bias` is \[5\]"),
        (lambda f: _put(f, "temp", 2), "`temp` is no single number"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "not valid JSON"),
        (_without_start, r"no \[DEC\]"),
    ],
)
def test_what_cannot_be_converted_gets_one_sentence_and_leaves_nothing(made, tmp_path: Path, damage, said: str) -> None:
    shutil.copytree(made("itg-tiny")[0], tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
