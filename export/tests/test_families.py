"""Flan-T5, LLaMA and Q-Formers that read the question against `transformers`, and what of them conversion refuses."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import TOLERANCE, assert_close
from transformers.models.t5.modeling_t5 import T5Attention

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.graphs.precision import EXACT
from blip2_export.graphs.t5 import relative_buckets
from blip2_export.graphs.targets import TARGETS
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.reference.generation import Reference
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

# Prompt and question; the question matters only where the Q-Former reads it and not the prompt.
ASKED = (
    ("", ""),
    ("Question: what colour is the star? Answer:", "what colour is the star?"),
    ("a photo of", "how many dogs play near the blue ring on the beach?"),
)
N_NEW = 8
LONG = 150  # past T5's last bucket edge at 128


class Case:
    """A checkpoint with its bundle for a target, made once."""

    def __init__(self, root: Path, shape: str, dtype: torch.dtype = torch.float32, target: str = "cpu") -> None:
        self.checkpoint, self.folder, self.target = root / "checkpoint", root / target, target
        if not self.checkpoint.exists():
            random_checkpoint.write(self.checkpoint, shape, 50 + sorted(random_checkpoint.FAMILIES).index(shape), dtype)
        self.convert()

    def convert(self) -> None:
        convert(
            self.checkpoint, self.folder, Choices("x", golden=False, force=True, target=self.target, precisions=EXACT)
        )
        self.facts = json.loads((self.folder / "bundle.json").read_text())

    def open(self) -> tuple[Graphs, Reference]:
        return Graphs(self.folder), Reference(self.checkpoint, self.facts)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory):
    roots = functools.cache(tmp_path_factory.mktemp)

    made = functools.cache(lambda shape, target: Case(roots(shape), shape, target=target))
    return lambda shape, target="cpu": made(shape, target)


@dataclass(frozen=True)
class Told:
    """What the reference sees and says of a checkpoint, for every target the same; rows are of a picture and what is `ASKED`."""

    seen: list[tuple[np.ndarray, np.ndarray]]
    queries: np.ndarray
    questions: list[list[int]] | None
    texts: list[Any]


@pytest.fixture(scope="session")
def told(case):
    @functools.cache
    def of(shape: str) -> Told:
        _, reference = case(shape).open()
        seen = [reference.look(p) for p in drawing.sample_pictures(6, seed=3, side=120)]
        rows = [(i, *asked) for i in range(len(seen)) for asked in ASKED]
        queries = np.stack([reference.queries(seen[i][1], *asked) for i, *asked in rows])
        questions = [reference.question_ids(*asked) for _, *asked in rows] if reference.question else None
        texts = [reference.generate(seen[i][0], prompt, N_NEW, question) for i, prompt, question in rows]
        return Told(seen, queries, questions, texts)

    return of


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("shape", sorted(random_checkpoint.FAMILIES))
def test_every_stage_and_every_token_equal_the_reference(case, told, shape: str, target: str) -> None:
    graphs, wanted = Graphs(case(shape, target).folder), told(shape)
    features = graphs.features(np.stack([pixels for pixels, _ in wanted.seen]))
    assert_close(features, np.stack([f for _, f in wanted.seen]), "features")
    assert np.std(wanted.queries[:: len(ASKED)], axis=0).max() > 1e-2, "the checkpoint does not tell pictures apart"
    questions = wanted.questions
    queries = graphs.queries(np.repeat(features, len(ASKED), axis=0), questions)
    assert_close(queries, wanted.queries, "queries")
    ids = [t[0] for t in wanted.texts]
    logits, tokens = graphs.greedy(queries, ids, N_NEW)
    assert_close(logits, np.stack([t[1] for t in wanted.texts]), "first logits")
    assert tokens == [t[2] for t in wanted.texts]
    assert len({tuple(t) for t in tokens}) > len(tokens) / 3, "it says nearly the same whatever it sees"
    for i in (0, 1, len(ids) - 1):
        alone = None if questions is None else questions[i : i + 1]
        own = graphs.queries(features[i // len(ASKED)][None], alone)
        assert graphs.greedy(own, ids[i : i + 1], N_NEW)[1] == tokens[i : i + 1], "alone a row gives other tokens"


@pytest.mark.parametrize("shape", ["instruct-t5", "instruct-llama-odd-1", "vqa-opt", "vqa-t5"])
def test_the_question_changes_the_queries_and_its_padding_does_not(case, shape: str) -> None:
    graphs, reference = case(shape).open()
    _, features = reference.look(drawing.sample_pictures(1, 0)[0])
    questions = [reference.question_ids(*asked) for asked in ASKED]
    assert len({len(q) for q in questions}) == len(questions), "questions of one length test no padding"
    together = graphs.queries(np.repeat(features[None], len(questions), axis=0), questions)
    for question, queries in zip(questions, together, strict=True):
        assert_close(graphs.queries(features[None], [question])[0], queries, "queries alone")
    assert np.std(together, axis=0).max() > 1e-2


class Prefixes:
    """Queries and prompts of tokens drawn at random, for the graphs and as the reference takes them."""

    def __init__(self, reference: Reference, n_queries: int, lengths: list[int]) -> None:
        rng = np.random.default_rng(4)
        table = reference.model.language_model.get_input_embeddings().weight.detach().numpy()
        self.queries = rng.standard_normal((len(lengths), n_queries, table.shape[1])).astype(np.float32)
        self.prompts = [rng.integers(0, len(table), n - n_queries).tolist() for n in lengths]
        self.lengths = np.array(lengths)
        embeds = np.zeros((len(lengths), max(lengths), table.shape[1]), np.float32)
        for row, (queries, prompt) in enumerate(zip(self.queries, self.prompts, strict=True)):
            embeds[row, :n_queries] = queries
            embeds[row, n_queries : lengths[row]] = table[prompt]
        self.embeds = torch.from_numpy(embeds)
        self.mask = torch.from_numpy((np.arange(max(lengths)) < self.lengths[:, None]).astype(np.int64))

    def decoded(self, reference: Reference, ids: np.ndarray) -> np.ndarray:
        """The reference's logits of T5's decoder at every position of `ids`."""
        with torch.inference_mode():
            inputs = {"inputs_embeds": self.embeds, "attention_mask": self.mask}
            return reference.model.language_model(**inputs, decoder_input_ids=torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("shape", ["t5", "t5-odd-1", "t5-odd-2"])
@pytest.mark.parametrize(
    ("target", "encoded", "chunks"),
    [
        ("cpu", [210, 9, 140], (1,) * 180),
        ("cpu", [210, 9, 140], (160, 1, 1)),
        ("cpu", [150], (3, 160, 1, 20)),  # behind a cache several slots take steps only
        ("webgpu", [210, 9, 140], (3, 160, 1, 1, 20)),
    ],
)
def test_flan_t5_decodes_alike_at_every_past_length(
    case, shape: str, target: str, encoded: list[int], chunks: tuple[int, ...]
) -> None:
    graphs, reference = case(shape, target).open()
    prefixes, n_rows = Prefixes(reference, 4, encoded), len(encoded)
    n_tokens = graphs.facts["language"]["vocab_size"]
    ids = np.random.default_rng(5).integers(0, n_tokens, (n_rows, sum(chunks)))
    wanted, start = prefixes.decoded(reference, ids), 0
    seen = graphs.encode(prefixes.queries, prefixes.prompts)
    slots = graphs.slots(n_rows, sum(chunks) + 3, 2 if n_rows > 1 else 0, seen)
    for n in chunks:
        new, positions = slice(start, start + n), np.tile(np.arange(start, start + n), (n_rows, 1))
        found = slots.run(ids[:, new], positions, np.full(n_rows, start + n), positions - start)
        assert_close(found, wanted[:, new], f"logits behind {start} positions")
        start += n


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("shape", sorted(random_checkpoint.FAMILIES))
def test_rows_in_any_slots_decode_as_they_would_alone_while_others_leave(case, shape: str, target: str) -> None:
    graphs, reference = case(shape, target).open()
    language, rng, n_steps = reference.model.language_model, np.random.default_rng(6), 4
    lengths = np.array([90, 3, 61, 17, 40])
    ids = rng.integers(0, graphs.facts["language"]["vocab_size"], (len(lengths), int(lengths.max()) + n_steps))
    seen: dict[str, np.ndarray] = {}
    if graphs.facts["family"] == "encoder_decoder":
        prefixes = Prefixes(reference, 4, [20, 50, 7, 33, 8])
        seen, wanted = graphs.encode(prefixes.queries, prefixes.prompts), prefixes.decoded(reference, ids)
    else:
        with torch.inference_mode():
            wanted = language(input_ids=torch.from_numpy(ids)).logits.numpy()
    slots = graphs.slots(len(ids), ids.shape[1], n_idle=3, seen=seen)
    assert (slots.of_rows != np.arange(len(ids))).any() and slots.of_rows.max() >= len(ids), "rows lie in order"
    positions = np.tile(np.arange(lengths.max()), (len(ids), 1))
    found = slots.run(ids[:, : lengths.max()], positions, lengths, positions)
    for row, length in enumerate(lengths):
        assert_close(found[row, :length], wanted[row, :length], f"row {row}")
    live = np.arange(len(ids))
    for leaving in ([], [1], [0, 3], []):
        staying = ~np.isin(live, leaving)
        slots.keep(staying)
        live = live[staying]
        at = lengths[live, None]
        found = slots.run(np.take_along_axis(ids[live], at, axis=1), at, at[:, 0] + 1, np.zeros_like(at))
        for logits, row in zip(found, live, strict=True):
            assert_close(logits[0], wanted[row, lengths[row]], f"row {row} behind {lengths[row]} positions")
        lengths[live] += 1


@pytest.mark.parametrize(
    ("shape", "target"), [("t5", "cpu"), ("llama", "cpu"), ("instruct-t5", "cpu"), ("llama", "webgpu")]
)
def test_long_texts_equal_the_reference(case, shape: str, target: str) -> None:
    graphs, reference = case(shape, target).open()
    prompts = ["a red star left of a blue ring " * n for n in (6, 1)]
    seen = [reference.look(p) for p in drawing.sample_pictures(2, seed=2, side=100)]
    rows = [(pixels, features, prompt) for pixels, features in seen for prompt in prompts]
    queries = np.stack([reference.queries(features, prompt) for _, features, prompt in rows])
    told = [reference.generate(pixels, prompt, LONG) for pixels, _, prompt in rows]
    _, tokens = graphs.greedy(queries, [t[0] for t in told], LONG)
    assert tokens == [t[2] for t in told]
    assert max(map(len, tokens)) == LONG and len({tuple(t) for t in tokens}) > 1, "it says the same whatever it sees"


def test_relative_buckets_are_those_of_the_reference() -> None:
    distances = np.arange(-1000, 1001)
    for n_buckets in (4, 10, 32, 64):
        for most in (17, 20, 100, 128, 256):
            for bidirectional in (True, False):
                if n_buckets // (4 if bidirectional else 2) >= most:
                    continue
                found = relative_buckets(distances, n_buckets, most, bidirectional)
                wanted = T5Attention._relative_position_bucket(
                    torch.from_numpy(distances), bidirectional, n_buckets, most
                )
                assert (found == wanted.numpy()).all(), (n_buckets, most, bidirectional)


@pytest.mark.parametrize(
    ("shape", "dtype", "target"),
    [
        ("t5-odd-1", torch.bfloat16, "cpu"),
        ("t5-odd-2", torch.float16, "cpu"),
        ("instruct-llama-odd-1", torch.float16, "cpu"),
        ("instruct-t5", torch.bfloat16, "cpu"),
        ("vqa-opt", torch.bfloat16, "cpu"),
        ("vqa-opt", torch.float16, "webgpu"),
        ("t5-odd-1", torch.bfloat16, "webgpu"),
    ],
)
def test_a_16_bit_checkpoint_keeps_its_size_and_equals_the_lifted_reference(
    tmp_path: Path, shape: str, dtype: torch.dtype, target: str
) -> None:
    made = Case(tmp_path, shape, dtype, target)
    stored = {p.name: p.stat().st_size for p in made.folder.glob("*.data")}
    rotary = made.facts["language"]["max_positions"] * 32 * 4 if "llama" in shape else 0  # angles stay float32
    assert sum(stored.values()) - rotary < 1.25 * (made.checkpoint / "model.safetensors").stat().st_size, stored
    graphs, reference = made.open()
    pixels, features, queries = reference.stages(drawing.sample_pictures(1, 0)[0], *ASKED[1])
    assert_close(graphs.features(pixels[None])[0], features, "features")
    questions = [reference.question_ids(*ASKED[1])] if reference.question else None
    assert_close(graphs.queries(features[None], questions)[0], queries, "queries")
    ids, logits, tokens, _ = reference.generate(pixels, ASKED[1][0], N_NEW, ASKED[1][1])
    found, written = graphs.greedy(queries[None], [ids], N_NEW)
    assert_close(found[0], logits, "first logits")
    assert written == [tokens]


def first_logits(made: Case) -> np.ndarray:
    graphs, reference = made.open()
    pixels, _, queries = reference.stages(drawing.sample_pictures(1, 0)[0])
    ids, logits, _, _ = reference.generate(pixels, "a photo of", 1)
    found, _ = graphs.greedy(queries[None], [ids], 1)
    assert_close(found[0], logits, "first logits")
    return found


def test_flan_t5_runs_the_activation_and_the_scaling_that_its_config_means(tmp_path: Path) -> None:
    made = Case(tmp_path, "t5-odd-1")
    exact = first_logits(made)
    released = {"tie_word_embeddings": False, "dense_act_fn": "gelu", "feed_forward_proj": "gated-gelu"}
    edit_text(made.checkpoint, "scale_decoder_outputs", **released)  # the key that only newer files hold is gone
    made.convert()
    assert (first_logits(made) == exact).all()
    edit_text(made.checkpoint, "dense_act_fn")  # a plain Flan-T5 says no more than this: tanh
    made.convert()
    assert np.abs(first_logits(made) - exact).max() > TOLERANCE * np.abs(exact).max()
    edit_text(made.checkpoint, "tie_word_embeddings", dense_act_fn="gelu")
    made.convert()
    np.testing.assert_allclose(first_logits(made), exact * 40**-0.5, rtol=TOLERANCE, atol=1e-6)


def test_bundles_state_what_the_engine_needs_of_each_family(case) -> None:
    facts = case("t5-odd-1").facts
    language = facts["language"]
    assert facts["family"] == "encoder_decoder" and set(facts["graphs"]) == {"vision", "qformer", "encoder", "decoder"}
    assert language["token_ids"].items() >= {"decoder_start": 0, "eos": [1], "pad": 0, "bos": 1}.items()
    assert language["cross_attention"] == {
        "n_layers": 3,
        "n_heads": 3,
        "head_dim": 16,
        "dtype": "float32",
        "key": "cross.{}.key",
        "value": "cross.{}.value",
    }
    assert (language["max_positions"], language["hidden"], language["kv_cache"]["head_dim"]) == (2048, 40, 16)
    assert "text" not in facts["qformer"] and facts["prompts"] == {"caption": "", "ask": "Question: {} Short answer:"}
    assert facts["generation"]["ask"] == {"max_new_tokens": 10, "beams": 5, "length_penalty": -1.0}
    crossing = {"name": "cross.2.value", "dtype": "float32", "shape": ["batch", 3, "sequence", 16]}
    assert crossing in facts["graphs"]["encoder"]["outputs"]

    facts = case("instruct-llama-odd-1").facts
    cache = facts["language"]["kv_cache"]
    assert (facts["family"], cache["n_heads"], cache["head_dim"]) == ("decoder_only", 2, 32)
    assert "cross_attention" not in facts["language"] and "decoder_start" not in facts["language"]["token_ids"]
    assert facts["generation"] == {
        "caption": {"max_new_tokens": 30, "beams": 5},
        "ask": {"max_new_tokens": 10, "beams": 5, "length_penalty": 0.0},
    }
    text = {
        "tokenizer": "qformer_tokenizer.json",
        "max_tokens": 128,
        "max_positions": 512,
        "pad": 0,
        "truncation_side": "left",
        "reads": "prompt",
    }
    assert facts["qformer"]["text"] == text
    assert case("vqa-t5").facts["qformer"]["text"] == {
        **text,
        "max_tokens": 32,
        "truncation_side": "right",
        "reads": "question",
    }
    assert facts["graphs"]["qformer"]["inputs"][1:] == [
        {"name": name, "dtype": "int64", "shape": ["batch", "question"]} for name in ("question_ids", "question_mask")
    ]


@pytest.mark.parametrize("shape", ["t5", "llama", "instruct-t5", "instruct-llama", "vqa-opt"])
def test_goldens_hold_what_the_graphs_give(case, tmp_path: Path, shape: str) -> None:
    convert(case(shape).checkpoint, tmp_path / "b", Choices("x", ask_prompt="Question: {} Answer:", caption_prompt="a"))
    cases = json.loads((tmp_path / "b" / "golden" / "golden.json").read_text())["cases"]
    facts, graphs = json.loads((tmp_path / "b" / "bundle.json").read_text()), Graphs(tmp_path / "b")
    assert [c["task"] for c in cases] == ["caption", "ask"] * 3
    assert cases[0]["pixels"] == cases[1]["pixels"] and cases[0]["features"] == cases[1]["features"]
    reads = facts["qformer"].get("text")
    assert (cases[0]["queries"] != cases[1]["queries"]) == (reads is not None)
    for found in cases:
        features = tensor(tmp_path / "b", found["features"])
        questions = [found["question_ids"]] if reads else None
        assert ("question_ids" in found) == (reads is not None)
        queries = graphs.queries(features[None], questions)
        assert_close(queries[0], tensor(tmp_path / "b", found["queries"]), "queries")
        logits, tokens = graphs.greedy(queries, [found["prompt_ids"]], found["max_new_tokens"])
        assert_close(logits[0], tensor(tmp_path / "b", found["first_logits"]), "first logits")
        assert tokens == [found["tokens"]]
    if reads:
        said = {"prompt": len(cases[0]["prompt"]), "question": 0}[reads["reads"]]
        assert (len(cases[0]["question_ids"]) > 2) == (said > 0), "[CLS] and [SEP] alone where there is no question"


def tensor(folder: Path, described: dict[str, Any]) -> np.ndarray:
    return np.fromfile(folder / described["file"], "<f4").reshape(described["shape"])


@pytest.mark.parametrize(("shape", "kept"), [("instruct-t5", "end"), ("vqa-opt", "start")])
def test_long_questions_are_cut_on_the_side_that_the_bundle_names(case, shape: str, kept: str) -> None:
    reference = Reference(case(shape).checkpoint, case(shape).facts)
    question = "water " + "dogs " * 200 + "star"
    ids = reference.question_ids(question, question)
    assert len(ids) == case(shape).facts["qformer"]["text"]["max_tokens"]
    end = reference.question_ids("star", "star")[1:-1]
    start = reference.question_ids("water", "water")[1:-1]
    assert (ids[-1 - len(end) : -1] == end, ids[1 : 1 + len(start)] == start) == (kept == "end", kept == "start")


def edit_text(folder: Path, *without: str, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k not in without}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {**text, **values}}))


def drop_tensors(folder: Path, part: str) -> None:
    path = folder / "model.safetensors"
    left = {k: v for k, v in load_file(path).items() if part not in k}
    path.unlink()
    save_file(left, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("shape", "damage", "said"),
    [
        ("llama", lambda f: edit_text(f, rope_scaling={"type": "linear", "factor": 2.0}), "of type `linear`"),
        (
            "llama",
            lambda f: edit_text(f, "rope_parameters", rope_parameters={"rope_type": "yarn", "factor": 2.0}),
            "`yarn`",
        ),
        ("llama", lambda f: edit_text(f, head_dim=15), "requires an even rotary dimension"),
        ("llama", lambda f: edit_text(f, num_key_value_heads=1), "k_proj.weight` is"),
        ("llama", lambda f: edit_text(f, hidden_act="mish"), "activation `mish` is not supported"),
        ("t5", lambda f: edit_text(f, dense_act_fn="gelu_fast"), "activation `gelu_fast` is not supported"),
        ("t5", lambda f: edit_text(f, relative_attention_max_distance=8), "32 relative position buckets over 8"),
        (
            "t5",
            lambda f: edit_text(f, "decoder_start_token_id", "bos_token_id"),
            "text_config.decoder_start_token_id of config.json is None",
        ),
        (
            "t5",
            lambda f: drop_tensors(f, "decoder.block.1.layer.1.EncDecAttention.k"),
            "EncDecAttention.k.weight` is missing",
        ),
        (
            "instruct-t5",
            lambda f: shutil.rmtree(f / "qformer_tokenizer"),
            "tokenizer folder qformer_tokenizer is missing",
        ),
        ("instruct-t5", lambda f: (f / "qformer_tokenizer" / "tokenizer.json").unlink(), "no tokenizer.json"),
        ("vqa-opt", lambda f: drop_tensors(f, "word_embeddings"), "`embeddings.word_embeddings.weight` is missing"),
        ("vqa-opt", lambda f: drop_tensors(f, "0.intermediate."), "intermediate.dense.weight` is missing"),
    ],
)
def test_what_cannot_be_converted_gets_one_sentence_and_leaves_nothing(
    case, tmp_path: Path, shape: str, damage, said: str
) -> None:
    shutil.copytree(case(shape).checkpoint, tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises((CheckpointError, UnsupportedError), match=said):
        convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
