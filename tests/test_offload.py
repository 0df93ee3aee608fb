"""Averages in host memory: the same bits as beside the weights, however late a copy is made.

There is no accelerator in most places where this runs, so `LateLane` stands for its stream: it makes a copy at the last
moment that is allowed, when the training stream is told to wait for it, or when the host waits for its thread.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Small, same
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import ewma
from ewma.shards import local
from ewma.weights import offload

DECAY = 0.9
ACCELERATOR = torch.accelerator.current_accelerator()


class LateLane:
    pinned = False

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], object], LateMark]] = []
        self.lock = threading.Lock()
        self.rushed = False
        self.log: list[str] = []

    def fork(self) -> None:
        self.log.append("fork")

    def run(self, copy: Callable[[], object]) -> LateMark:
        self.log.append("run")
        mark = LateMark(self)
        self.waiting.append((copy, mark))
        return mark

    def hold(self, mark: LateMark) -> None:
        self.log.append("hold")
        self.make_up_to(mark)

    def make_up_to(self, mark: LateMark) -> None:
        with self.lock:
            while not mark.made:
                copy, each = self.waiting.pop(0)
                copy()
                each.made = True


class LateMark:
    def __init__(self, lane: LateLane) -> None:
        self.lane, self.made = lane, False

    def query(self) -> bool:
        if self.lane.rushed:
            self.lane.make_up_to(self)
        return self.made


@pytest.fixture(params=["late", "real"] if ACCELERATOR else ["late"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the weights are: on an accelerator; or on the CPU, with all that an accelerator brings with it."""
    if request.param == "real":
        return torch.device(ACCELERATOR.type)
    request.getfixturevalue("lanes")
    return torch.device("cpu")


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LateLane]]:
    made: list[LateLane] = []

    def lane(device: torch.device, aside: bool) -> offload.Lane:
        if not aside:
            return offload.HostLane()  # what the training stream is given, it does in order
        made.append(LateLane())
        return made[-1]

    def wait(futures: Any) -> None:
        for each in made:
            each.rushed = True
        for future in futures:
            future.exception(timeout=10)
        for each in made:
            each.rushed = False

    monkeypatch.setattr(offload, "offloaded", lambda tensor, device: device is not None)
    monkeypatch.setattr(offload, "lane", lane)
    monkeypatch.setattr(offload, "wait", wait)
    yield made
    for each in made:
        each.rushed = True
    assert offload._thread().submit(int).result(timeout=10) == 0


class Run:
    """A model whose averages are in host memory, and a copy of it on the CPU that is averaged where it is."""

    def __init__(
        self, device: torch.device, attach: bool = True, every: int = 1, model=Small, **arguments: Any
    ) -> None:
        self.model = model().to(device)
        self.twin = copy.deepcopy(self.model).cpu()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        arguments = arguments if "profile" in arguments else {"decay": DECAY, **arguments}
        self.ema = ewma.ModelEMA(self.model, device="cpu", **arguments)
        self.plain = ewma.ModelEMA(self.twin, **arguments)
        self.attached, self.every, self.steps = attach, every, 0
        if attach:
            self.ema.attach(self.optimizer, every=every)

    def train(self, steps: int = 1) -> Run:
        for _ in range(steps):
            self.optimizer.zero_grad()
            parameter = next(self.model.parameters())
            x = torch.randn(8, 4, device=parameter.device, dtype=parameter.dtype)
            self.model(x).pow(2).mean().backward()
            self.optimizer.step()
            self.steps += 1
            if self.steps % self.every == 0:
                if not self.attached:
                    self.ema.update(self.every)
                self.twin.load_state_dict(self.model.state_dict())
                self.plain.update(self.every)
        return self

    def agrees(self) -> bool:
        mine, theirs = self.ema.state_dict(), self.plain.state_dict()
        return same(flat(mine), flat(theirs)) and mine["tracks"] == theirs["tracks"]


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{which}.{name}": tensor.clone()
        for which in state["averages"]
        for name, tensor in state["averages"][which].items()
    } | {f"copy.{name}": tensor.clone() for name, tensor in state["copies"].items()}


