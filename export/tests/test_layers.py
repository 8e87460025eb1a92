"""Which part of the package may import which: dependencies point down, and no module imports itself through others."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import blip2_export

ROOT = Path(blip2_export.__file__).parent
MAY_IMPORT = {
    "vocabulary": set(),
    "engine": set(),
    "processors": set(),
    "read": set(),
    "graphs": {"read"},
    "reference": {"read", "graphs"},
    "run": {"processors"},
    "loss": {"read", "graphs", "reference", "run", "scenes", "processors"},
    "bundle": {"read", "graphs", "reference", "loss"},
    "convert": {"read", "graphs", "bundle"},
    "scenes": {"engine"},
    "check": {"read", "graphs", "reference", "bundle", "scenes", "engine", "vocabulary"},
    "measure": {"read", "graphs", "reference", "bundle", "engine", "check", "processors"},
    "train": {"read", "graphs", "reference", "bundle", "scenes", "engine", "vocabulary"},
}


def imports() -> dict[str, set[str]]:
    """Module → the modules of this package that it imports, anywhere in its text."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.rglob("*.py")
    }
    found = {}
    for name, path in modules.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blip2_export"):
                stem = (node.module or "").removeprefix("blip2_export").removeprefix(".")
                for alias in node.names:
                    whole = f"{stem}.{alias.name}".removeprefix(".")
                    found[name].add(whole if whole in modules else stem)
    return found


def test_dependencies_point_down() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if (part := module.split(".")[0]) in MAY_IMPORT
        and (below := other.split(".")[0]) != part
        and below not in MAY_IMPORT[part]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_has_its_place() -> None:
    assert {module.split(".")[0] for module in imports()} - {"__init__", "__main__"} == set(MAY_IMPORT)


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(imports()).prepare()


def test_converting_draws_scenes_and_asks_nothing_about_them() -> None:
    found, seen = imports(), set()
    waiting = ["convert"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        waiting += found[module] - seen
    above = {module for module in seen if module.startswith(("scenes", "train", "check", "engine"))}
    assert "bundle" in seen and above <= {"scenes.drawing", "scenes"}, above


def test_processors_are_counted_in_one_place() -> None:
    counted = ("sched_getaffinity", "cpu_count")
    found = [path.stem for path in ROOT.rglob("*.py") if any(name in path.read_text() for name in counted)]
    assert found == ["processors"]


def test_convert_can_be_read_about_without_waiting_for_torch() -> None:
    """Its packages take seconds to load, and are wanted where a checkpoint is."""
    said = "import sys, blip2_export.convert; print(*({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
