"""What a stage needs of a frozen language model, whichever family it is of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from blip2_export import scenes
from blip2_export.train.text import Text


class TextsOf(Protocol):
    """Texts about one scene: this many captions and questions, and perhaps the report."""

    def __call__(
        self, scene: scenes.Scene, rng: random.Random, n_captions: int, n_questions: int, report: bool
    ) -> list[Text]: ...


@dataclass(frozen=True)
class Speaker:
    """`texts`: the model with `losses(prefix, batch)` and the `width` of a query in its soft prompt.

    `asked` is the text of a question of some kind with its answer. `pack` makes a batch of the texts of each prefix. `right` counts
    (right, all) texts per kind of such a batch, right when each token of the target is the most probable one behind the true ones.
    `captions` writes greedy ones.
    """

    texts: Any
    texts_of: TextsOf
    asked: Callable[[str, str, str], Text]
    pack: Callable[[list[list[Text]]], Any]
    right: Callable[[Tensor, Any], dict[str, tuple[int, int]]]
    captions: Callable[[Tensor], list[str]]

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self.texts.model
        return model
