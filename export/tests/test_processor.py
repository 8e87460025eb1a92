"""Settings of image processors and tokenizers: done as the reference's classes do them, or refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_engine import ENGINE
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.engine import run_engine
from blip2_export.graphs import builder
from blip2_export.read import processor, tokenizers
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.reference import pictures

SIDE = 28
SQUARE = {"height": SIDE, "width": SIDE}
BLIP: dict[str, Any] = {"image_processor_type": "BlipImageProcessor", "size": SQUARE}
CROPPED = {"size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": SIDE}
TEXTS = ("", "a photo of", "  Two dogs, 12 cats !", "Question: what colour is the star, and where is the ring? Answer:")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for shape in ("tiny", "t5", "instruct-t5"):
        random_checkpoint.write(root / shape, shape, seed=1)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def folder(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(builder, "on_grid", lambda array: None)  # how weights are stored is no matter here
    shutil.copytree(checkpoints["tiny"], tmp_path / "c")
    return tmp_path / "c"


def settle(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (BLIP, {}),
        ({**BLIP, "image_processor_type": "BlipImageProcessorFast"}, {}),
        ({"feature_extractor_type": "BlipFeatureExtractor", "size": SIDE}, {}),
        ({"size": [SIDE, SIDE]}, {}),  # the class of config.json
        ({**BLIP, "size": SIDE, "resample": 2, "crop_size": 99, "do_pad": True}, {"resample": "bilinear"}),
        ({**BLIP, "resample": 1}, {"resample": "lanczos"}),
        ({**BLIP, "do_resize": None}, {"resize": "keep"}),  # null is off, not the class's default
        ({**BLIP, **CROPPED}, {"resize": {"shortest_edge": 32}, "center_crop": True}),
        (
            {**CROPPED, "image_processor_type": "CLIPImageProcessor"},
            {"resize": {"shortest_edge": 32}, "center_crop": True},
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": SQUARE},
            {"resize": {"shortest_edge": 20}, "center_crop": True},
        ),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"height": 30, "width": 40}, "crop_size": SQUARE},
            {"resize": {"exact": {"width": 40, "height": 30}}, "center_crop": True},
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": SIDE},
            {"mean": [0.5] * 3, "std": [0.5] * 3, "resample": "bilinear"},
        ),
        ({**BLIP, "do_resize": False}, {"resize": "keep"}),
        (
            {**BLIP, "do_resize": False, "do_center_crop": True, "crop_size": SQUARE},
            {"resize": "keep", "center_crop": True},
        ),
        ({**BLIP, "size": {"shortest_edge": SIDE}}, {"resize": {"shortest_edge": SIDE}}),
        ({**BLIP, "do_rescale": False}, {"rescale": 1.0}),
        ({**BLIP, "rescale_factor": 1 / 127.5}, {"rescale": 1 / 127.5}),
        ({**BLIP, "do_normalize": False, "image_std": [0, 0, 0]}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        ({**BLIP, "image_mean": 0.5, "image_std": 0.25}, {"mean": [0.5] * 3, "std": [0.25] * 3}),
        ({**BLIP, "do_convert_rgb": False}, {}),
        ({**BLIP, "do_pad": True, "pad_size": SQUARE}, {}),
    ],
)
def test_settings_are_done_as_the_reference_does_them(
    folder: Path, settings: dict[str, Any], said: dict[str, Any]
) -> None:
    settle(folder, settings)
    facts = processor.image_facts(folder, SIDE)
    assert {key: facts.get(key) for key in said} == said
    for key in ("resize", "center_crop"):
        assert (key in facts) == (key in said)
    made = AutoImageProcessor.from_pretrained(folder, backend="pil")
    shown = list(pictures.shown(pictures.preparation(folder, facts), SIDE))
    assert len(shown) == 3
    for picture, pixels in shown:
        assert np.array_equal(pixels, np.asarray(made(images=picture)["pixel_values"][0], np.float32))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**BLIP, "size": {"height": 30, "width": 28}}, "resizes to"),
        ({**BLIP, "size": 30}, "the image encoder takes 28×28"),
        ({**BLIP, "size": {"shortest_edge": 30}}, "the image encoder takes 28×28"),
        (
            {**BLIP, "size": {"shortest_edge": 28, "longest_edge": 40}},
            "height and width, or shortest_edge, are supported",
        ),
        ({**BLIP, "size": {"max_height": 28, "max_width": 28}}, "height and width, or shortest_edge, are supported"),
        ({**BLIP, "size": {**SQUARE, "depth": 3}}, "makes no image processor"),
        ({**BLIP, "size": {"height": 28.0, "width": 28.0}}, "whole numbers from 1 to 4096"),
        (
            {**BLIP, "size": {"shortest_edge": 10**9}, "do_center_crop": True, "crop_size": 28},
            "whole numbers from 1 to 4096",
        ),
        ({**BLIP, **CROPPED, "crop_size": 30}, "crops to"),
        ({**BLIP, "do_center_crop": True}, "crops to"),
        ({**BLIP, "do_pad": True, "pad_size": 10**9}, "pads to"),
        ({**BLIP, "resample": None}, "resamples with None"),
        ({**BLIP, "resample": 0}, "resamples with nearest"),
        ({**BLIP, "resample": 4}, "resamples with box"),
        ({**BLIP, "resample": 9}, "resamples with 9"),
        ({**BLIP, "resample": "bicubic"}, "resamples with bicubic"),
        ({**BLIP, "image_mean": [0.5, 0.5]}, "three numbers are needed"),
        ({**BLIP, "image_std": [0.5, 0.5, 0]}, "three numbers above 0 are needed"),
        ({**BLIP, "image_std": [0.5, 0.5, float("nan")]}, "image_std"),
        ({**BLIP, "rescale_factor": "1/255"}, "rescale_factor"),
        ({**BLIP, "image_processor_type": "NoSuchProcessor"}, "makes no image processor"),
        ({**BLIP, "image_processor_type": 5}, "makes no image processor"),
        ({**BLIP, "image_processor_type": "BertTokenizer"}, "no image processor that runs on Pillow"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}}, "makes other pixels"),
    ],
)
def test_what_a_bundle_cannot_say_is_refused(folder: Path, settings: dict[str, Any], said: str) -> None:
    settle(folder, settings)
    with pytest.raises(CheckpointError, match=said):
        processor.image_facts(folder, SIDE)


def _fails(*_: Any) -> Any:
    raise RuntimeError("other arguments")


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("ConvNextImageProcessor", lambda patch: None, "other pixels"),
        ("NoSuchProcessor", lambda patch: None, "makes no image processor"),
        (
            "BlipImageProcessor",
            lambda patch: patch.setitem(sys.modules, "transformers.image_processing_backends", None),
            "makes no image processor",
        ),
        ("BlipImageProcessor", lambda patch: patch.setattr(processor, "pixels", _fails), "fails on a picture"),
    ],
)
def test_another_version_of_the_reference_is_named_where_it_may_be_to_blame(
    folder: Path, kind: str, spoil: Callable[..., None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(folder, {"image_processor_type": kind, "size": {"shortest_edge": SIDE} if "Conv" in kind else SQUARE})
    spoil(monkeypatch)
    for version, is_named in ((f"{processor._TRANSFORMERS}.9", False), ("4.57.1", True), ("5.2.3", True)):
        monkeypatch.setattr(processor, "version", lambda _, version=version: version)
        with pytest.raises(CheckpointError, match=said) as refused:
            processor.image_facts(folder, SIDE)
        blame = f"; transformers {version} is installed, export/requirements.txt pins {processor._TRANSFORMERS}"
        assert (blame in str(refused.value)) == is_named, refused.value


def test_the_pinned_version_is_that_of_the_requirements() -> None:
    wanted = (Path(__file__).parents[1] / "requirements.txt").read_text()
    assert f"\ntransformers=={processor._TRANSFORMERS}." in wanted


def test_another_image_size_goes_with_processors_that_make_squares(folder: Path) -> None:
    settle(folder, BLIP)
    assert processor.image_facts(folder, 42, resized=True)["size"] == 42
    settle(folder, {**BLIP, **CROPPED})
    with pytest.raises(CheckpointError, match="--image-size cannot"):
        processor.image_facts(folder, 42, resized=True)


def test_lavis_pixels_are_those_of_a_square_over_stored_colours() -> None:
    facts = processor.image_facts(None, SIDE)
    prepare = pictures.preparation(None, facts)
    for picture in pictures.drawn():
        square = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        wanted = (np.asarray(square, np.float32) / 255 - np.float32(facts["mean"])) / np.float32(facts["std"])
        assert np.abs(prepare(picture) - wanted.transpose(2, 0, 1)).max() < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {**BLIP, **CROPPED},
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 20},
            "crop_size": SQUARE,
            "do_normalize": False,
        },
        {**BLIP, "do_resize": False, "do_center_crop": True, "crop_size": SQUARE},
        {**BLIP, "size": {"shortest_edge": SIDE}, "do_convert_rgb": False, "resample": 1},
        {**BLIP, "size": {"height": 40, "width": 30}, "do_center_crop": True, "crop_size": SQUARE, "do_rescale": False},
    ],
)
def test_the_engine_verifies_a_bundle_of_any_of_them(folder: Path, settings: dict[str, Any]) -> None:
    settle(folder, settings)
    verified(folder)


def verified(folder: Path) -> dict[str, Any]:
    """The golden of a converted folder that the engine agrees with."""
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    out = folder.with_name("b")
    convert(folder, out, Choices("x", caption_tokens=4, ask_tokens=4, beams=1))
    run_engine(ENGINE, "verify", str(out))
    return json.loads((out / "golden" / "golden.json").read_text())


def test_a_tokenizer_file_that_cuts_and_fills_up_does_neither_in_a_bundle(folder: Path) -> None:
    """As the reference's tokenizer, called without options."""
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0}
    edit(folder / "tokenizer.json", truncation=cut, padding={**pad, "pad_token": "<pad>"})
    edit(folder / "tokenizer_config.json", model_max_length=4, padding_side="left", chat_template="{{ messages }}")
    golden = verified(folder)
    assert max(len(case["prompt_ids"]) for case in golden["cases"]) > 4
    made = json.loads((folder.with_name("b") / "tokenizer.json").read_text())
    assert made["truncation"] is None and made["padding"] is None


