"""Which kernel serves: by device, by what was compiled, and by EWMA_KERNEL; and what is said about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from tests.conftest import NATIVE_MISSING, TRITON_MISSING

from ewma import kernels
from ewma.kernels import foreach

needs_native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EWMA_KERNEL", raising=False)
    monkeypatch.setattr(kernels, "_warned", False)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ewma.kernels._native", None)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels.missing_triton.cache_clear()
    yield
    kernels.missing_triton.cache_clear()


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


@needs_triton
def test_triton_serves_one_cuda_device_at_a_time() -> None:
    assert kernels.choose("cuda:1") == ("triton", "one launch for all")
    for several in (("cuda:0", "cuda:1"), ("cpu", "cuda:0"), ("meta",), ("cuda:0", "xpu:0")):
        assert kernels.choose(*several) == ("foreach", "torch's list operations")


@pytest.mark.usefixtures("no_triton")
def test_without_triton_foreach_serves_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.choose("cuda:0") == ("foreach", "torch's list operations, since Triton is not installed")
    monkeypatch.setenv("EWMA_KERNEL", "triton")
    said = r"EWMA_KERNEL=triton: Triton is not installed. Unset EWMA_KERNEL, or pip install ewma\[triton\]"
    with pytest.raises(ImportError, match=said):
        kernels.lerp([], [[]], [])


@needs_triton
def test_a_triton_that_does_not_work_here_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    class Broken:
        def get_current_target(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(driver, "_active", Broken())
    kernels.missing_triton.cache_clear()
    try:
        said = "torch's list operations, since Triton does not work here (Failed to find C compiler)"
        assert kernels.choose("cuda") == ("foreach", said)
    finally:
        kernels.missing_triton.cache_clear()


@needs_triton
def test_where_triton_is_interpreted_foreach_serves_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.missing_triton.cache_clear()
    try:
        assert kernels.choose("cuda") == ("foreach", "torch's list operations, since TRITON_INTERPRET is set")
    finally:
        kernels.missing_triton.cache_clear()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_compiled_for_a_gpu_triton_refuses_the_cpu(python) -> None:
    program = (
        "import os, torch; os.environ.pop('TRITON_INTERPRET', None); os.environ['EWMA_KERNEL'] = 'triton'\n"
        "from ewma import kernels\n"
        "try: kernels.lerp([torch.ones(3)], [[torch.zeros(3)]], [1])\n"
        "except ValueError as error: print(error)"
    )
    assert python(program) == (
        "the triton kernel averages strided tensors on a CUDA device (or on the CPU, slowly, for tests: "
        "TRITON_INTERPRET=1); got values on cpu, layout torch.strided. Unset EWMA_KERNEL: another kernel serves those."
    )


def test_an_unknown_kernel_is_answered_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWMA_KERNEL", "fast")
    said = "EWMA_KERNEL=fast: no kernel has that name; there are reference, foreach, native, triton"
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
    assert [line.split() for line in told[:4]] == [
        ["device", "kernel", "why"],
        ["CPU", "native", "compiled"],
        ["CUDA", *" ".join(kernels.choose("cuda")).split()],
        ["all", "others", "foreach", "torch's", "list", "operations"],
    ]
    assert told[5].startswith("Instruction sets of this processor, the first one used: ")
    assert told[5].endswith("baseline")


def test_the_command_tells_what_is_forced_and_what_is_missing(python) -> None:
    told = python(
        "import os, sys; os.environ['EWMA_KERNEL'] = 'foreach'; sys.modules['ewma.kernels._native'] = None\n" + TELL
    ).splitlines()
    assert told[1].split() == ["CPU", "foreach", "EWMA_KERNEL=foreach"]
    assert told[5].startswith("To be fast on the CPU, install a C compiler and then ewma again: pip install ")
