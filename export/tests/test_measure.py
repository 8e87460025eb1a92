"""`baseline` and `bench` on tiny models: what their tables say is what was measured."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import ENGINE

from blip2_export import processors
from blip2_export.bundle import Choices, convert
from blip2_export.check import emulation, random_checkpoint
from blip2_export.engine import run_engine
from blip2_export.graphs.precision import Precision, Precisions
from blip2_export.measure import baseline, bench, binary, floor, machine, prefill, samples, stop, work
from blip2_export.measure.peer import Peer
from blip2_export.measure.recipes import RECIPES

PICTURES = [str(path) for path in sorted(work.SAMPLES.glob("*.png"))[:2]]
FEW = ("--rounds", "2", "--tokens", "4", "--requests", "3", "--threads", "1", "--images", *PICTURES)
STAGES = ("preprocess", "vision", "qformer", "prefill")


def parsed(command: Any, *typed: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*typed, *FEW])


def tables(printed: str) -> list[list[list[str]]]:
    """Cells of every table, row by row, without headers."""
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in printed.split("\n\n")]
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block[2:]] for block in blocks if block]


@pytest.fixture(scope="module", params=["tiny", "t5"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure") / request.param
    random_checkpoint.write(folder, request.param, seed=4)
    return folder


def test_a_baseline_prints_the_medians_of_what_it_measured(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = parsed(baseline, str(checkpoint), "--json", str(tmp_path / "all.json"))
    assert baseline.run(args) == 0
    [rows] = tables(capsys.readouterr().out)
    found = json.loads((tmp_path / "all.json").read_text())
    values = found["samples"]["float32"]
    assert [label for label, *_ in rows[:-1]] == list(found["rows"].values())
    for (label, median, _), name in zip(rows, [*found["rows"], "first"], strict=True):
        assert float(median) == pytest.approx(statistics.median(values[name]), rel=1e-3), label
    n_captions = 2 * len(args.images)
    counts = {"step": 3 * n_captions, "caption": n_captions, **dict.fromkeys(STAGES, n_captions)}
    assert {name: len(values[name]) for name in counts} == counts
    for i, caption in enumerate(values["caption"]):
        parts = sum(values[stage][i] for stage in STAGES) + sum(values["step"][3 * i : 3 * i + 3])
        assert 0.5 * caption < parts <= caption, "the stages of a caption do not add up to it"


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def run_bench(folder: Path, *typed: str) -> None:
    assert bench.run(parsed(bench, "--shape", "tiny", "--work", str(folder), "--engine", str(ENGINE), *typed)) == 0


def test_a_bench_prints_ratios_of_what_it_prints(benched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(benched, "--json", str(benched / "all.json"))
    printed = capsys.readouterr().out
    assert "same tokens, exact: 4 of 4 captions" in printed and "same tokens, fast: " in printed
    assert "engine: blip2 " in printed and "instruction set: " in printed and "transformers: 5." in printed
    found = json.loads((benched / "all.json").read_text())
    exact, fast = (found["engine"][recipe] for recipe in ("exact", "fast"))
    assert len(exact["step"]) == len(fast["step"]) == len(found["transformers"]["step"]) == 12, (
        "a gap behind every token"
    )
    sides, *own = tables(printed)
    assert [label for label, *_ in sides] == list(found["rows"].values()) and [len(table) for table in own] == [3, 3]
    for line, name in zip(sides, found["rows"], strict=True):
        label, theirs, _, *ours = line
        assert float(theirs) == pytest.approx(statistics.median(found["transformers"][name]), rel=1e-3), label
        for side, (median, _, faster) in zip((exact, fast), (ours[:3], ours[3:]), strict=True):
            assert float(median) == pytest.approx(statistics.median(side[name]), rel=1e-3), label
            times = float(theirs) / float(median)
            assert faster == f"{1 / times if 'tokens/s' in label else times:.3f}", label
    for label, over, under, ratio in itertools.chain(*own):
        assert ratio == f"{float(over) / float(under):.3f}", label


def test_the_report_names_the_instructions_that_each_side_has(
    benched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_bench(benched, "--recipes", "exact")
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.split("\n\n")[0].splitlines())
    names = [f"instruction set{side}" for side in ("", ", engine", ", transformers")]
    widest = processors.instruction_set().split()[-1]
    assert all(widest in said[name].lower() for name in names), said
    assert said["threads"] == f"1 of {processors.count()} processors" and said["whole rounds"] == "2"


@pytest.fixture
def sigterm() -> Iterator[Callable[..., None]]:
    """What SIGTERM does before and after a bench."""

    def unexpected(*_: object) -> None:
        raise AssertionError("SIGTERM would have killed it")

    usual = signal.signal(signal.SIGTERM, unexpected)
    yield unexpected
    signal.signal(signal.SIGTERM, usual)


@pytest.mark.parametrize(("at", "n_rounds"), [("Peer", 0), ("Peer", 1), ("Engine", 1)])
def test_a_stopped_bench_keeps_and_prints_what_it_has(
    at: str,
    n_rounds: int,
    sigterm: Callable[..., None],
    benched: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side, written = getattr(bench, at), benched / "stopped.json"
    usual = side.measure

    def measure(self: Any, wanted: work.Work, i: int) -> samples.Samples:
        if i == n_rounds and len(wanted.images) > 1:  # the warm-up sees one picture
            assert written.is_file()
            signal.raise_signal(signal.SIGTERM)
        return usual(self, wanted, i)

    monkeypatch.setattr(side, "measure", measure)
    written.unlink(missing_ok=True)
    typed = ("--shape", "tiny", "--work", str(benched), "--engine", str(ENGINE), "--json", str(written))
    assert bench.run(parsed(bench, *typed, "--recipes", "exact")) == stop.STOPPED
    assert signal.getsignal(signal.SIGTERM) == sigterm
    found, [sides, _] = json.loads(written.read_text()), tables(capsys.readouterr().out)
    ours, theirs = found["engine"]["exact"], found["transformers"]
    assert found["machine"]["whole rounds"] == str(n_rounds)
    assert [len(ours["beams"]), len(theirs.get("beams", []))] == [n_rounds + (at == "Peer"), n_rounds]
    for (_, other, _, own, _, faster), name in zip(sides, found["rows"], strict=True):
        assert [other, own] == [samples.median(side.get(name, [])) for side in (theirs, ours)]
        assert (other == "–") == (faster == "–") == (n_rounds == 0)


def test_a_stopped_baseline_keeps_and_prints_what_it_has(
    checkpoint: Path,
    sigterm: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = Peer.measure

    def measure(self: Peer, wanted: work.Work, i: int) -> samples.Samples:
        if i == 1:
            signal.raise_signal(signal.SIGTERM)
        return usual(self, wanted, i)

    monkeypatch.setattr(Peer, "measure", measure)
    args = parsed(baseline, str(checkpoint), "--dtype", "float32,bfloat16", "--json", str(tmp_path / "all.json"))
    assert baseline.run(args) == stop.STOPPED and signal.getsignal(signal.SIGTERM) == sigterm
    found, [rows] = json.loads((tmp_path / "all.json").read_text()), tables(capsys.readouterr().out)
    assert list(found["samples"]) == ["float32"] and len(found["samples"]["float32"]["beams"]) == 1
    assert [median for _, median, _ in rows[:-1]] == [
        samples.median(found["samples"]["float32"][name]) for name in found["rows"]
    ]


def test_an_engine_that_is_stopped_is_not_left_behind(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 60\n')
    engine.chmod(0o755)
    wanted = work.Work((Path(PICTURES[0]),), ("which?",), 4, 2, 2)
    # A shell's background jobs ignore SIGINT.
    timer = threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with stop.like_ctrl_c(), pytest.raises(KeyboardInterrupt):
        binary.Engine(engine, tmp_path, 1)._batch(wanted)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "engine.pid").read_text()), 0)


def test_threads_hold_for_transformers(checkpoint: Path) -> None:
    for n_threads in (2, 1):
        Peer(checkpoint, "float32", n_threads)
        assert torch.get_num_threads() == n_threads


def test_recipes_of_one_bundle_share_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = bench._Models(tmp_path, "tiny")
    names = {name: models.bundle(name).name.removeprefix("tiny-float32-") for name in RECIPES}
    assert names == {name: "exact" if name == "faithful" else name for name in RECIPES}
    models.prepare(["faithful", "exact"], 4)
    assert capsys.readouterr().err.count(f"{models.bundle('exact')} is ") == 1


@pytest.mark.parametrize("name", RECIPES)
def test_the_engine_knows_the_flags_of_a_recipe(name: str) -> None:
    """It follows them, or says why its provider is of no use here."""
    done = subprocess.run([str(ENGINE), "doctor", *RECIPES[name].flags], capture_output=True, check=False)
    assert done.returncode == 0 or (done.returncode == 5 and not RECIPES[name].is_on_processor), done.stderr


def test_every_process_gets_the_threads_and_flags_of_its_recipe(benched: Path, tmp_path: Path) -> None:
    models = bench._Models(benched, "tiny")
    models.prepare(["exact"], 4)
    engine = tmp_path / "engine"
    engine.write_text(f'#!/bin/sh\necho "$@" >> "$0.log"\nexec "{ENGINE}" "$@"\n')
    engine.chmod(0o755)
    side = binary.Engine(engine, models.bundle("exact"), 1, RECIPES["exact"].flags)
    side.measure(work.Work((Path(PICTURES[0]),), ("which?",), 4, 2, 2), 0)
    typed = (tmp_path / "engine.log").read_text().splitlines()
    assert len(typed) == 7 and all("--threads 1 --provider cpu" in line for line in typed), typed


def test_a_recipe_that_cannot_run_here_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "exact", replace(RECIPES["exact"], flags=("--provider", "plugin:absent")))
    with pytest.raises(SystemExit, match=r"plugin:absent *not usable: .* its library must be named"):
        run_bench(tmp_path / "new", "--recipes", "exact")
    assert not (tmp_path / "new").exists()


def on_intel() -> list[str]:
    """What stands before a command there: OpenVINO offers no device on other processors."""
    if re.search(r"^vendor_id\s*: GenuineIntel", processors.told(), re.MULTILINE):
        return []
    return emulation.avx2() or pytest.skip(emulation.MISSING)


def test_the_faithful_recipe_writes_what_the_exact_one_does(benched: Path) -> None:
    """In float32: emulated processors have no bfloat16, and random weights tie in it."""
    there = [*on_intel(), str(ENGINE)]
    doctor = subprocess.run([*there, "doctor"], capture_output=True, encoding="utf-8", check=True).stdout
    if "`openvino` needs a plugin" in doctor:
        pytest.skip("the OpenVINO plugin is not there; `make setup-openvino` installs it")
    models = bench._Models(benched, "tiny")
    models.prepare(["exact", "faithful"], 4)
    search = ("--beams", "1", "--max-new-tokens", "8", "--min-new-tokens", "8")

    def written(command: list[str], recipe: str, *flags: str) -> list[int]:
        bundle = ("--model", str(models.bundle(recipe)))
        [line] = run_engine(Path(command[0]), *command[1:], "caption", PICTURES[0], "--json", *search, *bundle, *flags)
        return line["tokens"]

    flags = (flag.replace("bfloat16", "float32") for flag in RECIPES["faithful"].flags)
    assert written(there, "faithful", *flags) == written([str(ENGINE)], "exact")


def test_requests_at_once_count_until_the_last_one_ends() -> None:
    times = ({"waiting": 0.5, "prefill": 9.5, "decode": 30.0}, {"waiting": 20.0, "prefill": 10.0, "decode": 20.0})
    lines = [{"tokens": [7] * 10, "timings_ms": one} for one in times]
    assert binary._tokens_per_second(lines) == 20 / 0.050
    assert binary._tokens_per_second(lines[:1]) == 10 / 0.040


def test_a_second_bench_keeps_the_model_unless_its_code_is_newer(
    benched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared() -> str:
        bench._Models(benched, "tiny").prepare(["exact", "fast"], 4)
        return capsys.readouterr().err

    prepared()
    kept = prepared()
    exact, fast = ("tiny-float32-exact", "tiny-float32-fast")
    assert all(f"{name} is kept" in kept for name in ("tiny-float32", exact, fast))
    os.utime(benched / exact / "bundle.json", (0, 0))
    stale = prepared()
    assert f"{exact} is made anew" in stale and all(f"{name} is kept" in stale for name in ("tiny-float32", fast))
    shutil.rmtree(benched / "tiny-float32")
    drawn = prepared()
    assert "tiny-float32 is made\n" in drawn and all(f"{name} is made anew" in drawn for name in (exact, fast))


def test_what_a_killed_bench_has_begun_is_made_anew(tmp_path: Path) -> None:
    def make(path: Path, dies: bool) -> None:
        path.mkdir()
        if dies:
            raise KeyboardInterrupt
        (path / "config.json").write_text("{}")

    for dies in (True, True, False):
        try:
            bench._keep_or_make(tmp_path / "model", False, lambda path, dies=dies: make(path, dies))
        except KeyboardInterrupt:
            assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_a_bench_without_room_makes_nothing(short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    memory, disk = ((1 << 10 if what == short else 1 << 40) for what in ("memory", "disk"))
    monkeypatch.setattr(machine, "free_memory", lambda: memory)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage._replace(free=disk))
    with pytest.raises(SystemExit, match=r"tiny needs .* GB.*, 0\.0 GB are free; .*smaller shape"):
        bench._Models(tmp_path / "new", "tiny").prepare(["exact"], 4)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [("--images", "no such picture"), ("--json", "a folder that exists"), ("--recipes", "is none of exact, faithful")],
)
def test_what_would_fail_in_the_end_is_told_before(
    typed: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([typed, str(tmp_path / "absent" / "file")])
    assert said in capsys.readouterr().err


def test_an_absent_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make build"):
        run_bench(tmp_path, "--engine", str(tmp_path / "blip2"))


def test_prefill_alone_reads_every_position_and_no_more(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "bundle", Choices("tiny", golden=False))
    n_queries = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["qformer"]["n_queries"]
    n_tokens, n_new = 9, 60
    alone = prefill._Prefill(tmp_path / "bundle", n_tokens, n_new, 1)
    assert alone.run() > 0
    values = {name: value.numpy() for name, value in alone._values.items()}
    n_positions = n_queries + n_tokens
    n_read = 1 if checkpoint.name == "t5" else n_positions
    assert np.ptp(values["logits"]) > 0
    ends = {"seqlens_k": n_read - 1, "logits_at": n_read - 1, "total_sequence_length": n_read}
    ends |= {"lengths": n_positions, "encoder_lengths": n_positions} if checkpoint.name == "t5" else {}
    assert {name: int(values[name].max()) for name in ends} == ends
    for name in (name for name in values if name.startswith("past_key_values")):
        written = np.abs(values[name]).max(axis=(0, 1, 3)) > 0
        assert written[:n_read].all() and not written[n_read:].any(), name
        assert len(written) == -(-(n_read + n_new) // 64) * 64
    for name in (name for name in values if name.startswith("cross")):
        assert values[name].shape[2] == n_positions and (np.abs(values[name]).max(axis=(0, 1, 3)) > 0).all(), name


def test_questions_at_once_have_prompts_of_one_length(checkpoint: Path) -> None:
    peer = Peer(checkpoint, "float32", 1)
    wanted = work.of(parsed(baseline, str(checkpoint), "--requests", "16"), peer.n_prompt_tokens)
    assert len(set(wanted.questions)) == len(wanted.questions)
    assert len({peer.n_prompt_tokens(prompt) for prompt in wanted.prompts}) == 1


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0012345, "0.001234"), (1.5, "1.500"), (12.345, "12.35"), (12345.6, "12346"), (0.0, "0.000")],
)
def test_four_digits_count(value: float, written: str) -> None:
    assert samples.number(value) == written


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        ("flags\t\t: fpu sse4_2 avx2\n", "avx2"),
        ("flags : avx2 avx512f avx512_vnni amx_bf16 amx_int8\n", "amx_bf16 amx_int8 avx512_vnni avx512f avx2"),
        ("Features\t: fp asimddp i8mm bf16\n", "bf16 i8mm asimddp"),
    ],
)
def test_the_widest_instruction_set_comes_first(cpuinfo: str, wanted: str) -> None:
    assert processors.instruction_set(cpuinfo) == wanted


@pytest.mark.parametrize(("shape", "millions"), [("medium", 761), ("medium-t5", 1189)])
def test_a_model_to_measure_on_has_the_size_it_is_named_for(shape: str, millions: int) -> None:
    assert round(random_checkpoint.n_parameters(shape) / 1e6) == millions


def test_the_floor_counts_what_a_stage_multiplies_and_reads(tmp_path: Path) -> None:
    side, patch, width, inner, layers = 28, 14, 64, 96, 2
    vision = {"hidden_size": width, "intermediate_size": inner, "image_size": side, "patch_size": patch}
    random_checkpoint.write(tmp_path / "checkpoint", {"vision_config": {**vision, "num_hidden_layers": layers}}, seed=0)
    n_patches = (side // patch) ** 2
    n_positions = n_patches + 1
    in_patches, in_layers = 3 * patch**2 * width, layers * (4 * width**2 + 2 * width * inner)
    operations = 2 * (n_patches * in_patches + n_positions * in_layers) + 4 * layers * n_positions**2 * width
    for precision, n_bytes in ((Precision.FLOAT32, 4), (Precision.INT8, 1)):
        bundle = tmp_path / precision
        convert(tmp_path / "checkpoint", bundle, Choices("b", golden=False, precisions=Precisions(precision)))
        found = dict(floor.stages(bundle, json.loads((bundle / "bundle.json").read_text())))
        assert list(found) == ["vision", "qformer", "prefill", "step"]
        assert sum(node.n_operations for node in found["vision"]) == operations
        in_int8 = sum(node.n_operations for node in found["vision"] if node.is_int8)
        assert in_int8 == (0 if n_bytes == 4 else 2 * n_positions * in_layers)
        least = 4 * in_patches + n_bytes * in_layers
        assert (
            least < sum(node.n_bytes for node in found["vision"]) < 1.15 * least
        )  # norms, biases and scales come on top