_STAR = {"content": "star", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": False}


@pytest.mark.parametrize(
    ("shape", "settings", "special", "changed"),
    [
        ("tiny", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}, True),
        ("tiny", {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True, "errors": "replace"}, {}, False),
        ("tiny", {"add_bos_token": True, "add_eos_token": True}, {}, False),
        ("tiny", {"add_bos_token": False}, {}, False),
        ("tiny", {"added_tokens_decoder": {"7": _STAR}}, {}, True),
        ("tiny", {}, {"eos_token": {**_STAR, "content": "dogs"}}, True),
        ("tiny", {"clean_up_tokenization_spaces": True}, {}, False),
        ("t5", {"tokenizer_class": "T5Tokenizer", "clean_up_tokenization_spaces": True}, {}, True),
        ("t5", {"clean_up_tokenization_spaces": True, "model_max_length": 3}, {}, True),
        ("t5", {}, {"additional_special_tokens": ["two"]}, False),
        ("instruct-t5", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}, {}, True),
        ("instruct-t5", {"tokenizer_class": "BertTokenizer", "strip_accents": False}, {}, False),
    ],
)
def test_settings_of_a_tokenizer_are_those_of_its_class(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    shape: str,
    settings: dict[str, Any],
    special: dict[str, Any],
    changed: bool,
) -> None:
    """With the class and the settings of tokenizer_config.json, and the tokens of special_tokens_map.json."""
    shutil.copytree(checkpoints[shape], tmp_path / "c")
    folder = tmp_path / "c" / tokenizers.QUESTION_FOLDER if shape == "instruct-t5" else tmp_path / "c"
    edit(folder / "tokenizer_config.json", **settings)
    edit(folder / "special_tokens_map.json", **special)
    tokenizers.write(folder, tmp_path / "tokenizer.json", 1 << 20)
    made, reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = reference(text).input_ids
        assert made.encode(text).ids == ids
        assert made.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found, stored = ([(t.encode(text).ids, t.decode(t.encode(text).ids)) for text in TEXTS] for t in (made, plain))
    assert (found != stored) == changed


def test_a_tokenizer_without_a_class_that_reads_its_file_otherwise_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The reference takes BLIP-2's for GPT-2's then, and a unigram model's tokens for bytes."""
    shutil.copytree(checkpoints["t5"], tmp_path / "c")
    (tmp_path / "c" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="as GPT2Tokenizer"):
        tokenizers.load(tmp_path / "c")


def test_the_processor_counts_as_many_queries_as_the_model_has(folder: Path) -> None:
    edit(folder / "processor_config.json", num_query_tokens=8)
    convert(folder, folder.with_name("b"), Choices("x", golden=False))
    edit(folder / "processor_config.json", num_query_tokens=9)
    with pytest.raises(CheckpointError, match="num_query_tokens is 9, config"):
        convert(folder, folder.with_name("other"), Choices("x", golden=False))


def test_the_end_token_is_the_language_models_own(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=5, pad_token_id=6, suppress_tokens=[7], max_length=3)
    verified(folder)
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], "eos_token_id": None})
    with pytest.raises(CheckpointError, match="takes none from generation_config"):
        convert(folder, folder.with_name("other"), Choices("x", golden=False))
