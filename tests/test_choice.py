"""Which kernel serves: by device, by what was compiled, and by EWMA_KERNEL; and what is said about it."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.conftest import NATIVE_MISSING

from ewma import kernels
from ewma.kernels import foreach

needs_native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EWMA_KERNEL", raising=False)
    monkeypatch.setattr(kernels, "_warned", False)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ewma.kernels._native", None)


def served(device: str = "cpu", average_device: str = "cpu") -> str:
    value, average = torch.ones(3, device=device), torch.zeros(3, device=average_device)
    return type(kernels.lerp([value], [[average]], [11])).__module__


@pytest.mark.parametrize("name", ["reference", "foreach", pytest.param("native", marks=needs_native)])
def test_a_kernel_is_forced_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert name in kernels.KERNELS
    monkeypatch.setenv("EWMA_KERNEL", name)
    value, average = torch.ones(3), torch.zeros(3)
    lerp = kernels.lerp([value], [[average]], [11])
    lerp([0.25], [None])
    assert type(lerp).__module__ == f"ewma.kernels.{name}"
    assert average.tolist() == [0.25] * 3


@needs_native
def test_native_serves_the_cpu_and_foreach_the_rest() -> None:
    assert served() == type(kernels.lerp([], [[]], [])).__module__ == "ewma.kernels.native"
    assert served("meta", "meta") == served("meta") == served("cpu", "meta") == "ewma.kernels.foreach"


def test_an_unknown_kernel_is_answered_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWMA_KERNEL", "fast")
    said = "EWMA_KERNEL=fast: no kernel has that name; there are reference, foreach, native"
    with pytest.raises(ValueError, match=said):
        kernels.lerp([], [[]], [])


@pytest.mark.usefixtures("not_compiled")
def test_without_the_compiled_one_foreach_serves_and_says_once_what_to_do() -> None:
    said = r"compiled kernel was not built.*install a C compiler.*pip install .*or set EWMA_KERNEL=foreach"
    with pytest.warns(RuntimeWarning, match=said):
        lerp = kernels.lerp([], [[]], [])
    assert isinstance(lerp, foreach.ForeachLerp)
    assert served() == "ewma.kernels.foreach"


@pytest.mark.usefixtures("not_compiled")
def test_nothing_is_said_where_it_would_not_serve_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    assert served("meta", "meta") == "ewma.kernels.foreach"
    monkeypatch.setenv("EWMA_KERNEL", "foreach")
    assert served() == "ewma.kernels.foreach"


@pytest.mark.usefixtures("not_compiled")
def test_what_is_not_there_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWMA_KERNEL", "native")
    with pytest.raises(ImportError, match="the compiled kernel was not built. Unset EWMA_KERNEL, or install a C"):
        kernels.lerp([], [[]], [])


TELL = "import runpy; runpy.run_module('ewma.kernels', run_name='__main__')"


@needs_native
def test_the_command_tells_which_kernel_serves_and_why(python) -> None:
    told = python("import os; os.environ.pop('EWMA_KERNEL', None)\n" + TELL).splitlines()
    assert [line.split() for line in told[:3]] == [
        ["device", "kernel", "why"],
        ["CPU", "native", "compiled"],
        ["all", "others", "foreach", "torch's", "list", "operations"],
    ]
    assert told[4].startswith("Instruction sets of this processor, the first one used: ")
    assert told[4].endswith("baseline")


def test_the_command_tells_what_is_forced_and_what_is_missing(python) -> None:
    told = python(
        "import os, sys; os.environ['EWMA_KERNEL'] = 'foreach'; sys.modules['ewma.kernels._native'] = None\n" + TELL
    ).splitlines()
    assert told[1].split() == ["CPU", "foreach", "EWMA_KERNEL=foreach"]
    assert told[4].startswith("To be fast on the CPU, install a C compiler and then ewma again: pip install ")
