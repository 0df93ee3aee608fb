"""pandas' own tests of its ewm, run once as they are and once with our functions inside: what passes there passes here.

The one case where ours differ on purpose, alpha = .5 with adjust=False over a gap, has no test in pandas, so that
nothing is left out; `test_exactness.py` has it.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("pandas", minversion="3.0")

MODULES = ("pandas.tests.window.test_ewm", "pandas.tests.window.moments.test_moments_consistency_ewm")


def test_pandas_own_tests_pass_with_ours_inside(tmp_path: pathlib.Path) -> None:
    runs = {replaced: start(replaced, tmp_path) for replaced in ("0", "1")}
    results = {replaced: finish(run, tmp_path / replaced) for replaced, run in runs.items()}
    theirs, ours = results["0"], results["1"]

    differ = {test: (outcome, ours["outcomes"].get(test)) for test, outcome in theirs["outcomes"].items()}
    differ = {test: pair for test, pair in differ.items() if pair[0] != pair[1]}
    assert not differ, runs["1"].communicated
    assert ours["outcomes"].keys() == theirs["outcomes"].keys()

    # It did run, with ours inside. What is skipped asks ewm for statistics that it does not have.
    counts = collections.Counter(ours["outcomes"].values())
    assert set(counts) <= {"passed", "skipped"}
    assert counts["passed"] >= 1300
    assert counts["skipped"] < 50
    assert not theirs["calls"]
    assert ours["calls"]["mean"] >= 500
    assert ours["calls"]["sum"] >= 5
    assert ours["calls"]["cov"] >= 1500


class Run(subprocess.Popen[str]):
    communicated = ""


def start(replaced: str, folder: pathlib.Path) -> Run:
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), *(entry for entry in sys.path if entry)])
    options = {"PYTHONPATH": path, "EWMA_REPLACE": replaced, "EWMA_RESULTS": str(folder / replaced)}
    command = [sys.executable, "-B", "-m", "pytest", "--pyargs", *MODULES]
    command += ["-p", "pandas_with_ours", "-p", "no:cacheprovider", "-q", "--tb=short"]
    return Run(
        command, cwd=folder, env=os.environ | options, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(run: Run, results: pathlib.Path) -> dict[str, Any]:
    run.communicated, _ = run.communicate(timeout=300)
    assert results.exists(), run.communicated
    return json.loads(results.read_text())