SEVERAL = {"fast": ewma.Exponential(half_life=2), "slow": ewma.Exponential(half_life=20_000)}

# The same averages


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("bucket", [1, 150, 1 << 24])
@pytest.mark.parametrize("buffers", ["copy", "average", "leave"])
def test_the_averages_are_those_beside_the_weights(
    device, monkeypatch, attach: bool, bucket: int, buffers: str
) -> None:
    monkeypatch.setattr(offload, "BUCKET", bucket)
    run = Run(device, attach, buffers=buffers).train(7)
    assert run.ema.count == 7
    assert run.agrees()


@pytest.mark.parametrize("dtype", ["auto", torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bucket", [150, 1 << 24])
def test_random_bits_do_not_depend_on_the_buckets(device, monkeypatch, dtype, bucket: int) -> None:
    monkeypatch.setattr(offload, "BUCKET", bucket)
    run = Run(device, profile=SEVERAL, dtype=dtype, seed=4).train(5)
    assert run.agrees()
    assert all(average.device.type == "cpu" for _, average in run.ema["slow"].named_parameters())


def test_16_bit_weights_cross_as_they_are(device, lanes) -> None:
    run = Run(device, model=lambda: Small().bfloat16()).train(4)
    assert run.agrees()
    (update,) = run.ema._binding.offloaded
    assert {staged.dtype for bucket, _ in update.buckets for staged in bucket.copies} == {torch.bfloat16}
    assert {average.dtype for _, average in run.ema.named_parameters()} == {torch.float32}


def test_every_kth_step(device) -> None:
    run = Run(device, every=3).train(10)
    assert run.ema.count == 3
    assert run.agrees()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_only_the_device_knows_of(device, fused: bool) -> None:
    model = nn.Linear(4, 4).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    ema = ewma.ModelEMA(model, decay=DECAY, device="cpu").attach(optimizer)
    twin = nn.Linear(4, 4)
    plain = ewma.ModelEMA(twin, decay=DECAY)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.full((2, 4), float("inf") if step in (0, 3) else 1.0, device=device)
        scaler.scale(model(x).pow(2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if step not in (0, 3):
            twin.load_state_dict(model.state_dict())
            plain.update()
    for (_, mine), (_, theirs) in zip(ema.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-7)


def test_what_is_not_finite_is_left_out_and_counted(device) -> None:
    run = Run(device, attach=False).train(2)
    for model in (run.model, run.twin):
        with torch.no_grad():
            model.first.weight[0, 1] = float("nan")
            model.last.bias[:2] = float("inf")
    run.ema.update()
    run.plain.update()
    assert run.ema.skipped == run.plain.skipped == 3
    assert run.agrees()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.last.weight, "data", model.last.weight.data.clone()),
        lambda model: model.register_parameter("late", nn.Parameter(torch.ones(3, device=model.mask.device))),
        lambda model: model.double(),
    ],
)
def test_weights_that_move_after_an_update(device, change) -> None:
    run = Run(device, attach=False).train(3)
    for model in (run.model, run.twin):
        change(model)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05)
    run.train(2)
    assert run.agrees()


# The order of things


def test_the_next_step_waits_for_the_copies(lanes, monkeypatch) -> None:
    monkeypatch.setattr(offload, "BUCKET", 150)
    run = Run(torch.device("cpu"), buffers="leave").train()
    late = lanes[-1]
    assert late.waiting  # nothing has been copied, and nobody waited
    copies = len(late.waiting)
    run.optimizer.zero_grad()
    run.model(torch.randn(8, 4)).mean().backward()
    seen: list[bool] = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append(not late.waiting))
    run.optimizer.step()
    assert seen == [True]
    assert late.log == ["fork", *copies * ["run"], "hold", "fork", *copies * ["run"]]


def test_without_that_the_averages_would_be_wrong(lanes, monkeypatch) -> None:
    monkeypatch.setattr(offload.OffloadedLerp, "hold", lambda self: None)
    assert not Run(torch.device("cpu")).train(4).agrees()


def test_unattached_the_device_waits_at_once(lanes) -> None:
    run = Run(torch.device("cpu"), attach=False).train()
    assert not lanes[-1].waiting
    with torch.no_grad():
        run.model.first.weight.zero_()
    assert run.agrees()


