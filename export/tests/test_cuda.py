"""The `cuda` and `tensorrt` targets without a GPU: every node has a kernel of its type, and numbers are those of the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kernels import readers_of_shapes, without_kernel
from lifted import lift
from safetensors.torch import load_file, save_file
from test_engine import ENGINE

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.engine import run_engine
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.graphs.precision import EXACT, Precision, Precisions
from blip2_export.reference.generation import Reference
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

WIDE = {  # widths that divide into blocks
    "text_config": {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 4, "ffn_dim": 96},
    "qformer_config": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96},
    "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96},
}
WIDE_T5 = {
    "text_config": {"model_type": "t5", "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96},
}
NAMES = (
    "tiny",
    "odd-1",
    "odd-5",
    "odd-9",
    "t5",
    "t5-odd-2",
    "instruct-llama",
    "instruct-llama-odd-1",
    "vqa-opt",
    "vqa-t5",
)
SHAPES: dict[str, Any] = {
    **{name: name for name in (*NAMES, "itg-tiny", "itg-odd-1")},
    "wide": WIDE,
    "wide-t5": WIDE_T5,
}
BRAIN = Precisions(*[Precision.BFLOAT16] * 3)
FLOATS = {"natural": Precisions(), "bfloat16": BRAIN, "float32": EXACT}
N_NEW = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(checkpoint, bundle) of a shape, made once."""
    done: dict[tuple[str, str, Precisions], tuple[Path, Path]] = {}

    def make(shape: str, precisions: Precisions, target: str = "cuda") -> tuple[Path, Path]:
        key = shape, target, precisions
        if key not in done:
            root = tmp_path_factory.mktemp(shape)
            stage_1 = shape in random_retrieval.SHAPES
            writer: Any = random_retrieval if stage_1 else random_checkpoint
            seed = sorted(SHAPES).index(shape)
            writer.write(root / "c", SHAPES[shape], seed, torch.bfloat16)  # which both types of 16 bits hold
            convert(
                root / "c", root / "b", Choices("x", golden=False, loss=False, target=target, precisions=precisions)
            )
            done[key] = root / "c", root / "b"
        return done[key]

    return make


@pytest.mark.parametrize("precision", sorted(FLOATS))
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_every_node_has_a_kernel_of_its_type(made, shape: str, precision: str) -> None:
    _, folder = made(shape, FLOATS[precision])
    for path in sorted(folder.glob("*.onnx")):
        assert without_kernel(path) == [], path.name
        assert readers_of_shapes(path) <= {"Slice", "Expand"}, f"{path.name} computes with a shape"


@pytest.mark.parametrize("precision", [Precision.INT8_BLOCKS, Precision.INT4_BLOCKS])
@pytest.mark.parametrize(("shape", "kind"), [("wide", "float16"), ("wide-t5", "bfloat16")])
def test_every_node_of_a_bundle_in_blocks_has_a_kernel(made, shape: str, kind: str, precision: Precision) -> None:
    _, folder = made(shape, Precisions(language=precision))
    for path in sorted(folder.glob("*.onnx")):
        assert without_kernel(path) == [], path.name
    facts = json.loads((folder / "bundle.json").read_text())
    assert facts["language"]["kv_cache"]["dtype"] == kind and facts["graphs"]["decoder"]["block_size"] == 32
    nodes = onnx.load(folder / "decoder.onnx", load_external_data=False).graph.node
    sizes = {a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "block_size"}
    assert sizes == {32}


@pytest.mark.parametrize("shape", ["tiny", "wide"])
def test_a_processors_bundle_is_told_from_one_for_cuda(tmp_path: Path, shape: str) -> None:
    random_checkpoint.write(tmp_path / "c", SHAPES[shape], 3)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    assert "GroupQueryAttention" in str(without_kernel(tmp_path / "b" / "decoder.onnx")), "of float32 there is none"


@pytest.mark.parametrize(
    ("shape", "precisions", "tolerance"),
    [
        ("tiny", Precisions(), 4e-3),
        ("odd-1", Precisions(), 4e-3),
        ("odd-9", Precisions(), 4e-3),
        ("instruct-llama", Precisions(), 4e-3),
        ("instruct-llama-odd-1", Precisions(), 4e-3),
        ("tiny", BRAIN, 4e-3),
        ("t5", Precisions(), 4e-3),
        ("t5-odd-2", BRAIN, 4e-3),
        ("vqa-t5", Precisions(), 4e-3),
        ("wide", Precisions(language=Precision.INT8_BLOCKS), 0.3),
        ("wide-t5", Precisions(language=Precision.INT8_BLOCKS), 0.3),
    ],
)
def test_graphs_of_16_bits_are_near_the_reference(made, shape: str, precisions: Precisions, tolerance: float) -> None:
    """The processor has no kernels of bfloat16, so there the same graphs run with their types and weights lifted."""
    checkpoint, folder = made(shape, precisions)
    graphs = Graphs(lift(folder))
    reference = Reference(checkpoint, graphs.facts)
    seen = [reference.look(p) for p in drawing.sample_pictures(3, seed=3, side=120)]
    features = graphs.features(np.stack([pixels for pixels, _ in seen]))
    assert_near(features, np.stack([f for _, f in seen]), tolerance, "features")
    asked = ("Question: what colour is the star? Answer:", "what colour is the star?")
    questions = [reference.question_ids(*asked)] * len(seen) if reference.question else None
    queries = graphs.queries(features, questions)
    assert_near(queries, np.stack([reference.queries(f, *asked) for _, f in seen]), tolerance, "queries")
    told = [reference.generate(pixels, asked[0], N_NEW, asked[1]) for pixels, _ in seen]
    logits, tokens = graphs.greedy(queries, [ids for ids, *_ in told], N_NEW)
    assert_near(logits, np.stack([t[1] for t in told]), tolerance, "first logits")
    assert [found[0] for found in tokens] == [t[2][0] for t in told]


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float, stage: str) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{stage}: relative error {error:.2e}, allowed {tolerance:.0e}"


