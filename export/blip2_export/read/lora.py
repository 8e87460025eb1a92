"""The folder of a LoRA adapter, as `save_pretrained` of `peft` writes it: what it changes, and by which factors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from blip2_export.read.checkpoint import CheckpointError, TensorFiles, read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>(?:embedding_)?[AB]|magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
# What the merged tensors do not depend on, or what is read or told by the tensors. Anything else that is set is refused.
_HEEDED = re.compile(
    r"peft_(type|version)|task_type|auto_mapping|base_model_name_or_path|revision|inference_mode|runtime_config|lora_dropout"
    r"|r|lora_alpha|(rank|alpha)_pattern|use_(rslora|dora)|(lora_)?bias|fan_in_fan_out|modules_to_save|(target|exclude)_modules"
    r"|layers_(to_transform|pattern)|init_lora_weights|loftq_config|eva_config|megatron_core|qalora_group_size"
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the other ones change the base's weights


class Lora:
    """`replaced`: whole tensors, by their names in the checkpoint. `modules`: by their part (`A.weight`, …), under peft's names.

    Both lead to names in the adapter's file. What is adapted is told by these, not by `target_modules` and its like.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder}: {CONFIG} is missing; expected the folder of an adapter")
        self.folder, self._said = folder, read_json(folder / CONFIG)
        self._check_kind()
        self._files = TensorFiles(folder, WEIGHTS)
        self.replaced: dict[str, str] = {}
        self.modules: dict[str, dict[str, str]] = {}
        self._sort()

    def changed(self) -> list[str]:
        """Names of the checkpoint's tensors."""
        return [*self.replaced, *(f"{module}.weight" for module in self.modules)]

    def breaks_tie(self, name: str) -> bool:
        """Whether a copy of this tensor's module was trained, which what the original was tied to does not follow."""
        copied = self._said.get("modules_to_save") or ()
        return name in self.replaced and name.rpartition(".")[0].endswith(tuple(copied))

    def replacement(self, name: str) -> np.ndarray:
        return self._files.read(self.replaced[name])

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """Two matrices whose product, scaled, is added to the weight; and whether that is a table, which holds it transposed."""
        parts = self.modules[module]
        is_table = "embedding_A.weight" in parts
        stem = "embedding_" if is_table else ""
        a, b = (self._files.read(parts[f"{stem}{part}.weight"]).astype(np.float32) for part in "AB")
        rank = self._number(module, "rank_pattern", "r")
        if len(a) != rank:
            raise CheckpointError(f"{self.folder}: `{module}` has rank {len(a)}, {CONFIG} says {rank:g}")
        return (a.T, b.T, True) if is_table else (b.reshape(len(b), -1), a.reshape(len(a), -1), False)

    def scale(self, module: str) -> np.float32:
        rank, alpha = self._number(module, "rank_pattern", "r"), self._number(module, "alpha_pattern", "lora_alpha")
        return np.float32(alpha / (rank**0.5 if self._said.get("use_rslora") else rank))

    def magnitude(self, module: str) -> np.ndarray | None:
        """Lengths of the rows of the merged weight (DoRA)."""
        name = self.modules[module].get("magnitude_vector.weight")
        return None if name is None else self._files.read(name).astype(np.float32).reshape(-1)

    def bias(self, module: str) -> np.ndarray | None:
        """What is scaled and added to the bias."""
        name = self.modules.get(module, {}).get("B.bias")
        return None if name is None else self._files.read(name).astype(np.float32)

    def _number(self, module: str, patterns: str, usual: str) -> float:
        """The first pattern that fits the end of the module's name counts."""
        try:
            by_pattern = (self._said.get(patterns) or {}).items()
            found = next((value for key, value in by_pattern if re.match(rf"(.*\.)?({key})$", module)), None)
            number = float(self._said.get(usual, 8) if found is None else found)
        except (re.error, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder}: {CONFIG}: {patterns} or {usual} is not understood ({error})"
            ) from error
        if not 0 < number < np.inf and usual == "r":
            raise CheckpointError(f"{self.folder}: {CONFIG} gives `{module}` the rank {number:g}")
        return number

    def _check_kind(self) -> None:
        kind = self._said.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"{self.folder}: an adapter of kind `{kind}`; only LoRA is merged")
        other = next((name for name, value in self._said.items() if value and not _HEEDED.fullmatch(name)), None)
        if other is None and self._said.get("init_lora_weights", True) not in _PLAIN_STARTS:
            other = "init_lora_weights"
        if other is not None:
            raise CheckpointError(
                f"{self.folder}: {CONFIG} sets {other} to {self._said[other]!r}, which is not supported; merge it with peft "
                "(`merge_and_unload()`) and convert what that saves"
            )

    def _sort(self) -> None:
        adapters = set()
        for name in self._files.names():
            inside = name.removeprefix("base_model.model.")
            found = _PART.fullmatch(inside)
            if found is None:
                self.replaced[_WRAPPERS.sub("", inside)] = name
            else:
                adapters.add(found["adapter"])
                self.modules.setdefault(found["module"], {})[f"{found['part']}.{found['kind'] or 'weight'}"] = name
        if len(adapters) > 1:
            raise CheckpointError(f"{self.folder}: it holds several adapters in one file; save each on its own")
        for module, parts in self.modules.items():
            self._check_parts(module, set(parts))

    def _check_parts(self, module: str, parts: set[str]) -> None:
        """All of a kind, and no more than the configuration says: a part that is not read would be lost."""
        if any(part.startswith("embedding_") for part in parts):
            wanted = {"embedding_A.weight", "embedding_B.weight"}
        else:
            wanted = {"A.weight", "B.weight"}
            wanted |= {"B.bias"} if self._said.get("lora_bias") else set()
            wanted |= {"magnitude_vector.weight"} if self._said.get("use_dora") else set()
        if parts != wanted:
            part = min(parts ^ wanted)
            state = "is missing" if part in wanted else "has no place there"
            raise CheckpointError(f"{self.folder}: `lora_{part}` of `{module}` {state}")
