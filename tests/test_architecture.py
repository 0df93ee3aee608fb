"""The arrows between the modules point one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import ewma

ROOT = Path(importlib.util.find_spec("ewma").submodule_search_locations[0])

# Each module may import those in lower floors; on one floor only what is named with it.
FLOORS = [
    {"profiles": set(), "arrays": set()},
    {"recurrence": set(), "columns": set(), "series.values": set(), "shards": set()},
    {
        "kernels": set(),
        "files": set(),
        "readers": set(),
        "pieces": {"files", "readers"},
        "names": set(),
        "series.weighting": set(),
        "series.stamps": set(),
        "series.residues": set(),
        "series.bases": set(),
        "series.ratios": set(),
    },
    {
        "series.passes": set(),
        "series.rules": set(),
        "hooks": set(),
        "weights.ranks": set(),
        "weights.places": set(),
        "weights.swapping": set(),
        "tracks": set(),
        "weights.offload": set(),
    },
    {"series.averaging": set(), "series.whole": set(), "series.outs": set()},
    {"series.moments": set()},
    {"series.merging": set(), "series.sweep": set()},
    {"series.cells": set(), "series.sides": set()},
    {"weights.binding": set(), "weights.states": set()},
    {"weights.views": set(), "weights.resharding": set()},
    {"series.ema": set(), "series.smoothing": set(), "weights.ema": set(), "gradients": set(), "nn": set()},
    {"series": set(), "weights": set()},
    {"posthoc": set(), "checkpoints": set(), "logs": set()},
    {"cli": set(), "integrations": set()},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def part(module: str) -> str:
    """What has a floor of its own: the module, or the nearest package around it."""
    while module and module not in FLOOR:
        module = module.rpartition(".")[0]
    return module


def called(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The parts of ewma that a file imports when it runs, not only for types."""
    tree = ast.parse(path.read_text())
    typing_only = {id(node) for test in ast.walk(tree) if _is_type_checking(test) for node in ast.walk(test)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "ewma":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ewma."):
            found |= {f"{node.module.removeprefix('ewma.')}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ewma.") for alias in node.names if alias.name.startswith("ewma.")}
    return {part(module) for module in found}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


SOURCES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    own = part(called(path))
    for other in imported(path) - {own}:
        below = FLOOR[other] < FLOOR[own] or other in FLOORS[FLOOR[own]][own]
        assert below, f"{path.name} ({own}) imports {other}, which is not below it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_its_floor(path: Path) -> None:
    divided = {module.partition(".")[0] for module in FLOOR if "." in module}
    assert called(path) in FLOOR or part(called(path)) in FLOOR.keys() - divided


@pytest.mark.parametrize("path", [ROOT / "__init__.py", *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


LOADED = "import sys; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"


@pytest.mark.parametrize(
    ("program", "loaded"),
    [
        ("import ewma", []),
        ("import ewma; ewma.Exponential(half_life=3).weights(4); ewma.profiles.cosine(steps=3)", []),
        ("import ewma; ema = ewma.EMA(half_life=3); ema.update(1.0); ema.get(); ema.state_dict()", []),
        ("import ewma, numpy; ema = ewma.EMA(half_life=3); ema.update(numpy.ones(3)); ema.get()", ["numpy"]),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(python, program: str, loaded: list[str]) -> None:
    assert python(f"{program}\n{LOADED}") == str(loaded)


def test_the_public_names() -> None:
    assert ewma.__all__ == sorted(ewma.__all__, key=lambda name: (name.islower(), name))
    assert dir(ewma) == ewma.__all__
    for name in ewma.__all__:
        assert getattr(ewma, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'ema'; it has EMA, Exponential, GradientEMA"):
        _ = ewma.ema


def test_the_tests_run_on_the_installed_package() -> None:
    assert "site-packages" in ROOT.parts
