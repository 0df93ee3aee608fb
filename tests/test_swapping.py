"""Swapping: whatever happens inside, the raw weights come back bit for bit."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tests.conftest import Small, bits, same, train
from torch import nn

import ewma
from ewma.weights import swapping


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


def test_what_would_be_undone_is_not_copied(ema) -> None:
    theirs = Small()
    other = ewma.ModelEMA(theirs, half_life=2)
    with other.swapped(), pytest.raises(RuntimeError, match="Leave the with block first"):
        ema.copy_to(theirs)
    ema.copy_to(theirs)


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


def test_as_a_decorator_it_puts_in_what_there_is_when_the_function_is_called(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, half_life=1).attach(sgd)

    @ema.swapped()
    def validate() -> bool:
        return holds(small, averages(ema))

    later = ema.swapped()
    train(small, sgd, 4)
    before = bits(small)
    assert validate()
    assert validate()
    with later:
        assert holds(small, averages(ema))
    assert same(bits(small), before)


def test_swaps_may_end_in_any_order(ema, small: Small) -> None:
    before, wide = bits(small), averages(ema["wide"])
    one, two = ema["fast"].swapped(), ema["wide"].swapped()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert holds(small, wide)
    two.__exit__(None, None, None)
    assert same(bits(small), before)
    two, one = ema["wide"].swapped(), ema["fast"].swapped()
    two.__enter__()
    one.__enter__()
    one.__exit__(None, None, None)
    assert holds(small, wide)
    two.__exit__(None, None, None)
    ema.update()


def test_several_threads_swap_at_once(ema, small: Small) -> None:
    before, expected, wrong = bits(small), averages(ema), []
    both = threading.Barrier(4)

    def evaluate() -> None:
        both.wait()
        for _ in range(10):
            with ema.swapped():
                time.sleep(0.001)
                if not holds(small, expected):
                    wrong.append(bits(small))

    threads = [threading.Thread(target=evaluate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert same(bits(small), before)
    ema.update()


def test_autocast_does_not_go_on_with_what_it_has_cast() -> None:
    model = nn.Linear(2, 1, bias=False)
    ema = ewma.ModelEMA(model, half_life=1)
    x = torch.ones(1, 2)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        ema.update()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x) == 4.0
        with ema.swapped():
            assert model(x).item() == pytest.approx(10 / 3, rel=0.01)
        assert model(x) == 4.0
        ema.copy_to()
        assert model(x).item() == pytest.approx(10 / 3, rel=0.01)


class Assigning(nn.Module):
    """Its buffers are not written in place: the usual code of a centre, and of a cache that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("centre", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.centre = 0.9 * self.centre + 0.1 * y.mean(0).detach()
        self.cache = torch.zeros(len(self.cache) + 1)
        return y


def test_what_is_assigned_over_inside_comes_back() -> None:
    model = Assigning()
    ema = ewma.ModelEMA(model, half_life=10)
    model(torch.ones(3, 2))
    ema.update()
    before, parameters = bits(model), list(model.parameters())
    with ema.swapped():
        model(torch.ones(3, 2))
        with ema.swapped():
            model(torch.ones(3, 2))
            model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert len(model.cache) == 4  # what has grown with it may count on it
    assert same(bits(model), before)


@pytest.mark.parametrize("updates", [0, 1])
def test_expanded_tensors_are_written_once(updates: int) -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("positions", torch.arange(3.0).expand(4, 3))
    model.mask = nn.Parameter(torch.ones(1, 1).expand(2, 5), requires_grad=False)
    ema = ewma.ModelEMA(model, half_life=10)
    for _ in range(updates):
        ema.update()
    before = bits(model)
    with ema.swapped():
        assert same(bits(model), before)
    ema.copy_to()
    assert same(bits(model), before)


def test_a_buffer_that_is_a_view_of_weights_does_not_bring_the_raw_ones_back() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("row", model.weight.data[0])
    ema = ewma.ModelEMA(model, half_life=1)
    ema.update()
    nn.init.zeros_(model.weight)
    ema.update()
    before, expected = bits(model), averages(ema)
    with ema.swapped():
        assert holds(model, expected)
    assert same(bits(model), before)
    ema.copy_to()
    assert holds(model, expected)


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("values", [torch.eye(3), torch.eye(3).bool()], ids=["float", "bool"])
def test_a_sparse_buffer_may_be_left_out(updates: int, persistent: bool, values: torch.Tensor) -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("graph", values.to_sparse(), persistent=persistent)
    ema = ewma.ModelEMA(model, half_life=10, buffers="leave")
    for _ in range(updates):
        ema.update()
    with ema.swapped():
        assert torch.equal(model.graph.to_dense(), values)
    assert torch.equal(ema.module().graph.to_dense(), values)
    with pytest.raises(TypeError, match=r'graph: .*layout torch.sparse_coo. Leave it out with buffers="leave"'):
        ewma.ModelEMA(model, half_life=10).update()
