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
_PLACES = {"language": ("language_model",), "qformer": ("qformer",), "both": ("language_model", "qformer")}
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """What is adapted (`language`, `qformer` or `both`) and how; sizes are those of the example of `peft` for BLIP-2."""

    target: str = "language"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05

    @staticmethod
    def parsed(text: str) -> Lora:
        """`language`, `qformer`, `both`, or one of them with a rank, as `language:8`; alpha is twice the rank."""
        target, _, rank = text.partition(":")
        if target not in _PLACES or not (rank or "16").isdecimal() or not int(rank or 16):
            raise DataError(
                f"--lora {text}: expected language, qformer or both, with a rank of 1 or more as in language:8"
            )
        n = int(rank or 16)
        return Lora(target, n, 2.0 * n)


@dataclass
class Adapter:
    """LoRA's matrices inside models, which are by the names of their places in the whole one."""

    config: LoraConfig
    modules: dict[str, nn.Module]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the whole model."""
        return {
            f"{place}.{name}": p
            for place, module in self.modules.items()
            for name, p in module.named_parameters()
            if ".lora_" in name
        }

    @property
    def dropouts(self) -> list[nn.Module]:
        """What is random in training though the model around it is not."""
        parts = (part for module in self.modules.values() for part in module.named_modules())
        return [part for name, part in parts if name.endswith(".lora_dropout")]

    def tensors(self) -> dict[str, Tensor]:
        """As `peft` names them in files."""
        named = self.parameters.items()
        return {f"base_model.model.{name.replace('.default.', '.')}": p.detach().cpu() for name, p in named}


def adapt(lora: Lora, language: nn.Module, qformer: nn.Module, family: str, seed: int) -> Adapter:
    """Puts LoRA's matrices into one or both, and leaves nothing else of those to be trained. `family`: of the language model."""
    there = {"language_model": (language, _TARGETS[family]), "qformer": (qformer, _TARGETS["qformer"])}
    shape: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    torch.manual_seed(seed)
    modules, patterns = dict[str, nn.Module](), list[str]()
    for place in _PLACES[lora.target]:
        module, names = there[place]
        module.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(target_modules=list(names), **shape), module)
        modules[place] = module
        patterns.append(rf"{place}\..*\.({'|'.join(names)})")
    made = Adapter(LoraConfig(target_modules="|".join(patterns), inference_mode=True, **shape), modules)
    for p in made.parameters.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    return made
