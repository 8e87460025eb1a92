"""`baseline` and `bench` on tiny models: what their reports and tables say is what was measured."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import ENGINE

from blip2_export import processors
from blip2_export.bundle import Choices, convert
from blip2_export.check import emulation, random_checkpoint
from blip2_export.engine import run_engine
from blip2_export.measure import baseline, bench, binary, machine, models, records, samples, stop, table, work
from blip2_export.measure.peer import Peer, Written
from blip2_export.measure.recipes import RECIPES
from blip2_export.measure.records import Files, Report
from blip2_export.measure.scenarios import Scenario
from blip2_export.measure.table import Value

PICTURES = [str(path) for path in sorted(work.SAMPLES.glob("*.png"))[:2]]
FEW = ("--tokens", "5", "--queries", "4", "--duration", "0", "--warm-up", "0", "--threads", "1", "--images", *PICTURES)
STAGES = ["decode_image", "preprocess", "vision", "qformer", "prefill"]


def parsed(command: Any, *typed: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*typed, *FEW])


@pytest.fixture(scope="module", params=["tiny", "t5"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure") / request.param
    random_checkpoint.write(folder, request.param, seed=4)
    return folder


@pytest.fixture(scope="module")
def baselines(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of all scenarios, the steps of two batches at two places."""
    out = tmp_path_factory.mktemp("baseline")
    first = 1 if checkpoint.name == "t5" else Peer(checkpoint, "float32", 1).first_past("")
    steps = ("--rows", "1,2", "--past", f"{first + 1},{first + 3}", "--pictures", "3")
    args = parsed(baseline, str(checkpoint), "--engine", str(ENGINE), "--out", str(out), *steps)
    assert baseline.run(args) == 0
    return out


def of_baseline(out: Path, scenario: str) -> tuple[Report, list[dict[str, Any]]]:
    files = Files(out / f"transformers-float32-{scenario}")
    return files.read(), files.logged()


def test_stages_of_a_text_add_up_to_it(baselines: Path) -> None:
    found, each = of_baseline(baselines, "single")
    assert [name for name, _ in found["figures"]["stages_ms"]] == [*STAGES, "decode"]
    assert abs(found["figures"]["unaccounted"]) < 1e-6 and found["is_complete"]
    for one in each:
        stages = dict(one["stages_ms"])
        assert one["n_tokens"] == 5 and len(one["gaps_ms"]) == 4
        before = sum(time for name, time in stages.items() if name != "decode")
        assert one["first_token_ms"] - one["sent_ms"] == pytest.approx(before)
        assert 0.5 * stages["decode"] < sum(one["gaps_ms"]) <= stages["decode"]
    assert [one["input"] for one in each] == PICTURES * 2
    assert all(one["scheduled_ms"] >= before["done_ms"] for before, one in itertools.pairwise(each))


def test_offline_writes_texts_in_whole_batches(baselines: Path) -> None:
    found, each = of_baseline(baselines, "offline")
    assert len(each) == 6 and {one["sent_ms"] for one in each[:3]} == {each[0]["sent_ms"]}
    assert each[3]["sent_ms"] >= each[0]["done_ms"]
    rate = 6e3 / (max(one["done_ms"] for one in each) - each[0]["sent_ms"])
    assert found["figures"]["rates"]["images"] == pytest.approx(rate)
    assert (found["work"]["arrivals"], found["work"]["concurrency"]) == ("3 at a time", 3)


def test_a_round_of_stages_is_a_record(baselines: Path) -> None:
    found, each = of_baseline(baselines, "stage")
    names = [name for name, _ in each[0]["stages_ms"]]
    pasts = [name.partition("x")[2] for name in names[5::2]]
    assert len(pasts) == 2 and names == [*STAGES, *(f"step_{rows}x{past}" for past in pasts for rows in (1, 2))]
    assert len(each) == 4 and found["work"]["scenario"] == "stage" and abs(found["figures"]["unaccounted"]) < 1e-6
    assert all(time > 0 for one in each for _, time in one["stages_ms"])


