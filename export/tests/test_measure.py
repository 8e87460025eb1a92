"""`baseline` and `bench` on tiny models: what their tables say is what was measured."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import ENGINE

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.measure import baseline, bench, binary, machine, prefill, samples, work
from blip2_export.measure.peer import Peer

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
    [("--images", "no such picture"), ("--json", "a folder that exists"), ("--recipes", "is none of exact, fast")],
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
    assert machine.instruction_set(cpuinfo) == wanted


@pytest.mark.parametrize(("shape", "millions"), [("medium", 761), ("medium-t5", 1189)])
def test_a_model_to_measure_on_has_the_size_it_is_named_for(shape: str, millions: int) -> None:
    assert round(random_checkpoint.n_parameters(shape) / 1e6) == millions