def test_detached_too(lanes) -> None:
    run = Run(torch.device("cpu")).train()
    assert lanes[-1].waiting
    run.ema.detach()
    with torch.no_grad():
        run.model.first.weight.zero_()
    assert run.agrees()


def test_what_the_next_forward_changes_is_copied_in_order(device) -> None:
    run = Run(device, buffers="average").train(2)
    run.model(torch.randn(8, 4, device=device))
    assert run.agrees()


def test_training_goes_on_while_a_copy_is_under_way(lanes) -> None:
    run = Run(torch.device("cpu"))
    run.train()
    (update,) = run.ema._binding.offloaded
    assert not update.pending.done()
    run.train()
    assert not update.pending.done()


READERS: dict[str, Callable[[Run, Path], dict[str, Tensor]]] = {
    "named_parameters": lambda run, path: dict(run.ema.named_parameters()),
    "a view": lambda run, path: dict(run.ema["average"].named_parameters()),
    "state_dict": lambda run, path: run.ema.state_dict()["averages"]["average"],
    "swapped": lambda run, path: _swapped(run),
    "copy_to": lambda run, path: _copied(run),
    "module": lambda run, path: dict(run.ema.module().named_parameters()),
    "save": lambda run, path: _saved(run, path),
    "deepcopy": lambda run, path: copy.deepcopy(run.ema).tracks["average"].averages,
    "pickle": lambda run, path: pickle.loads(pickle.dumps(run.ema)).tracks["average"].averages,
    "skipped": lambda run, path: run.ema.skipped or run.ema.tracks["average"].averages,
}


def _swapped(run: Run) -> dict[str, Tensor]:
    with run.ema.swapped():
        return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def _copied(run: Run) -> dict[str, Tensor]:
    other = Small()
    run.ema.copy_to(other)
    return dict(other.named_parameters())


def _saved(run: Run, path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    run.ema.save(path / "ema.safetensors")
    return load_file(path / "ema.safetensors")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_waits(device, tmp_path: Path, read) -> None:
    run = Run(device).train(3)
    found = read(run, tmp_path)
    for name, average in run.plain.named_parameters():
        assert torch.equal(found[name].detach().cpu(), average)


def test_reset_waits(device) -> None:
    run = Run(device).train(2)
    run.ema.reset()
    run.plain.reset()
    assert run.train(2).agrees()


def test_what_goes_wrong_in_the_thread_is_told_when_the_averages_are_read(lanes, monkeypatch) -> None:
    run = Run(torch.device("cpu")).train(2)
    (update,) = run.ema._binding.offloaded
    run.ema.settle()

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(update, "buckets", [(bucket, fail) for bucket, _ in update.buckets])
    run.train()
    with pytest.raises(MemoryError, match="no room"):
        run.ema.state_dict()
    run.ema.reset()
    run.plain.reset()
    assert run.train().agrees()


# On several ranks


def sharded() -> tuple[bool, int, set[str]]:
    offload.offloaded = lambda tensor, device: device is not None
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = ewma.ModelEMA(model, decay=DECAY, device="cpu").attach(optimizer)
    beside = ewma.ModelEMA(model, decay=DECAY).attach(optimizer)
    for _ in range(3):
        model(torch.randn(2, 4)).mean().backward()
        optimizer.step()
    with CommDebugMode() as communication:
        host.update()
        host.settle()
    beside.update()
    names = {type(update).__name__ for update in host._binding.offloaded}
    equal = same(*({name: local(average) for name, average in ema.named_parameters()} for ema in (host, beside)))
    return equal, communication.get_total_counts(), names


def test_shards_cross_by_themselves() -> None:
    assert on_ranks(sharded, 2) == 2 * [(True, 0, {"OffloadedLerp"})]


# Resuming


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "file"])
def test_a_resumed_run_is_the_same_bit_for_bit(device, tmp_path: Path, how: str, dtype) -> None:
    run = Run(device, dtype=dtype, seed=2).train(4)
    resumed = Run(device, dtype=dtype, seed=2).train()
    if how == "file":
        run.ema.save(tmp_path / "ema.safetensors")
        resumed.ema.load(tmp_path / "ema.safetensors")
    else:
        buffer = io.BytesIO()
        torch.save(run.ema.state_dict(), buffer)
        buffer.seek(0)
        resumed.ema.load_state_dict(torch.load(buffer, weights_only=True))
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    state = torch.get_rng_state()
    run.train(3)
    torch.set_rng_state(state)
    resumed.train(3)
    assert same(flat(resumed.ema.state_dict()), flat(run.ema.state_dict()))
    assert resumed.ema.count == 7


