"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from tests.conftest import NATIVE_MISSING, TRITON_MISSING

import ewma

MODULES = [module.name for module in pkgutil.walk_packages(ewma.__path__, "ewma.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    if NATIVE_MISSING and name.startswith(("ewma.kernels.native", "ewma.kernels.compiled")):
        pytest.skip(NATIVE_MISSING)
    if TRITON_MISSING and name.startswith("ewma.kernels.triton"):
        pytest.skip(TRITON_MISSING)
    module = importlib.import_module(name)
    names = {public: getattr(ewma, public) for public in ewma.__all__} | vars(module)
    result = doctest.testmod(module, globs=names, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_some() -> None:
    found = doctest.DocTestFinder().find(importlib.import_module("ewma.weights.ema"))
    assert sum(len(each.examples) for each in found) > 2
