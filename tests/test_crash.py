"""A run that loses a process goes on, on other processes, to the averages of a run that lost none."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from tests.ranks import Died, on_ranks
from tests.test_sharded import close, wholes
from torch import Tensor

EXAMPLE = Path(__file__).parents[1] / "examples" / "fsdp2.py"


def run(folder: str, dies_at: int | None) -> tuple[int, dict[str, Tensor]]:
    """Twelve steps of the example, a checkpoint after every five; gives where it began, and the averages."""
    spec = importlib.util.spec_from_file_location("fsdp2", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.set_default_dtype(torch.float64)  # the order of additions leaves no trace then that AdamW could enlarge
    done = []

    def report(step: int, loss: float) -> None:
        done.append(step)
        if step == dies_at and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    _, ema = example.train(Path(folder), 12, 5, report)
    assert ema.count == 12
    return done[0], wholes(ema)


def test_a_run_that_loses_a_process_goes_on_on_other_processes(tmp_path: Path) -> None:
    (begun, expected), other = on_ranks(run, 2, str(tmp_path / "whole"), None)
    assert begun == 1
    close(other[1], expected)

    broken = str(tmp_path / "broken")
    left, died = on_ranks(run, 2, broken, 8, dies=1)
    assert died is Died
    assert "RuntimeError" in left  # gloo's; the words vary
    assert [path.name for path in Path(broken).iterdir()] == ["step_000005"]

    for begun, averages in on_ranks(run, 4, broken, None):
        assert begun == 6
        assert averages.keys() == expected.keys()
        for name, average in averages.items():
            torch.testing.assert_close(average, expected[name], rtol=1e-9, atol=1e-12)


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    done = subprocess.run(
        [*command, "--steps", "10", "--every", "5", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step 10: loss ")
    assert lines[-2].endswith("(updates: 10, ranks: 2)")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000005", "step_000010"]
    assert (tmp_path / "averaged" / "model.safetensors").is_file()
