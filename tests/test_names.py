"""Canonical names: the same under every wrapper, tied tensors once."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Small
from torch import nn

from ewma.names import canonical, mismatch, named_tensors, unwrap


def names(model: nn.Module) -> list[str]:
    return [named.name for named in named_tensors(model)]


def test_a_plain_model_has_its_own_names(small: Small) -> None:
    expected = {name for name, _ in small.named_parameters()} | {name for name, _ in small.named_buffers()}
    assert set(names(small)) == expected


def test_a_tied_tensor_comes_once_with_all_its_names(small: Small) -> None:
    tied = [named for named in named_tensors(small) if len(named.names) > 1]
    assert [named.names for named in tied] == [("last.weight", "tied.weight")]
    assert tied[0].tensor is small.last.weight


def test_what_is_not_saved_is_told_apart(small: Small) -> None:
    persistent = {named.name: named.persistent for named in named_tensors(small)}
    assert not persistent["table"]
    assert persistent["mask"]
    assert persistent["first.weight"]


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
)
def test_wrappers_leave_no_trace(small: Small, wrap) -> None:
    expected = names(small)
    wrapped = wrap(small)
    assert [name for name in names(wrapped) if name != "n_averaged"] == expected
    assert isinstance(unwrap(wrapped), Small)


def test_a_module_that_is_really_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(1, 1)
    assert names(model) == ["module.weight", "module.bias"]


def test_checkpoint_wrapper_leaves_no_trace() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    assert names(nn.Sequential(checkpoint_wrapper(nn.Linear(1, 1)))) == ["0.weight", "0.bias"]


def test_two_tensors_of_one_name_are_refused() -> None:
    model = nn.Module()
    model._orig_mod = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="two tensors of the model share the canonical name 'weight'"):
        named_tensors(model)


def test_a_module_that_holds_its_parent_does_not_loop() -> None:
    parent, child = nn.Module(), nn.Linear(1, 1)
    parent.child = child
    child._modules["parent"] = parent
    assert names(parent) == ["child.weight", "child.bias"]


@pytest.mark.parametrize(
    ("foreign", "expected"),
    [
        ("a.weight", "a.weight"),
        ("module.a.weight", "a.weight"),
        ("_orig_mod.a.weight", "a.weight"),
        ("module._orig_mod.a.weight", "a.weight"),
        ("module.module.a.weight", "a.weight"),
        ("a._checkpoint_wrapped_module.weight", "a.weight"),
        ("module.b.weight", "module.b.weight"),
        ("c.weight", "c.weight"),
    ],
)
def test_a_files_names_are_matched(foreign: str, expected: str) -> None:
    assert canonical(foreign, {"a.weight", "module.b.weight"}) == expected


def test_a_mismatch_names_everything() -> None:
    text = mismatch("x does not fit", {"a": (1,), "b": (2,)}, {"b": (3,), "c": (4,)}, "Do y.")
    assert text == "x does not fit: missing: a; not known here: c; of another shape: b [3] for [2]. Do y."
    assert mismatch("x", {"a": (1,)}, {"a": (1,)}, "") is None


def test_a_long_list_of_names_is_cut() -> None:
    text = mismatch("x", {str(n): () for n in range(20)}, {}, "")
    assert text is not None
    assert "and 12 more" in text


def test_ddp_leaves_no_trace(small: Small, tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        expected = names(small)
        assert names(nn.parallel.DistributedDataParallel(small)) == expected
    finally:
        torch.distributed.destroy_process_group()


def test_a_shared_buffer_is_persistent_if_any_of_its_names_is() -> None:
    model, shared = nn.Sequential(nn.Identity(), nn.Identity()), torch.zeros(2)
    model[0].register_buffer("kept", shared)
    model[1].register_buffer("dropped", shared, persistent=False)
    (named,) = named_tensors(model)
    assert named.names == ("0.kept", "1.dropped")
    assert named.persistent
