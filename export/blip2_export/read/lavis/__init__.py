"""LAVIS `.pth` files, presented as checkpoints with Hugging Face names and a configuration that follows from the tensors.

Stage-1 files hold a Q-Former with its text branch and heads; stage-2 files one that feeds a language model, which lies elsewhere.
The image encoder is in the file when it was trained, and in a file of its own otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_export.read.checkpoint import RETRIEVAL, Checkpoint, CheckpointError, Source
from blip2_export.read.lavis.language import Language
from blip2_export.read.lavis.qformer import qformer_config, qformer_source
from blip2_export.read.lavis.state import State, read_state
from blip2_export.read.lavis.vision import vision_source

_PROJECTIONS = {"opt_proj": "opt", "t5_proj": "t5"}
_STAGE_1 = "stage 1"


@dataclass(frozen=True)
class Parts:
    """Where the parts lie that a LAVIS file leaves out."""

    vision: Path | None = None
    llm: Path | None = None
    tokenizer: Path | None = None

    def given(self) -> list[Path]:
        return [path for path in (self.vision, self.llm, self.tokenizer) if path is not None]


class LavisCheckpoint(Checkpoint):
    """A LAVIS file with its missing parts. `folder` is the file, for messages."""

    asks = "the other tensors ask for"

    def __init__(self, file: Path, parts: Parts) -> None:
        state = read_state(file)
        kind = _kind(file, state)
        language = None if kind == _STAGE_1 else Language(file, parts.llm, kind)
        tokenizer_folder = _tokenizer_folder(file, parts, kind)
        eye, vision_config = vision_source(file, state, parts.vision)
        bridge = qformer_source(file, state)
        sources: list[Source] = [bridge, eye]
        config: dict[str, Any] = {"model_type": "blip-2", "vision_config": vision_config}
        config |= qformer_config(bridge, vision_config["hidden_size"], kind == _STAGE_1)
        if language:
            sources.append(language.tensors)
            config |= language.config(tokenizer_folder)
            language.check(file, state)
        else:
            config["architectures"] = [RETRIEVAL]
        self._hold(file, config, sources)
        self.tokenizer_folder, self.processor_folder = tokenizer_folder, None


def _kind(file: Path, state: State) -> str:
    """`stage 1`, `opt` or `t5`."""
    if "itm_head.weight" in state:
        return _STAGE_1
    found = [kind for name, kind in _PROJECTIONS.items() if f"{name}.weight" in state]
    if len(found) != 1 or "query_tokens" not in state:
        raise CheckpointError(
            f"{file}: neither a stage-1 file (itm_head) nor a stage-2 file (opt_proj, t5_proj) of BLIP-2"
        )
    return found[0]


def _tokenizer_folder(file: Path, parts: Parts, kind: str) -> Path:
    if kind != _STAGE_1:
        assert parts.llm is not None, "Language looked"
        return parts.tokenizer or parts.llm
    if parts.llm is not None:
        raise CheckpointError(f"{file}: a stage-1 file goes with no language model; leave --llm out")
    if parts.tokenizer is None:
        raise CheckpointError(
            f"{file}: give the folder of the Q-Former's tokenizer (bert-base-uncased) with --tokenizer"
        )
    return parts.tokenizer
