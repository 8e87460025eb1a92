"""The language model that a stage-2 file leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.read import tokenizers
from blip2_export.read.checkpoint import CheckpointError, TensorFiles, read_json
from blip2_export.read.lavis.state import Source


class Language:
    """A folder with an OPT or T5 model, as LAVIS uses it."""

    def __init__(self, file: Path, folder: Path | None, kind: str) -> None:
        if folder is None:
            raise CheckpointError(f"{file}: a stage-2 file holds no language model; give its folder with --llm")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: config.json is missing; expected the folder of the language model")
        self.folder, self.kind = folder, kind
        self.said = read_json(folder / "config.json")
        found = self.said.get("model_type")
        if found != kind:
            raise CheckpointError(f"{folder}: the language model is `{found}`; {file.name} was trained with `{kind}`")
        self.tensors = _Prefixed(TensorFiles(folder))

    def config(self, tokenizer_folder: Path) -> dict[str, Any]:
        tokenizer = tokenizers.read(tokenizer_folder)
        text = dict(self.said)
        if self.kind == "opt":
            # Captions were trained to end with a line feed, not with OPT's own end token.
            text["eos_token_id"] = next(iter(tokenizer.encode("\n", add_special_tokens=False).ids), None)
        else:
            # T5's own configuration may say another form; the language model behind these files ran with the exact one.
            text["dense_act_fn"] = "gelu"
            text["bos_token_id"] = text.get("eos_token_id", 1)
        image = tokenizer.token_to_id("<image>")
        return {
            "architectures": ["Blip2ForConditionalGeneration"],
            "text_config": text,
            "image_token_index": tokenizer.get_vocab_size() if image is None else image,
        }


class _Prefixed:
    """Names of a language model inside BLIP-2, read from a folder that has them without prefix. OPT has two such forms."""

    _STEMS = (("language_model.", ""), ("language_model.model.", ""))

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def n_bytes(self) -> int:
        return self.source.n_bytes

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> np.ndarray:
        found = self._find(name)
        assert found is not None, "has() knew the name"
        return self.source.read(found)

    def _find(self, name: str) -> str | None:
        candidates = [new + name.removeprefix(old) for old, new in self._STEMS if name.startswith(old)]
        return next((c for c in candidates if self.source.has(c)), None)
