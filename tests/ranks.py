"""Run a function on several ranks, each a process of its own, within a time limit."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 120.0
"""Seconds after which a run counts as hung."""

PATIENCE = 3.0
"""Seconds that the other ranks get once one has failed."""

# The server imports once what every rank needs, and a rank is then a fork of it: a quarter of a second.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.debug",
        "torch.distributed.tensor.parallel",
        "ewma.weights",
        "ewma.gradients",
    ]
)


class Died:
    """What `on_ranks` gives for a rank that ended without an answer, if that was expected."""


def on_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, dies: int | None = None, backend: str = "gloo"
) -> list[Any]:
    """What `function(*arguments)` returns on each rank of a group; an error with the text of every rank's own.

    Args:
        dies: a rank that is expected to end without an answer; what others raise is then given instead of raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        pipes, processes = [], []
        for rank in range(ranks):
            mine, theirs = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_rank, args=(theirs, meeting, rank, ranks, backend, function, arguments))
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            answers = _gather(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()
    told = [f"rank {rank} died" if a is Died else f"rank {rank}: {a}" for rank, a in enumerate(answers) if _failed(a)]
    if told and dies is None:
        raise AssertionError("\n".join(told))
    assert dies is None or answers[dies] is Died, f"rank {dies} was expected to die"
    return answers


class _Failure(str):
    """The text of an error."""


def _failed(answer: Any) -> bool:
    return answer is Died or isinstance(answer, _Failure)


def _gather(pipes: list[multiprocessing.connection.Connection]) -> list[Any]:
    answers: list[Any] = [Died] * len(pipes)  # of those whose pipe closes before an answer comes
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    end = time.monotonic() + LIMIT
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                answers[rank] = _Failure("was still running")
            break
        for pipe in ready:
            rank = waiting.pop(pipe)
            with suppress(EOFError):
                answers[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            if isinstance(answers[rank], _Failure):
                end = min(end, time.monotonic() + PATIENCE)
    return answers


def _rank(
    pipe: multiprocessing.connection.Connection,
    meeting: str,
    rank: int,
    ranks: int,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(backend, meeting, timedelta(seconds=LIMIT), ranks, rank)
        answer = function(*arguments)
    except BaseException:
        answer = _Failure(traceback.format_exc(limit=-4))
    written = io.BytesIO()
    torch.save(answer, written)
    pipe.send_bytes(written.getvalue())
    time.sleep(LIMIT)  # until it is killed: one that leaves early takes the others' connections with it
