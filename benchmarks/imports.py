"""What it takes until the first result: a fresh interpreter each time, beside one that does nothing."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from benchmarks.report import Table, add_arguments, tell

PROGRAMS = {
    "python, nothing": "",
    "import ewma": "import ewma",
    "ewma: first smooth of a list": "import ewma; ewma.smooth([1.0, 2.0, 3.0], half_life=10)",
    "ewma: first smooth of an array": "import ewma, numpy; ewma.smooth(numpy.arange(1000.0), half_life=10)",
    "import numpy": "import numpy",
    "import torch": "import torch",
    "ewma: ModelEMA's first update": (
        "import ewma, torch; ewma.ModelEMA(torch.nn.Linear(64, 64), half_life=10).update()"
    ),
}
PEERS = {
    "pandas": "import pandas; pandas.Series([1.0, 2.0, 3.0]).ewm(alpha=0.1).mean()",
    "polars": "import polars; polars.Series([1.0, 2.0, 3.0]).ewm_mean(alpha=0.1)",
    "numbagg": "import numbagg, numpy; numbagg.move_exp_nanmean(numpy.arange(1000.0), alpha=0.1)",
    "scipy": "import numpy; from scipy.signal import lfilter; lfilter([0.1], [1.0, -0.9], numpy.arange(1000.0))",
    "ema_pytorch": "import torch, ema_pytorch; ema_pytorch.EMA(torch.nn.Linear(64, 64)).update()",
    "torch_ema": (
        "import torch, torch_ema; model = torch.nn.Linear(64, 64); "
        "torch_ema.ExponentialMovingAverage(model.parameters(), 0.9).update()"
    ),
    "timm": ("import torch, timm.utils; model = torch.nn.Linear(64, 64); timm.utils.ModelEmaV3(model).update(model)"),
    "diffusers": (
        "import torch; from diffusers.training_utils import EMAModel; model = torch.nn.Linear(64, 64); "
        "EMAModel(model.parameters()).step(model.parameters())"
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks imports", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    add_arguments(parser)
    given = parser.parse_args(arguments)
    programs = dict(PROGRAMS)
    table = Table("from the start of Python to the first result", "ms")
    for name, program in PEERS.items() if given.peers else ():
        if importlib.util.find_spec(name) is None:
            table.left_out[f"{name}: first use"] = "not installed"
        elif (tried := run(program)).returncode:
            table.left_out[f"{name}: first use"] = tried.stderr.decode().splitlines()[-1][:80]
        else:
            programs[f"{name}: first use"] = program
    table.time({name: lambda program=program: run(program) for name, program in programs.items()}, given.rounds)
    print(table)
    tell([table], given)


def run(program: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, check=False)
