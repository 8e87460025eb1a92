"""The language model that a stage-2 file leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip2_export.read import foreign, tokenizers
from blip2_export.read.checkpoint import CheckpointError, TensorFiles, read_json
from blip2_export.read.lavis.state import Renamed, State, numbers

_COPIES = {
    "opt_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight",
    "t5_model.encoder.embed_tokens.weight": "language_model.shared.weight",
    "t5_model.decoder.embed_tokens.weight": "language_model.shared.weight",
}


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
        files = TensorFiles(folder)
        if said := foreign.quantized(self.said) or foreign.wrapped(files.names()):
            raise CheckpointError(f"{folder}: {said}")
        self.tensors = Renamed(files, {_inside(name, kind): name for name in files.names()})

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

    def check(self, file: Path, state: State) -> None:
        """A file keeps tied copies of the frozen tables, in its own precision: they tell whether this is the right model."""
        for name, own in _COPIES.items():
            if name in state:
                copy, given = numbers(file, name, state[name]), self.tensors.read(own)
                if copy.shape != given.shape or not (copy == given.astype(copy.dtype)).all():
                    raise CheckpointError(f"{self.folder}: `{own}` is not what {file.name} was trained with (`{name}`)")


def _inside(name: str, kind: str) -> str:
    """What BLIP-2 calls a tensor of the language model. Old files of OPT leave out the outermost module."""
    return ("language_model.model." if kind == "opt" and name.startswith("decoder.") else "language_model.") + name