# Refused


def test_a_cuda_graph_cannot_average_on_the_host(device) -> None:
    model = nn.Linear(2, 2).to(device)
    ema = ewma.ModelEMA(model, decay=DECAY, device="cpu", capturable=True)
    with pytest.raises(
        ValueError, match=r'weight is on .*: device="cpu" averages on the host, .* Leave out capturable'
    ):
        ema.update()


# Buckets


def parts() -> list[Tensor]:
    vectors = [torch.randn(n) for n in (0, 1, 2, 63, 1000, 16323)]
    return [
        *vectors,
        torch.randn(6, 7).t(),
        torch.randn(8, 8)[:, ::2],
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(()),
    ]


@pytest.mark.parametrize("most", [1, 300, 5_000, 1 << 24])
def test_buckets_hold_every_value_once_and_bring_it_over(monkeypatch, most: int) -> None:
    monkeypatch.setattr(offload, "BUCKET", most)
    values = parts()
    buckets = list(offload._buckets(values, pinned=False))
    assert sorted(n for chosen, _ in buckets for n in chosen) == list(range(len(values)))
    for chosen, bucket in buckets:
        for staged in bucket.copies:
            staged.fill_(float("nan"))
        bucket.copy()
        assert all(torch.equal(staged, values[n]) for n, staged in zip(chosen, bucket.copies, strict=True))
        assert len(chosen) == 1 or sum(values[n].nbytes for n in chosen) <= most


def test_all_buckets_share_the_room_on_the_device(monkeypatch) -> None:
    monkeypatch.setattr(offload, "BUCKET", 400)
    buckets = [bucket for _, bucket in offload._buckets([torch.randn(40) for _ in range(9)], pinned=False)]
    assert len(buckets) == 5
    assert len({bucket.source.data_ptr() for bucket in buckets[:4]}) == 1
    assert buckets[0].source.untyped_storage().nbytes() == 320


# Streams


def test_the_accelerators_streams_are_called_in_order(monkeypatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def __enter__(self) -> None:
            log.append(f"enter {self.name}")

        def __exit__(self, *_: Any) -> None:
            log.append(f"leave {self.name}")

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            return f"mark on {self.name}"

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream("training"))
    aside = offload.lane(torch.device("cuda"), aside=True)
    aside.fork()
    aside.hold(aside.run(lambda: log.append("copy")))
    assert log == [
        "side waits for training",
        "enter side",
        "copy",
        "leave side",
        "training waits for mark on side",
    ]
    log.clear()
    inline = offload.lane(torch.device("cuda"), aside=False)
    inline.fork()
    assert inline.run(lambda: log.append("copy")) == "mark on training"
    assert log == ["copy"]
    assert isinstance(offload.lane(torch.device("mps"), aside=True), offload.HostLane)


def test_a_forked_process_has_a_thread_of_its_own(python) -> None:
    program = """
import os
import torch
import ewma
from ewma.weights import offload

offload.offloaded = lambda tensor, device: device is not None
ema = ewma.ModelEMA(torch.nn.Linear(2, 2), half_life=1, device="cpu")
ema.update()
ema.settle()
child = os.fork()
if not child:
    ema.update()
    ema.settle()
    os._exit(ema.count)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(program) == "2"


@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
def test_the_averages_take_none_of_the_devices_memory() -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(16))).to(ACCELERATOR)
    before = torch.accelerator.memory_allocated()
    ema = ewma.ModelEMA(model, decay=DECAY, device="cpu")
    ema.update()
    ema.update()
    assert torch.accelerator.memory_allocated() - before <= offload.BUCKET
    assert all(average.is_pinned() for _, average in ema.named_parameters())
