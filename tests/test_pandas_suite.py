"""pandas' own tests of its ewm, with our functions inside: what passes with pandas' own passes with ours.

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

SUITE = (
    "pandas.tests.window.test_ewm",
    "pandas.tests.window.moments.test_moments_consistency_ewm",
    "pandas.tests.window.test_groupby::TestEWM",
)


def test_pandas_own_tests_pass_with_ours_inside(tmp_path: pathlib.Path) -> None:
    ours, said = run_suite(tmp_path, replace=True)
    failed = {test for test, outcome in ours["outcomes"].items() if outcome == "failed"}
    if failed:  # then only what fails with pandas' own functions, too
        theirs, _ = run_suite(tmp_path, replace=False)
        failed -= {test for test, outcome in theirs["outcomes"].items() if outcome == "failed"}
    assert not failed, said

    # It did run (3.1.1: 1393 passed, 28 skipped), with ours inside. The skipped ask for statistics that ewm never had.
    counts = collections.Counter(ours["outcomes"].values())
    assert counts["passed"] >= 1350, said
    assert counts["skipped"] < 50, said
    assert ours["calls"]["mean"] >= 900
    assert ours["calls"]["sum"] >= 10
    assert ours["calls"]["cov"] >= 3000


def run_suite(folder: pathlib.Path, replace: bool) -> tuple[dict[str, Any], str]:
    """What became of every test and how often ours were called; and what pytest said."""
    results = folder / f"{replace}.json"
    path = os.pathsep.join([str(pathlib.Path(__file__).parent), *(entry for entry in sys.path if entry)])
    options = {"PYTHONPATH": path, "EWMA_REPLACE": str(int(replace)), "EWMA_RESULTS": str(results)}
    command = [sys.executable, "-B", "-m", "pytest", "--pyargs", *SUITE]
    command += ["-p", "pandas_with_ours", "-p", "no:cacheprovider", "-q", "--tb=short"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | options, text=True, capture_output=True, check=False, timeout=600
    )
    said = done.stdout + done.stderr
    assert results.exists(), said
    return json.loads(results.read_text()), said
