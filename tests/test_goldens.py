"""What pandas and polars gave, as `make_goldens.py` has stored it, beside what ours give now. Needs neither of them."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

import ewma

FOLDER = pathlib.Path(__file__).parent / "goldens"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
CASES = [(peer, case) for peer, content in FILES.items() for case in content["cases"]]


def numbers(stored: list[Any]) -> np.ndarray:
    return np.array([math.nan if each is None else float(each) for each in stored])


def named(value: Any) -> str:
    """A case by what it is of, not by its result."""
    if not isinstance(value, dict):
        return str(value)
    options = ", ".join(f"{name}={each}" for name, each in value["options"].items())
    unbiased = {None: "", True: " unbiased", False: " biased"}[value.get("unbiased")]
    return f"{value['statistic']}{unbiased} of {value['series']}, {options}"


def test_the_files_are_there_with_their_versions() -> None:
    assert set(FILES) == {"pandas", "polars"}
    for peer, content in FILES.items():
        assert content["made_with"][peer][0].isdigit()
        assert len(content["cases"]) >= 50
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000


@pytest.mark.parametrize(("peer", "case"), CASES, ids=named)
def test_golden(peer: str, case: dict[str, Any]) -> None:
    content = FILES[peer]
    x, y, stored = (
        numbers(each)
        for each in (content["series"][case["series"]], content["partner"][case["series"]], case["result"])
    )
    options = dict(case["options"])
    if "times" in options:
        options["times"] = content["seconds"][case["series"]]
    source = ewma.ewm(x, **options)
    arguments = (y,) if case["statistic"] in ("cov", "corr") else ()
    spread = {} if "unbiased" not in case else {"unbiased": case["unbiased"]}
    ours = getattr(source, case["statistic"])(*arguments, **spread)
    assert ours.shape == stored.shape
    if peer == "polars":  # has nothing where x has nothing
        there = np.isfinite(x)
        ours, stored = ours[there], stored[there]
    largest = np.max(np.abs(x), initial=0.0, where=np.isfinite(x))
    if case["statistic"] in ("mean", "sum"):
        np.testing.assert_allclose(
            ours, stored, rtol=0, atol=1e-12 * largest * (4 if case["statistic"] == "sum" else 1)
        )
    else:
        # Around 1e8 theirs are the less exact ones.
        np.testing.assert_allclose(ours, stored, rtol=1e-6 if case["series"] == "offset" else 1e-9, atol=1e-15)
