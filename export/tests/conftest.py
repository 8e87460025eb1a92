"""Settings of every test."""

from collections import Counter

import pytest
import torch

import blip2_export  # noqa: F401, for what it sets before ONNX Runtime is loaded

# Models in tests are tiny: threads cost more than they give, and the engine needs cores too.
torch.set_num_threads(1)

# A worker takes whole files; one of these at the end would run alone. Elsewhere many tests are much work.
LONG = (
    "test_engine.py",
    "test_own_kills.py",
    "test_webgpu.py",
    "test_own_models.py",
    "test_own_command.py",
    "test_emulation.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, where workers keep to that (`--no-loadscope-reorder`)."""
    counts = Counter(item.path.name for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = item.path.name
        return LONG.index(name) if name in LONG else len(LONG), -counts[name], name

    items.sort(key=place)
