"""The benchmarks refuse what is wrong, say what is missing, and keep and draw what they found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from benchmarks import cuda, device, series, weights, weights_peers
from benchmarks.report import Table, tell

import ewma

SHAPES = [(60, 70), (70,)]


def table(**contenders: weights.Contender) -> Table:
    return weights.table("some", contenders, rounds=1)


def test_what_is_right_is_timed() -> None:
    found = table(mine=weights.ours(weights.model_of(SHAPES)), raw=weights.raw_foreach(weights.model_of(SHAPES)))
    assert list(found.rows) == ["mine", "raw"]
    assert found.rows["mine"][1] == 1.0


@pytest.mark.parametrize("share", [0.0, 0.9, 1.1, 2.0])
def test_a_step_of_another_length_is_not_timed(share: float) -> None:
    values, averages = torch.randn(10_000), torch.randn(10_000)
    step = weights.ALPHA * share
    other = weights.Contender(lambda: averages.lerp_(values, step), [(values, averages, weights.ALPHA)])
    found = table(mine=weights.ours(weights.model_of(SHAPES)), other=other)
    assert list(found.rows) == ["mine"]
    assert found.left_out == {"other": f"wrong by {abs(share - 1.0):.0%} of a step, not timed"}


def test_averages_that_never_move_are_not_timed() -> None:
    made, left_out = weights_peers.peers(SHAPES, torch.bfloat16)
    assert made["torch AveragedModel, multi_avg"].error() > 0.9
    assert all("not installed" in why or "refuses" in why for why in left_out.values())


def test_a_series_is_checked_too(monkeypatch) -> None:
    x = 1.0 + numpy.random.default_rng(0).standard_normal(300)
    plain = series.table("some", x, 0, rounds=1, with_peers=False)
    assert {"smooth", "smooth, out=", "x.copy()"} <= plain.rows.keys()
    wrong = {"other": lambda: ewma.smooth(x, alpha=2 * series.ALPHA)}
    monkeypatch.setattr(series, "peers", lambda *_: (wrong, {"third": "not installed"}))
    found = series.table("some", x, 0, rounds=1, with_peers=True)
    assert "other" not in found.rows
    assert found.left_out["third"] == "not installed"
    assert "times what is allowed, not timed" in str(found)


def test_what_was_found_is_kept_and_drawn(tmp_path: Path) -> None:
    kept, picture = tmp_path / "kept.json", tmp_path / "picture.png"
    given = argparse.Namespace(keep=kept, picture=picture)
    rows = {"limit": (1.0, 1.0), "ModelEMA": (1.1, 1.1), "other": (250.0, 250.0)}
    tell([Table("one", "ms", rows), Table("two", "ms", rows)], given)
    tell([Table("two", "µs", rows, {"third": "not installed"})], given)
    assert [(each["title"], each["unit"]) for each in json.loads(kept.read_text())] == [("one", "ms"), ("two", "µs")]
    assert picture.read_bytes().startswith(b"\x89PNG")


# CUDA


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_what_to_do() -> None:
    with pytest.raises(SystemExit, match=r"there is no CUDA device here. .* --device cpu --share 0.001"):
        cuda.main([])


def test_it_can_be_tried_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--device": "cpu", "--share": "0.0001", "--rounds": "1", "--only": "weights"}
    cuda.main([*(part for pair in given.items() for part in pair), "small", "filter", "columns"])
    told = capsys.readouterr().out
    assert "NOT a figure of CUDA" in told
    for name in ("ModelEMA", "GradientEMA(raw=1, slow=2)", "smooth(x, out=)"):
        assert f"{name}: " in told
    assert "not timed" not in told
    assert "of a copy's bandwidth, 85% asked for" in told


def test_series_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = ewma.smooth
    monkeypatch.setattr(ewma, "smooth", lambda x, alpha, **how: smooth(x, alpha=1.001 * alpha, **how))
    found = cuda.of_series(cuda.Bench(device.Host(), 1, 1.0), 3000, 2)
    assert "roundings, not timed" in found.left_out["smooth(x, out=)"]
    assert cuda.verdict("series", found) == "series: nothing was timed"


def test_kernels_are_counted_and_copies_are_not() -> None:
    kinds = torch.autograd.DeviceType
    events = [
        ("_lerp", kinds.CUDA),
        ("Memcpy HtoD", kinds.CUDA),
        ("Memset", kinds.CUDA),
        ("cudaLaunchKernel", kinds.CPU),
    ]
    assert device.launched(SimpleNamespace(name=name, device_type=kind) for name, kind in events) == 1


def test_on_a_device_time_is_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded in the stream before and after the call, and asked for when the last one has come to pass."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: object) -> float:
            log.append("ask")
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    assert device.Cuda().seconds(lambda: log.append("call")) == 0.002
    assert log == ["sleep", "record", "call", "record", "wait", "ask"]
