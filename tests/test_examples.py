"""The main job at its smallest: what it prints, what it writes, and what it says where there is nothing to gain."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open

import ewma

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Small operations shared by several threads crawl where other processes want the cores too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def test_it_prints_a_table_and_writes_picture_and_weights(example: ModuleType, tmp_path: Path, capsys):
    folder = tmp_path / "made" / "by it"
    example.main(["--seeds", "1", "--epochs", "1", "--out", str(folder)])
    printed, progress = capsys.readouterr()

    assert "Digits with 20 % wrong labels; seeds: 1; steps: 57 of 16 images each" in printed
    rows = {line[:28].strip(): line[28:].split() for line in printed.splitlines() if line.endswith("one seed")}
    assert list(rows) == [example.RAW, *example.PROFILES, example.COSINE]
    assert all(5 < float(mean) <= 100 for mean, *_ in rows.values())
    assert printed.count("no clear difference") == 2  # one seed proves nothing
    assert "No gain" not in printed
    assert "2/2" in progress

    assert sorted(path.name for path in folder.iterdir()) == ["averaged.safetensors", "digits.png"]
    picture = (folder / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert [int.from_bytes(picture[i : i + 4]) for i in (16, 20)] == [1200, 500]
    assert len(picture) > 20_000
    weights = folder / "averaged.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert "ewma" in file.metadata()
        assert set(file.keys()) == example.network().state_dict().keys()
    ema = ewma.ModelEMA(example.network(), half_life=200)
    ema.load(weights)
    assert ema.count == 57


def test_with_clean_labels_it_says_that_no_gain_is_to_be_expected(example: ModuleType, tmp_path: Path, capsys):
    example.main(["--clean", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Digits with clean labels; seeds: 1" in printed
    assert "With clean labels no gain from averaging is to be expected." in printed


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        ([1.0, 2.0, 3.0], "+2.00 points, better with 3 of 3 seeds: a gain"),
        ([-1.0, -2.0, -3.0], "-2.00 points, better with 0 of 3 seeds: a loss"),
        ([9.0, 9.0, 0.0], "+6.00 points, better with 2 of 3 seeds: no clear difference"),
        ([9.0, 9.0], "+9.00 points, better with 2 of 2 seeds: no clear difference"),
    ],
)
def test_the_verdict_comes_from_the_figures(example: ModuleType, gains: list[float], told: str):
    raw = np.full((len(gains), 1), 90.0)
    curves = {example.RAW: raw, example.AVERAGED: raw + np.array(gains)[:, None]}
    assert example.verdict(example.RAW, curves) == f"- raw: {told}"


def test_a_fifth_of_the_training_labels_is_wrong_and_none_of_the_others(example: ModuleType):
    clean, noisy = example.read_digits(0, 0.0), example.read_digits(0, 0.2)
    assert (clean.labels != noisy.labels).sum() == round(0.2 * len(clean.labels)) == 180
    assert 0 <= noisy.labels.min() <= noisy.labels.max() <= 9
    for name in ("images", "test_images", "test_labels"):
        assert torch.equal(getattr(clean, name), getattr(noisy, name))


def test_no_seeds_is_an_error_before_anything_is_written(example: ModuleType, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        example.main(["--seeds", "0", "--out", str(tmp_path / "new")])
    assert "must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_series_example_prints_the_distances_and_draws_a_picture(tmp_path: Path, capsys):
    spec = importlib.util.spec_from_file_location("smooth_series", EXAMPLE.with_name("smooth_series.py"))
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    picture = tmp_path / "made" / "series.png"
    example.main(["--steps", "120", "--out", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-1].strip() == "NaN from step 40 on"
    one_sided, two_sided = (float(line[28:].split()[0]) for line in lines[1:3])
    assert two_sided < one_sided
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_gradients_example_prints_two_tables_and_draws_a_picture(tmp_path: Path, capsys):
    spec = importlib.util.spec_from_file_location("filter_gradients", EXAMPLE.with_name("filter_gradients.py"))
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    example.main(["--seeds", "1", "--steps", "200", "--out", str(tmp_path / "new")])
    torch.set_num_threads(threads)
    printed, progress = capsys.readouterr()
    rows = {line[:38].strip(): line[38:].split() for line in printed.splitlines() if "±" in line}
    assert list(rows) == [*example.FILTERS, *example.GUARDS]
    assert rows["clean batches, SpikeGuard"][:3] == rows["clean batches, no guard"][:3]
    assert rows["clean batches, SpikeGuard"][3:] == ["0", "0"]
    assert float(rows["2 % corrupted, no guard"][0]) < float(rows["2 % corrupted, SpikeGuard"][0])
    assert "11/11" in progress
    assert (tmp_path / "new" / "gradients.png").read_bytes().startswith(b"\x89PNG")
