"""What follows training in the same command: the bundle, its verification, and what it can do on pictures that were held out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blip2_export.bundle import Choices, convert
from blip2_export.engine import run_engine
from blip2_export.graphs.builder import UnsupportedError
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.scenes.held_out import Engine
from blip2_export.train.own import questions
from blip2_export.train.own.evaluation import evaluate
from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError

_BUILT = Path(__file__).parents[4] / "target" / "release" / "blip2"


@dataclass(frozen=True)
class Chain:
    """Where the bundle goes, and who verifies it. `most`: pictures that it is evaluated on; `force`: an old bundle gives way."""

    bundle: Path
    engine: Path | None = None
    most: int = 500
    force: bool = False

    def check(self) -> None:
        """Refuses before anything is trained what would fail after it."""
        if self.bundle.exists() and not self.force:
            raise DataError(f"{self.bundle}: it exists; name another --convert, or add --force to replace it")
        if self.bundle.exists() and not (self.bundle / "bundle.json").is_file():
            raise DataError(
                f"{self.bundle}: it exists and is no bundle, so that it is not replaced; name another --convert"
            )
        named = self.engine or os.environ.get("BLIP2_ENGINE")
        if named and not Path(named).is_file():
            raise DataError(f"{named}: there is no such engine; `make build` builds it")

    def found_engine(self) -> Path | None:
        """The one that is named, that of `BLIP2_ENGINE`, the one that is built here, or the one on the path."""
        known = [self.engine, os.environ.get("BLIP2_ENGINE"), _BUILT, shutil.which("blip2")]
        return next((Path(path) for path in known if path and Path(path).is_file()), None)


@dataclass(frozen=True)
class Trained:
    """What a stage left in `folder`, what it did not learn, and the `prompt` that captions stand behind."""

    stage: str
    folder: Path
    held_out: Sequence[Record]
    work: Path
    prompt: str = ""


def follow(chain: Chain, trained: Trained) -> None:
    """Converts the folder of a stage, verifies the bundle and evaluates it; figures go to `WORK/<stage>_evaluation.json`."""
    stage, work = trained.stage, trained.work
    try:
        asks = questions.PROMPT if stage == "vqa" else None
        choices = Choices(chain.bundle.name, trained.prompt or None, asks, force=chain.force)
        convert(trained.folder, chain.bundle, choices)
    except (CheckpointError, UnsupportedError) as error:
        raise DataError(f"{trained.folder} is trained, but cannot be converted: {error}") from error
    engine = chain.found_engine()
    if engine is None:
        print(
            f"warning: {chain.bundle} is neither verified nor evaluated: no engine here; `make build` builds it",
            file=sys.stderr,
        )
        return
    try:
        run_engine(engine, "verify", str(chain.bundle))
        print(f"{stage}: {chain.bundle} is verified", file=sys.stderr)
        if not trained.held_out:
            print(f"warning: {chain.bundle} is not evaluated, for nothing is held out", file=sys.stderr)
            return
        found = evaluate(Engine(engine, chain.bundle), trained.held_out, chain.most, work / f"{stage}_written.jsonl")
    except SystemExit as error:
        raise DataError(str(error)) from error
    figures = {name: round(value, 4) for name, value in found.items()}
    (work / f"{stage}_evaluation.json").write_text(json.dumps(figures) + "\n")
    print(json.dumps({"bundle": str(chain.bundle), "on": "held-out pictures", **figures}), flush=True)
