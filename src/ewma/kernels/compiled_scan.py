"""The scan along time in one compiled pass over memory, for NumPy arrays and tensors on the CPU.

means.c and spread.c go by the buffers that NumPy lends, which say where and what they are, and check them before they
read. A tensor is lent as the NumPy array of its memory, so nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy

from ewma.arrays import Array, is_tensor
from ewma.kernels import _native

LARGE = 1 << 20


def mean(
    x: Array, out: Array, start: Any, held: float, lost: float, debias: bool, untouched: bool = False
) -> bool | None:
    """The running mean of every series, from its first step on.

        S[t] = S[t-1] + (x[t] - base - lost * S[t-1])       out[t] = base + share[t] * S[t]

    Args:
        x, out: of shape (outer, n, inner), of any layout, sharing no memory.
        start: the means before the first step, float64, of a shape that broadcasts to (outer, 1, inner); or None, for
            each series' first value.
        held: what they weigh, in steps.
        lost: what each step takes from what was.
        debias: share is 1 over the weight of all values so far, `weight[t] = weight[t-1] + (1 - lost * weight[t-1])`
            from `held`; otherwise it is `lost`.
        untouched: whether out is new memory, which the system clears as it is touched: large results go through the
            caches then, where it lies, and around them otherwise.

    True where all stayed finite; None, with nothing done, where x or out are not for this kernel.
    """
    lent, target, begin = lend(x), lend(out), None if start is None else _starts(start, x)
    if lent is None or target is None or (start is not None and begin is None):
        return None
    return _native.mean(lent, target, begin, held, lost, debias, threads(x), untouched)


def spread(
    x: Array,
    outs: Sequence[Array],
    start: Any,
    held: float,
    terms: Any,
    debias: bool,
    kind: int,
    k: float,
    unbiased: bool,
) -> bool | None:
    """The running spread of every series, from its first step on; the arguments are those of `mean`, and:

    Args:
        outs: one array for the variances (kind 0) or deviations (1); or three for the bands (2), the mean less k
            deviations, the mean, and the mean with them.
        terms: what a step keeps and loses.

    True where all stayed finite and no mean hides its values' digits; None as with `mean`.
    """
    lent, targets = lend(x), tuple(map(lend, outs))
    begin = None if start is None else _starts(start, x)
    if lent is None or any(target is None for target in targets) or (start is not None and begin is None):
        return None
    return _native.spread(lent, targets, begin, held, terms.lost, terms.keep, debias, kind, k, unbiased, threads(x))


def _starts(start: Array, x: Array) -> Any:
    """A number for each series, side by side; None where there are none to be lent."""
    lent = lend(start)
    shape = x.shape[0], 1, x.shape[2]
    return None if lent is None else numpy.ascontiguousarray(numpy.broadcast_to(lent, shape))


def run(
    x: Any, out: Any, base: Any, sums: Any, lost: float, pre: Any, post: Any, most: int, untouched: bool = False
) -> bool:
    """`S[t] = S[t-1] + (pre[t] * (x[t] - base) - lost * S[t-1])` and `out[t] = base + post[t] * S[t]`.

    Args:
        x, out: lent arrays of shape (outer, n, inner), sharing no memory.
        base, sums: float64 NumPy arrays of a number for each series: S is read, and left as after the last step.
        pre, post: floats, pre 1.0; or float64 NumPy arrays of n numbers.
        most: how many threads at most.
        untouched: as for `mean`.

    True where all sums stayed finite.
    """
    return _native.scan(x, out, base, sums, lost, pre, post, most, untouched)


weigh, average = _native.weigh, _native.average


def scan(u: Array, lost: float | Array, initial: Array, out: Array, kept: Array | None) -> bool:
    """`ewma.kernels.scan`; False, with nothing done, where one of the arrays is not for this kernel."""
    factors = [part for part in (lost, kept) if part is not None and not isinstance(part, float)]
    lent = [lend(array) for array in (u, out, initial, *factors)]
    if any(array is None or array.dtype.char != "d" for array in lent):
        return False
    most = threads(u)
    u, out, initial, *factors = lent
    shape = (u.shape[0], 1, u.shape[2])
    sums = numpy.array(numpy.broadcast_to(initial, shape), order="C")
    if isinstance(lost, float):
        _native.scan(u, out, numpy.zeros(shape), sums, lost, 1.0, 1.0, most)
    else:
        lost, kept = (*(numpy.broadcast_to(part, u.shape) for part in factors), None)[:2]
        _native.scan_elements(u, lost, kept, out, sums, most)
    return True


def lend(x: Array) -> Any:
    """A NumPy array of x's own memory that C can read; None where there is none."""
    if is_tensor(x):
        return _of_tensor(x)
    return x if x.dtype.char in "fde" and x.dtype.isnative and x.flags.aligned else None


def _of_tensor(x: Any) -> Any:
    torch = sys.modules["torch"]
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return None
    if torch.compiler.is_compiling() or type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return None
    try:
        x = x.detach()
        return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    except (RuntimeError, TypeError):  # what has no memory of its own: under vmap, negated, on no device
        return None


def threads(x: Array) -> int:
    """How many threads may share the work on x: one, where it is too small for others to be worth waking."""
    if math.prod(x.shape) < LARGE:
        return 1
    if is_tensor(x):
        return int(sys.modules["torch"].get_num_threads())
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))
