"""LoRA (Hu et al. 2021) through `peft`: small matrices beside those of a frozen model, written as an adapter of its base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from blip2_export.train.own.sources import DataError

# Queries and values of self-attention, as in the paper of LoRA (section 4.2); in the Q-Former of cross-attention as well.
_TARGETS = {"opt": ("q_proj", "v_proj"), "t5": ("q", "v"), "qformer": ("query", "value")}
# Where the model that an adapter belongs to has them.
_PLACES = {"language": "language_model", "qformer": "qformer"}
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """What is adapted (`language` or `qformer`) and how; sizes are those of the example of `peft` for BLIP-2."""

    target: str = "language"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05

    @staticmethod
    def parsed(text: str) -> Lora:
        """`language`, `qformer`, or one of them with a rank, as `language:8`; alpha is twice the rank."""
        target, _, rank = text.partition(":")
        if target not in _PLACES or not (rank or "16").isdecimal() or not int(rank or 16):
            raise DataError(f"--lora {text}: expected language or qformer, with a rank of 1 or more as in language:8")
        n = int(rank or 16)
        return Lora(target, n, 2.0 * n)


@dataclass
class Adapter:
    """LoRA's matrices inside a model."""

    lora: Lora
    config: LoraConfig
    module: nn.Module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the model."""
        return {name: p for name, p in self.module.named_parameters() if ".lora_" in name}

    @property
    def dropouts(self) -> list[nn.Module]:
        """What is random in training though the model around it is not."""
        return [module for name, module in self.module.named_modules() if name.endswith(".lora_dropout")]

    def tensors(self) -> dict[str, Tensor]:
        """As `peft` names them in files."""
        start = f"base_model.model.{_PLACES[self.lora.target]}."
        return {start + name.replace(".default.", "."): p.detach().cpu() for name, p in self.parameters.items()}


def adapt(lora: Lora, module: nn.Module, family: str, seed: int) -> Adapter:
    """Puts LoRA's matrices into `module`, and leaves nothing else of it to be trained. `family`: of the language model."""
    names = _TARGETS[family if lora.target == "language" else "qformer"]
    shape: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    torch.manual_seed(seed)
    module.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(target_modules=list(names), **shape), module)
    place = _PLACES[lora.target].replace(".", r"\.")
    whole = LoraConfig(target_modules=rf"{place}\..*\.({'|'.join(names)})", inference_mode=True, **shape)
    made = Adapter(lora, whole, module)
    for p in made.parameters.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    return made