def test_float16_runs_as_it_is_where_the_processor_has_kernels(made) -> None:
    _, folder = made("tiny", Precisions())
    pixels = np.random.default_rng(1).standard_normal((2, 3, 28, 28), np.float32)
    as_it_is, lifted = Graphs(folder), Graphs(lift(folder))
    assert_near(as_it_is.features(pixels), lifted.features(pixels), 2e-3, "features")


@pytest.mark.parametrize("shape", ["tiny", "t5", "vqa-t5", "itg-tiny"])
def test_tensorrt_gets_standard_operators_and_the_range_of_every_size(made, shape: str) -> None:
    _, folder = made(shape, Precisions(), "tensorrt")
    graphs = json.loads((folder / "bundle.json").read_text())["graphs"]
    for name, said in graphs.items():
        model = onnx.load(folder / said["file"], load_external_data=False)
        foreign = {node.op_type for node in model.graph.node if node.domain}
        if name in ("encoder", "decoder"):
            assert foreign and "profile" not in said and without_kernel(folder / said["file"]) == []
            continue
        assert not foreign
        axes = {axis for value in said["inputs"] for axis in value["shape"] if isinstance(axis, str)}
        assert axes == set(said["profile"]) and "batch" in axes
        assert all(1 <= least <= best <= most for least, best, most in said["profile"].values())


@pytest.mark.parametrize("shape", ["tiny", "vqa-opt"])
def test_tensorrt_graphs_of_16_bits_are_near_the_reference(made, shape: str) -> None:
    checkpoint, folder = made(shape, Precisions(), "tensorrt")
    graphs = Graphs(lift(folder))
    reference = Reference(checkpoint, graphs.facts)
    pixels, features = reference.look(drawing.sample_pictures(1, seed=3, side=120)[0])
    assert_near(graphs.features(pixels[None])[0], features, 4e-3, "features")
    questions = [reference.question_ids("", "what colour is the star?")] * 2 if reference.question else None
    queries = graphs.queries(np.stack([features] * 2), questions)
    assert_near(queries[1], reference.queries(features, "", "what colour is the star?"), 4e-3, "queries")


@pytest.mark.parametrize(
    ("shape", "target", "precisions", "said"),
    [
        ("t5", "cuda", Precisions(language=Precision.FLOAT16), "Flan-T5 overflows float16; bfloat16 is possible"),
        ("t5", "tensorrt", Precisions(language=Precision.FLOAT16), "Flan-T5 overflows float16; bfloat16 is possible"),
        ("tiny", "cuda", Precisions(language=Precision.INT8), "graphs for cuda cannot be int8; float32, float16"),
        ("tiny", "webgpu", Precisions(vision=Precision.INT8), "graphs for webgpu cannot be int8; float32 are possible"),
        ("tiny", "tensorrt", Precisions(vision=Precision.INT8_BLOCKS), "graphs for tensorrt cannot be int8-blocks"),
        ("tiny", "cpu", Precisions(vision=Precision.FLOAT16), "graphs for cpu cannot be float16"),
        (
            "odd-1",
            "cuda",
            Precisions(language=Precision.INT4_BLOCKS),
            "rows of 60 weights do not divide into blocks of 32",
        ),
    ],
)
def test_a_precision_that_a_target_cannot_run_is_refused(
    tmp_path: Path, shape: str, target: str, precisions: Precisions, said: str
) -> None:
    random_checkpoint.write(tmp_path / "c", SHAPES[shape], 3)
    with pytest.raises(UnsupportedError, match=said):
        convert(
            tmp_path / "c", tmp_path / "b", Choices("x", golden=False, loss=False, target=target, precisions=precisions)
        )
    assert not (tmp_path / "b").exists()


def test_weights_beyond_float16_are_refused_and_not_made_infinite(tmp_path: Path) -> None:
    random_checkpoint.write(tmp_path / "c", "tiny", 3)
    weights = load_file(tmp_path / "c" / "model.safetensors")
    weights["language_projection.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="qformer has weights beyond float16; bfloat16 or float32 holds them"):
        convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False, loss=False, target="cuda"))
    convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False, loss=False, target="cuda", precisions=BRAIN))


def test_what_nobody_chose_is_natural_for_the_target(made) -> None:
    for shape, kind in (("tiny", "float16"), ("t5", "bfloat16")):
        facts = json.loads((made(shape, Precisions())[1] / "bundle.json").read_text())
        assert facts["language"]["kv_cache"]["dtype"] == kind
        assert [facts["graphs"][g]["precision"] for g in ("vision", "qformer", "decoder")] == ["float16"] * 2 + [kind]


@pytest.mark.parametrize("shape", ["tiny", "instruct-llama", "itg-tiny"])
def test_the_engine_keeps_caches_of_float16(tmp_path: Path, shape: str) -> None:
    """Its graphs run on the processor, where some are lifted behind its back."""
    writer: Any = random_retrieval if shape in random_retrieval.SHAPES else random_checkpoint
    writer.write(tmp_path / "c", SHAPES[shape], 3)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", target="cuda"))
    run_engine(ENGINE, "verify", str(tmp_path / "b"), "--provider", "cpu")