def test_warm_up_ends_when_latencies_stay_or_its_time_is_over(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = work.of(parsed(baseline, str(checkpoint)))
    for latencies, seconds, n_batches in (
        ([900.0, 100.0, 105.0, 109.0, 1.0], 60.0, 4),
        ([900.0, 500.0, 300.0], 1e-9, 2),
        ([900.0], 0.0, 0),
    ):
        for name, n_together in (("single", 1), ("offline", 8)):
            left = iter(latencies)
            texts, tokens = ["a"] * n_together, [[1]] * n_together
            monkeypatch.setattr(
                Peer, "write", lambda *_, to=(texts, tokens), left=left: Written(*to, {}, [], next(left))
            )
            monkeypatch.setattr(Peer, "prompt", lambda *_: "")
            scenario = Scenario(name, Peer.__new__(Peer), replace(wanted, warm_up=seconds))
            assert len(list(itertools.islice(scenario._warm_up(), 100))) == n_batches * n_together


def test_a_step_is_the_one_behind_so_many_positions(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(checkpoint, "float32", 1)
    first, seen = peer.first_past(""), []
    hook = peer.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    written = peer.write([Path(PICTURES[0]).read_bytes()], [""], 5)
    hook.remove()
    assert len(written.gaps) == 4 and seen[1:] == [first + i for i in range(4)]


def test_the_engine_and_transformers_stand_beside_each_other(
    checkpoint: Path, baselines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(checkpoint, tmp_path / "bundle", Choices("tiny", golden=False, loss=False))
    engine = binary.Engine(ENGINE, tmp_path / "bundle", 1, ("--provider", "cpu"))
    wanted = work.of(parsed(baseline, str(checkpoint), "--pictures", "3"))
    for scenario in ("single", "offline"):
        ours, theirs = Files(tmp_path / scenario), Files(baselines / f"transformers-float32-{scenario}")
        engine.measure(scenario, wanted, ours)
        compared = subprocess.run(
            [ENGINE, "bench", "compare", ours.report, theirs.report], capture_output=True, encoding="utf-8", check=False
        )
        assert compared.returncode == 0 and "| end_to_end.p50 |" in compared.stdout, compared.stderr
        tokens = [{one["input"]: one["tokens"] for one in files.logged()} for files in (ours, theirs)]
        assert tokens[0].keys() == tokens[1].keys() == set(PICTURES)
        assert sum(tokens[0][name] == tokens[1][name] for name in PICTURES) >= 1, "random weights tie, but not always"


def test_questions_meet_every_picture_as_in_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "bundle", Choices("tiny", golden=False, loss=False))
    asked = ("--task", "ask", "--text", "what?", "--text", "how many are there?", "--text", "why?")
    wanted = replace(work.of(parsed(baseline, str(checkpoint), *asked)), n_queries=6)
    binary.Engine(ENGINE, tmp_path / "bundle", 1, ("--provider", "cpu")).measure(
        "single", wanted, Files(tmp_path / "a")
    )
    assert [one["input"] for one in Files(tmp_path / "a").logged()] == [one.name for one in wanted.inputs]
    peer, facts = Peer(checkpoint, "float32", 1), json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert (
        peer.prompt("why?") == facts["prompts"]["ask"].format("why?")
        and peer.prompt(None) == facts["prompts"]["caption"]
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--past", "0"), "0 is no whole number from 1 on"),
        (("--past", "100000"), "this model has"),
        (("--text", "what?"), "--text is not for --task caption"),
        (("--task", "ask", "--text", "a?", "--text", "what is that over there?"), "as many tokens each"),
        (("--engine", "nowhere"), "make build"),
        (("--scenarios", "single,none"), "none is none of stage, single, offline"),
        (("--duration", "-1"), "a number of seconds from 0"),
        (("--out", f"{PICTURES[0]}/folder"), "no folder can be there"),
    ],
)
def test_what_a_baseline_cannot_do_is_told(
    typed: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint.write(tmp_path / "checkpoint", "tiny", seed=4)
    with pytest.raises(SystemExit) as stopped:
        given = (str(tmp_path / "checkpoint"), "--engine", str(ENGINE), "--out", str(tmp_path / "out"))
        skipping = () if "--past" in typed or "--scenarios" in typed else ("--scenarios", "single,offline")
        baseline.run(parsed(baseline, *given, *skipping, *typed))
    assert said in f"{stopped.value}{capsys.readouterr().err}"


def test_a_full_disk_is_told_in_one_line(checkpoint: Path) -> None:
    log = records.Log(Path("/dev/full"))
    with pytest.raises(SystemExit, match="/dev/full cannot be written: No space left"):
        log.note({"index": 0})


@pytest.fixture
def sigterm() -> Iterator[Callable[..., None]]:
    """What SIGTERM does before and after a bench."""

    def unexpected(*_: object) -> None:
        raise AssertionError("SIGTERM would have killed it")

    usual = signal.signal(signal.SIGTERM, unexpected)
    yield unexpected
    signal.signal(signal.SIGTERM, usual)


def stopped_at(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes with the n-th text of `transformers`."""
    usual, seen = Peer.write, []

    def write(self: Peer, *args: Any, **kwargs: Any) -> Written:
        seen.append(None)
        if len(seen) == n:
            signal.raise_signal(signal.SIGTERM)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(Peer, "write", write)


def test_a_stopped_baseline_keeps_what_it_measured(
    checkpoint: Path,
    sigterm: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_at(4, monkeypatch)
    given = (str(checkpoint), "--engine", str(ENGINE), "--out", str(tmp_path), "--scenarios", "single,offline")
    assert baseline.run(parsed(baseline, *given)) == stop.STOPPED and signal.getsignal(signal.SIGTERM) == sigterm
    found, each = of_baseline(tmp_path, "single")
    assert len(each) == found["figures"]["counts"]["answered"] == 3 and not found["is_complete"]
    assert "not valid: the run was stopped" in capsys.readouterr().out
    assert not Files(tmp_path / "transformers-float32-offline").report.exists()


def test_a_baseline_that_is_stopped_at_once_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(1, monkeypatch)
    given = (str(checkpoint), "--engine", str(ENGINE), "--out", str(tmp_path), "--scenarios", "single")
    assert baseline.run(parsed(baseline, *given)) == stop.STOPPED
    assert "stopped before anything was measured" in capsys.readouterr().err


STAND_IN = """#!{python}
# The engine; what it has no `bench stage` for is made of the stages of its texts.
import json, subprocess, sys
engine, args = {engine!r}, sys.argv[1:]
with open(__file__ + ".log", "a") as log:
    log.write(json.dumps(args) + "\\n")
if args[:2] != ["bench", "stage"]:
    sys.exit(subprocess.run([engine, *args]).returncode)
options = dict(zip(args, args[1:]))
rows, past, out = options["--rows"], options["--past"], options["--jsonl"]
at = args.index("--rows")
done = subprocess.run([engine, "bench", "single", "--tokens", "5", *args[2:at], *args[at + 4 :]]).returncode
report = json.load(open(options["--json"]))
lines = [json.loads(line) for line in open(out)]
for line in lines:
    stages = [stage for stage in line["stages_ms"] if stage[0] in {stages!r}] + [["step_" + rows + "x" + past, line["gaps_ms"][-1]]]
    line.update(stages_ms=stages, gaps_ms=[], done_ms=line["sent_ms"] + sum(time for _, time in stages))
open(out, "w").write("".join(json.dumps(line) + "\\n" for line in lines))
about = {{name: report[name] for name in ("is_complete", "subject", "work")}}
about["work"]["scenario"] = "stage"
json.dump(about, open(out + ".about", "w"))
subprocess.run([engine, "bench", "report", out, "--about", out + ".about", "--json", options["--json"]], check=True)
sys.exit(done)
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("stand-in") / "blip2"
    engine.write_text(STAND_IN.format(python=sys.executable, engine=str(ENGINE), stages=STAGES))
    engine.chmod(0o755)
    return engine


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def run_bench(folder: Path, *typed: str, status: int = 0) -> None:
    given = ("--shape", "tiny", "--work", str(folder), "--engine", str(ENGINE), "--pictures", "2", "--beams", "2")
    assert bench.run(parsed(bench, *given, *typed)) == status


def rows_of(printed: str) -> list[list[str]]:
    """Cells of the table, without its header."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_a_bench_prints_what_its_rounds_measured(
    benched: Path, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_bench(benched, "--engine", str(stand_in), "--rounds", "2", "--past", str(first_past(benched) + 3))
    printed = capsys.readouterr().out
    out = benched / "reports"
    assert (out / "table.md").read_text() == printed
    said = dict(line.split(": ", 1) for line in printed.split("\n\n")[0].splitlines())
    assert processors.instruction_set().split()[-1] in said["instruction set"] and said["whole rounds"] == "2"
    assert "transformers 5." in said["transformers"] and said["exact"].startswith("tiny in float32; blip2 ")
    assert said["same tokens, exact, caption of 5 tokens, greedy"].endswith(" of 2")
    rows = {row[0]: row[1:] for row in rows_of(printed)}
    assert [label.removesuffix(", ms") for label in list(rows)[:6]] == [*STAGES, f"step_1x{first_past(benched) + 3}"]
    for label, job, of in (
        ("caption of 5 tokens, greedy, ms", "single", lambda found: median_of(found, "end_to_end")),
        ("caption of 5 tokens, 2 beams, ms", "beams", lambda found: median_of(found, "end_to_end")),
        ("time to first token, ms", "single", lambda found: median_of(found, "time_to_first_token")),
        ("2 at once, images/s", "offline", lambda found: found["figures"]["rates"]["images"]),
    ):
        theirs, exact, faster, *_ = rows[label]
        each = [
            [of(Files(out / "rounds" / f"{side}-{job}-{i}").read()) for i in (1, 2)]
            for side in ("transformers", "exact")
        ]
        for cell, values in zip((theirs, exact), each, strict=True):
            assert float(cell.split()[0]) == pytest.approx(statistics.geometric_mean(values), rel=1e-3), label
        pairs = [b / a if "images/s" in label else a / b for a, b in zip(*each, strict=True)]
        assert float(faster.split()[0]) == pytest.approx(statistics.geometric_mean(pairs), rel=1e-3), label


def median_of(found: Report, name: str) -> float:
    return found["figures"]["latencies_ms"][name]["percentiles"][0]["value"]


def first_past(benched: Path) -> int:
    made = models.Models(benched, "tiny")
    made.prepare(["exact"], 4)
    return Peer(made.checkpoint, "float32", 1).first_past("")


def test_reports_of_all_rounds_hold_every_query(benched: Path) -> None:
    run_bench(benched, "--rounds", "2", "--recipes", "exact", "--scenarios", "single,offline")
    for side in ("transformers", "exact"):
        rounds = [Files(benched / "reports" / "rounds" / f"{side}-offline-{i}").read() for i in (1, 2)]
        found = Files(benched / "reports" / f"{side}-offline").read()
        assert (
            found["figures"]["counts"]["answered"] == sum(one["figures"]["counts"]["answered"] for one in rounds) == 8
        )
        assert found["figures"]["objections"] == [] or side == "exact"
        # Time between rounds counts for nothing: the rate is that of the time that they took together.
        taken = sum(4 / one["figures"]["rates"]["images"] for one in rounds)
        assert found["figures"]["rates"]["images"] == pytest.approx(8 / taken)


def test_sides_take_turns_with_the_threads_and_flags_of_their_recipe(benched: Path, stand_in: Path) -> None:
    log = stand_in.with_name("blip2.log")
    log.write_text("")
    run_bench(benched, "--engine", str(stand_in), "--rounds", "2", "--recipes", "exact,fast", "--scenarios", "single")
    typed = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [line for line in typed if line[:2] == ["bench", "single"]]
    sides = [("fast" if any(word.endswith("-fast") for word in line) else "exact") for line in measured]
    assert sides == ["exact", "fast"] * 4  # greedily and with beams, in two rounds
    assert [line[line.index("--beams") + 1] for line in measured] == ["1", "1", "2", "2"] * 2
    assert all(line[line.index("--threads") :][:4] == ["--threads", "1", "--provider", "cpu"] for line in measured)


@pytest.mark.parametrize("side", ["transformers", "exact"])
def test_a_stopped_bench_keeps_and_prints_what_it_has(
    side: str,
    sigterm: Callable[..., None],
    benched: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = bench.Turns._measure

    def measure(self: bench.Turns, on: str, job: bench.Job, files: Files) -> None:
        if on == side and files.stem.name.endswith("single-2"):
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            job = replace(job, work=replace(job.work, n_queries=1_000_000))
        usual(self, on, job, files)

    monkeypatch.setattr(bench.Turns, "_measure", measure)
    given = ("--rounds", "3", "--recipes", "exact", "--scenarios", "single")
    run_bench(benched, *given, status=stop.STOPPED)
    assert signal.getsignal(signal.SIGTERM) == sigterm
    printed = capsys.readouterr().out
    assert "whole rounds: 1" in printed
    rows = {row[0]: row[1:] for row in rows_of(printed)}
    assert all("–" not in cell.split()[0] for cell in rows["caption of 5 tokens, greedy, ms"])
    assert not (benched / "reports" / "rounds" / "exact-single-3.json").exists()


def test_an_engine_that_is_stopped_is_not_left_behind(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 60\n')
    engine.chmod(0o755)
    wanted = work.of(parsed(baseline, "unused"))
    # A shell's background jobs ignore SIGINT.
    timer = threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with stop.like_ctrl_c(), pytest.raises(KeyboardInterrupt):
        binary.Engine(engine, tmp_path, 1).measure("single", wanted, Files(tmp_path / "report"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "engine.pid").read_text()), 0)


def test_what_the_engine_refuses_is_said(tmp_path: Path) -> None:
    wanted = work.of(parsed(baseline, "unused"))
    with pytest.raises(SystemExit, match=r"bench single .*: .*nowhere"):
        binary.Engine(ENGINE, tmp_path / "nowhere", 1).measure("single", wanted, Files(tmp_path / "report"))


def test_threads_hold_for_transformers(checkpoint: Path) -> None:
    for n_threads in (2, 1):
        Peer(checkpoint, "float32", n_threads)
        assert torch.get_num_threads() == n_threads


def test_two_benches_differ_by_less_than_their_intervals() -> None:
    """Rounds differ from each other by more than queries of one round do."""
    rng, n_apart, n_trials = random.Random(3), 0, 2_000
    for _ in range(n_trials):
        twice = []
        for _ in range(2):
            rounds = [Value(100 * rng.lognormvariate(0, 0.03), (99.9, 100.1)) for _ in range(5)]
            twice.append(table.over_rounds(rounds))
        (low, high), (least, most) = (one.interval for one in twice)
        n_apart += abs(twice[0].value - twice[1].value) > max(high - low, most - least)
    assert n_apart / n_trials < 0.01


def test_an_interval_of_rounds_holds_the_truth_as_often_as_it_says() -> None:
    rng, n_held, n_trials = random.Random(5), 0, 4_000
    for _ in range(n_trials):
        low, high = table.over_rounds([Value(rng.lognormvariate(2, 0.1), None) for _ in range(4)]).interval
        n_held += low <= math.e**2 <= high
    assert 0.94 < n_held / n_trials < 0.96


def test_of_one_round_its_own_interval_is_printed() -> None:
    assert str(table.over_rounds([Value(12.345, (11.0, 14.0))])) == "12.35 (11.00–14.00)"
    assert str(table.ratio(Value(30.0, (27.0, 33.0)), Value(10.0, (9.0, 11.0)))) == "3.000 (2.455–3.667)"
    assert str(table.ratio(Value(30.0, None), Value(10.0, (9.0, 11.0)))) == "3.000"


def test_the_load_of_the_machine_is_what_others_took() -> None:
    before = machine.Load({}, (100, 1_000, 40))
    assert machine.Load({}, (190, 1_200, 100)).since(before) == {"taken_by_others": 0.15}
    assert machine.Load({"last_minute": 2.0}, None).since(before) == {"last_minute": 2.0}


def test_memory_counts_from_when_it_is_forgotten() -> None:
    # Whatever was let go before may lie in the heap, and be taken from there.
    with mmap.mmap(-1, 64 << 20) as held:
        for place in range(0, len(held), mmap.PAGESIZE):
            held[place] = 1
    before = machine.peak_memory()
    machine.forget_peak_memory()
    assert before is not None and machine.peak_memory() <= before
    assert machine.peak_memory() < before - (32 << 20), "64 MB were let go"


def test_recipes_of_one_bundle_share_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = models.Models(tmp_path, "tiny")
    names = {name: made.bundle(name).name.removeprefix("tiny-float32-") for name in RECIPES}
    assert names == {name: "exact" if name == "faithful" else name for name in RECIPES}
    made.prepare(["faithful", "exact"], 4)
    assert capsys.readouterr().err.count(f"{made.bundle('exact')} is ") == 1


@pytest.mark.parametrize(
    ("typed", "said"),
    [("--images", "no such picture"), ("--recipes", "is none of exact, faithful"), ("--rounds", "no whole number")],
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


@pytest.mark.parametrize("name", RECIPES)
def test_the_engine_knows_the_flags_of_a_recipe(name: str) -> None:
    """It follows them, or says why its provider is of no use here."""
    done = subprocess.run([str(ENGINE), "doctor", *RECIPES[name].flags], capture_output=True, check=False)
    assert done.returncode == 0 or (done.returncode == 5 and name == "faithful"), done.stderr


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
    made = models.Models(benched, "tiny")
    made.prepare(["exact", "faithful"], 4)
    search = ("--beams", "1", "--max-new-tokens", "8", "--min-new-tokens", "8")

    def written(command: list[str], recipe: str, *flags: str) -> list[int]:
        bundle = ("--model", str(made.bundle(recipe)))
        [line] = run_engine(Path(command[0]), *command[1:], "caption", PICTURES[0], "--json", *search, *bundle, *flags)
        return line["tokens"]

    flags = (flag.replace("bfloat16", "float32") for flag in RECIPES["faithful"].flags)
    assert written(there, "faithful", *flags) == written([str(ENGINE)], "exact")


def test_a_second_bench_keeps_the_model_unless_its_code_is_newer(
    benched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepared() -> str:
        models.Models(benched, "tiny").prepare(["exact", "fast"], 4)
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
            models._keep_or_make(tmp_path / "model", False, lambda path, dies=dies: make(path, dies))
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
        models.Models(tmp_path / "new", "tiny").prepare(["exact"], 4)
    assert not (tmp_path / "new").exists()


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


@pytest.mark.parametrize("shape", ["demo", "medium", "medium-t5"])
def test_every_token_of_a_model_to_measure_on_can_be_read(shape: str) -> None:
    """Streams are timed by the pieces of text that come."""
    plan = random_checkpoint._plan(shape, torch.float32)
    ids = range(plan.config.text_config.vocab_size)
    first = plan.tokenizer.encode("a", add_special_tokens=False)
    texts = plan.tokenizer.batch_decode([[*first, token] for token in ids])
    assert len(plan.tokenizer) == len(ids) and all(len(text) > 1 and "\ufffd" not in text for text in texts)
    assert plan.tokenizer.convert_tokens_to_ids("<image>") == plan.config.image_token_index
    prompt = "Question: what is it? Answer:"
    assert prompt in plan.tokenizer.decode(plan.tokenizer(prompt).input_ids)


@pytest.mark.parametrize(("shape", "millions"), [("demo", 3), ("medium", 761), ("medium-t5", 1189)])
def test_a_model_to_measure_on_has_the_size_it_is_named_for(shape: str, millions: int) -> None:
    assert round(random_checkpoint.n_parameters(shape) / 1e6) == millions
