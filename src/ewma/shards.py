"""The part of a tensor that lies here: all of a plain one, this rank's shard of a DTensor."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: split over ranks, or known to be the same on several."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor. Communicates nothing."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reshard(model: nn.Module) -> None:
    """Make FSDP register its sharded parameters again. Communicates nothing.

    After a forward without a backward the whole parameters stay registered: a copy, and what is written there is lost.
    """
    fsdp = _fsdp()
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        elif isinstance(module, fsdp.FullyShardedDataParallel) and module._handle and module._is_root is not None:
            fsdp._runtime_utils._reshard(module, module._handle, True)


def recover(model: nn.Module) -> None:
    """Reshard after an exception, which may have left FSDP2 in the middle of a forward, where it does not reshard."""
    fsdp = _fsdp()
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            with contextlib.suppress(RuntimeError):  # only the root does it, for all
                module.reset_iter_state()


def has_fsdp(model: nn.Module) -> bool:
    """Whether any part of it is sharded by FSDP, 1 or 2."""
    fsdp = _fsdp()
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    return any(isinstance(module, kinds) for module in model.modules())


def is_flat(model: nn.Module) -> bool:
    """Whether any part of it is sharded by FSDP 1: parameters are then pieces of no shape of their own."""
    fsdp = _fsdp()
    return bool(fsdp) and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())


def data_groups(model: nn.Module) -> list[Any]:
    """The process groups over which DDP or FSDP give every rank its own part of the data."""
    fsdp, groups = _fsdp(), []
    ddp = nn.parallel.DistributedDataParallel
    whole = (ddp, fsdp.FullyShardedDataParallel) if fsdp else (ddp,)
    for module in model.modules():
        if isinstance(module, whole):
            groups.append(module.process_group)
        elif fsdp and isinstance(module, fsdp.FSDPModule):
            for own in module._get_fsdp_state()._fsdp_param_groups:
                groups += _groups(own.mesh_info.mesh)
    return list(dict.fromkeys(groups))


def mesh_groups(model: nn.Module) -> list[Any]:
    """The process groups along every dimension of the meshes that the parameters lie on."""
    meshes = [parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh")]
    return list(dict.fromkeys(group for mesh in dict.fromkeys(meshes) for group in _groups(mesh)))


def _groups(mesh: Any) -> list[Any]:
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


def _fsdp() -> Any:
    """FSDP, if anybody has imported it: who has not uses none, and it takes its time."""
    return sys.modules.get("torch.distributed.fsdp")


def first_element(tensor: Tensor) -> int:
    """The index that this rank's first element has in the whole tensor, counted along its rows."""
    if not is_sharded(tensor):
        return 0
    _, offsets = _chunk(tensor)
    rows = 1
    index = 0
    for size, offset in zip(reversed(tensor.shape), reversed(offsets), strict=True):
        index += offset * rows
        rows *= size
    return index


def write(target: Tensor, source: Tensor) -> None:
    """Copy the source's values into the target's memory, each rank its own part.

    Communicates only where the source is sharded in another way than the target.
    """
    if target is not source:
        into, values = local(target), local(placed_like(source, target))
        for dim, step in enumerate(into.stride()):
            if step == 0 and into.shape[dim] > 1:  # expanded: one place in memory, which may be written once
                into, values = into.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
        into.copy_(values)


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The same values, placed as `like` is: the tensor itself where it is so already.

    Each rank cuts its part out of a whole tensor; what is sharded in another way is gathered first: collective.
    """
    if not is_sharded(tensor) and not is_sharded(like):
        return tensor
    if _placement(tensor) == _placement(like):
        return tensor
    whole: Any = tensor.detach()
    if is_sharded(whole):
        whole = whole.full_tensor()
    if not is_sharded(like):
        return whole  # type: ignore[no-any-return]
    held: Any = like
    shape, offsets = _chunk(like)
    for dim, (size, offset) in enumerate(zip(shape, offsets, strict=True)):
        whole = whole.narrow(dim, min(offset, whole.shape[dim]), size)
    placed: Tensor = _dtensor().from_local(
        whole.clone(), held.device_mesh, held.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return placed


def summed(part: Tensor, like: Tensor) -> Tensor:
    """What every rank has summed over its own part of `like`, summed over all ranks that hold a part: collective where
    `like` is a DTensor."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import Partial, Replicate

    held: Any = like
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in held.placements]
    whole: Tensor = _dtensor().from_local(part, held.device_mesh, placements, run_check=False).full_tensor()
    return whole


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


def _placement(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def _chunk(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offsets of this rank's part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
