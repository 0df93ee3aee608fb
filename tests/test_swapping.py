"""Swapping: whatever happens inside, the raw weights come back bit for bit."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Small, bits, same, train
from torch import nn

import ewma
from ewma import swapping


@pytest.fixture
def ema(small: Small, sgd) -> ewma.ModelEMA:
    ema = ewma.ModelEMA(small, {"fast": ewma.Exponential(half_life=1), "wide": ewma.Uniform()}).attach(sgd)
    train(small, sgd, 4)
    return ema


def averages(ema) -> dict[str, torch.Tensor]:
    return {name: average.clone() for name, average in ema.named_parameters()}


def holds(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return same({name: p.detach() for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("stash", [None, "cpu"])
def test_averages_inside_raw_outside(ema, small: Small, stash) -> None:
    before, expected = bits(small), averages(ema)
    with ema.swapped(stash=stash):
        assert holds(small, expected)
        small(torch.randn(3, 4))  # BatchNorm in training mode moves its statistics
    assert same(bits(small), before)
    assert same(averages(ema), expected)


def test_nested_swaps_of_two_profiles(ema, small: Small) -> None:
    before, fast, wide = bits(small), averages(ema["fast"]), averages(ema["wide"])
    with ema["fast"].swapped():
        with ema["wide"].swapped():
            assert holds(small, wide)
            with ema["fast"].swapped():
                assert holds(small, fast)
            assert holds(small, wide)
        assert holds(small, fast)
    assert same(bits(small), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_inside_nested_swaps_restores(ema, small: Small, error) -> None:
    before = bits(small)
    with pytest.raises(error), ema["fast"].swapped(), ema["wide"].swapped():
        raise error
    assert same(bits(small), before)
    ema.update()  # no longer refused


def test_a_validation_before_the_first_step_sees_the_weights(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, half_life=10).attach(sgd)
    before = bits(small)
    with ema.swapped():
        assert same(bits(small), before)
        with pytest.raises(RuntimeError, match="Leave the with block first"):
            ema.update()
    assert same(bits(small), before)
    train(small, sgd)
    assert ema.count == 1


class Interrupting:
    """Copies as usual but raises at the n-th copy, once: Ctrl-C at the worst moment."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.left, self.original = at, torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, *a, **k: self.copy(tensor, *a, **k))

    def copy(self, tensor, *arguments, **keywords):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.original(tensor, *arguments, **keywords)


@pytest.mark.parametrize("at", range(1, 21))
def test_an_interrupt_during_the_swap_itself_restores(ema, small: Small, monkeypatch, at: int) -> None:
    before = bits(small)
    with pytest.MonkeyPatch.context() as patch:
        Interrupting(patch, at)
        try:
            with ema.swapped():
                pass
        except KeyboardInterrupt:
            pass
    assert same(bits(small), before)
    ema.update()


def test_updating_meanwhile_is_refused_before_the_optimizer_steps(ema, small: Small, sgd) -> None:
    with ema.swapped():
        inside = bits(small)
        small(torch.randn(3, 4)).sum().backward()
        inside["norm.running_mean"], inside["norm.running_var"] = small.norm.running_mean, small.norm.running_var
        inside["norm.num_batches_tracked"] = small.norm.num_batches_tracked
        with pytest.raises(RuntimeError, match="there are no raw weights to train, average or overwrite now"):
            sgd.step()
        assert same(bits(small), inside)
        for forbidden in (ema.update, ema.reset, ema.copy_to, lambda: ema.load_state_dict(ema.state_dict())):
            with pytest.raises(RuntimeError, match="only evaluate inside it"):
                forbidden()
    train(small, sgd)


def test_another_owner_of_the_same_model_is_refused_too(ema, small: Small) -> None:
    other = ewma.ModelEMA(torch.compile(small, backend="eager"), half_life=2)
    with ema.swapped(), pytest.raises(RuntimeError, match="the averages are in the model"):
        other.update()


def test_two_owners_nest(ema, small: Small) -> None:
    other = ewma.ModelEMA(small, half_life=100, only="first.*")
    other.update()
    before, mine, theirs = bits(small), averages(ema), averages(other)
    with ema.swapped():
        with other.swapped():
            assert holds(small, {**mine, **theirs})
        assert holds(small, mine)
    assert same(bits(small), before)


def test_what_a_user_changes_inside_is_undone(ema, small: Small) -> None:
    before, expected = bits(small), averages(ema)
    with ema.swapped(), torch.no_grad():
        small.first.weight.zero_()
    assert same(bits(small), before)
    assert same(averages(ema), expected)


def test_a_teacher_and_the_averages_do_not_move(ema, small: Small) -> None:
    teacher = ema.module()
    before = bits(teacher)
    with ema.swapped():
        assert same(bits(teacher), before)
    assert same(bits(teacher), before)


def test_a_checkpoint_written_meanwhile_tells_raw_from_average(ema, small: Small) -> None:
    before, expected = bits(small), averages(ema)
    with ema.swapped():
        checkpoint = {"model": bits(small), "ema": ema.state_dict()}
        checkpoint["ema"]["raw"] = {name: raw.clone() for name, raw in checkpoint["ema"]["raw"].items()}
    assert "raw" not in ema.state_dict()

    resumed = Small()
    resumed.load_state_dict(checkpoint["model"])
    other = ewma.ModelEMA(resumed, {"fast": ewma.Exponential(half_life=1), "wide": ewma.Uniform()})
    other.load_state_dict(checkpoint["ema"])
    assert same(bits(resumed), before)
    assert same(averages(other), expected)


def test_one_copy_of_the_raw_weights_and_no_more(ema, small: Small) -> None:
    def aside() -> int:
        return sum(raw.numel() for raw in (swapping.raw_weights(small) or {}).values())

    size = sum(tensor.numel() for tensor in small.state_dict().values()) - small.last.weight.numel()  # tied
    with ema["fast"].swapped():
        assert aside() == size + small.table.numel()
        with ema["wide"].swapped():
            assert aside() == size + small.table.numel()
    assert swapping.raw_weights(small) is None


def test_an_unknown_stash_is_refused(ema) -> None:
    with pytest.raises(ValueError, match="stash must be None .* or \"cpu\"; got 'disk'"), ema.swapped(stash="disk"):
        pass


def test_a_model_is_not_kept_alive() -> None:
    import gc
    import weakref

    model = nn.Linear(1, 1)
    ema = ewma.ModelEMA(model, half_life=1)
    ema.update()
    with ema.swapped():
        pass
    gone = weakref.ref(model)
    del model, ema
    gc.collect()
    assert gone() is None


def test_a_part_that_somebody_swapped_is_refused(small: Small) -> None:
    whole, part = ewma.ModelEMA(small, half_life=2), ewma.ModelEMA(small.first, half_life=2)
    whole.update()
    part.update()
    for one, other in ((whole, part), (part, whole)):
        with one.swapped(), pytest.raises(RuntimeError, match="the averages are in the model"):
            other.update()


@pytest.mark.parametrize("buffers", ["copy", "average", "leave"])
@pytest.mark.parametrize("updates", [0, 2])
def test_all_buffers_come_back(small: Small, buffers: str, updates: int) -> None:
    ema = ewma.ModelEMA(small, half_life=2, buffers=buffers)
    for _ in range(updates):
        ema.update()
    before = bits(small)
    with ema.swapped():
        torch.optim.swa_utils.update_bn([torch.randn(8, 4) for _ in range(3)], small)
        assert not same(bits(small), before)
    assert same(bits(small), before)
