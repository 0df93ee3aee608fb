"""How a tensor lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without holes or overlaps, in whatever order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))


def flat(tensor: Tensor) -> Tensor:
    """All elements of a dense tensor as one vector, in the order of memory, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def parts_of(tensor: Tensor) -> Tensor:
    """Real and imaginary parts of a complex tensor side by side, without a copy; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
