"""The `ewma` command: what it writes, prints and draws, and how it says what is wrong."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import same
from tests.test_posthoc import walked

import ewma
from ewma import posthoc
from ewma.cli import main, progress


@pytest.fixture
def archive(tmp_path: Path) -> posthoc.Archive:
    return walked(tmp_path / "archive", {})[0]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (10, 20, 30, 40):
        torch.save({"state_dict": {"w": torch.tensor([float(step)])}, "step": step}, folder / f"checkpoint-{step}.pt")
    return folder


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000


TARGETS = {
    "--sigma-rel .15": (ewma.Power(sigma_rel=0.15), None),
    "--half-life 20": (ewma.Exponential(half_life=20), None),
    "--decay .95": (ewma.Exponential(decay=0.95), None),
    "--tail 40": (ewma.Uniform(), 40),
    "--triangle 40": (ewma.profiles.triangular(steps=40), 40),
    "--lr-decay cosine:40": (ewma.profiles.from_lr_decay(shape="cosine", steps=40), 40),
    '--profile {"kind":"Exponential","half_life":20,"debias":false}': (
        ewma.Exponential(half_life=20, debias=False),
        None,
    ),
}


@pytest.mark.parametrize("options", TARGETS)
def test_reconstruct_every_target(archive, tmp_path: Path, capsys, options: str) -> None:
    profile, last = TARGETS[options]
    out = tmp_path / "model.safetensors"
    main(["reconstruct", str(archive.folder), *options.split(" ", 1), "-o", str(out)])
    found = archive.reconstruct(profile, last=last)
    assert same(load_file(out), found.weights)
    assert capsys.readouterr().out == f"{out}: {found.fit.target!r}, residual {found.residual:.2g}\n"


def test_a_sweep_writes_several(archive, tmp_path: Path, capsys) -> None:
    out, picture = tmp_path / "model.safetensors", tmp_path / "weights.png"
    sweep = ["--sweep", "0.05:0.25:5", "--plot", str(picture)]
    main(["reconstruct", str(archive.folder), *sweep, "-o", str(out), "--dtype", "bfloat16"])
    names = ["model-0.05", "model-0.1", "model-0.15", "model-0.2", "model-0.25"]
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == names
    assert len(capsys.readouterr().out.splitlines()) == 5
    expected = archive.reconstruct(ewma.Power(sigma_rel=0.2)).weights["b"].bfloat16()
    assert torch.equal(load_file(tmp_path / "model-0.2.safetensors")["b"], expected)
    assert is_picture(picture)


def test_reconstruct_from_ordinary_checkpoints(checkpoints: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model.safetensors"
    main(["reconstruct", str(checkpoints), "--tail", "20", "-o", str(out), "--plot", str(tmp_path / "raw.png")])
    printed, warned = capsys.readouterr()
    assert "residual 0.1" in printed
    assert warned.startswith("ewma: warning: the 4 snapshots do not reach")
    assert 25 < load_file(out)["w"].item() < 35
    assert is_picture(tmp_path / "raw.png")
    with pytest.raises(SystemExit, match="ewma: --at is for archives"):
        main(["reconstruct", str(checkpoints), "--tail", "20", "-o", str(out), "--at", "30"])


def test_at_and_max_residual(archive, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    main(["reconstruct", str(archive.folder), "--sigma-rel", ".15", "--at", "64", "-o", str(out)])
    assert same(load_file(out), archive.reconstruct(ewma.Power(sigma_rel=0.15), at=64).weights)
    with pytest.raises(SystemExit, match=r"ewma: the 30 snapshots do not reach .*--max-residual 1e-09 was asked for"):
        main(["reconstruct", str(archive.folder), "--sigma-rel", ".15", "--max-residual", "1e-9", "-o", str(out)])


def test_plan_prints_the_residuals(capsys, tmp_path: Path) -> None:
    main(["plan", "--steps", "1000", "--snapshots", "8", "--sweep", ".05:.25:3", "--plot", str(tmp_path / "plan.png")])
    printed = capsys.readouterr().out
    assert printed.startswith(f"snapshots at {', '.join(map(str, posthoc.snapshot_steps(1000, 8)))}\n")
    expected = posthoc.plan(1000, 8, target=ewma.Power(sigma_rel=0.25)).residual
    assert re.search(rf"Power\(sigma_rel=0.25\) +{expected:.2g} ", printed)
    assert is_picture(tmp_path / "plan.png")
    main(["plan", "--steps", "1000", "--snapshots", "100,500,1000", "--raw", "--every", "10", "--tail", "300"])
    printed = capsys.readouterr().out
    assert printed.startswith("snapshots at 100, 500, 1000\n")
    raw = posthoc.plan(1000, [100, 500, 1000], posthoc.RAW, ewma.Uniform(), every=10, last=300)
    assert f"{raw.residual:.2g}" in printed


def test_average_the_last(checkpoints: Path, tmp_path: Path, capsys) -> None:
    out, picture = tmp_path / "model.safetensors", tmp_path / "shares.png"
    main(["average", str(checkpoints), "--last", "2", "-o", str(out), "--plot", str(picture)])
    assert load_file(out)["w"].tolist() == [35.0]
    assert capsys.readouterr().out == f"{out}: 2 checkpoints, checkpoint-30.pt (0.5) to checkpoint-40.pt (0.5)\n"
    assert is_picture(picture)


def test_average_by_a_profile(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    paths = [str(path) for path in sorted(checkpoints.iterdir(), reverse=True)]
    main(["average", *paths, "--half-life", "10", "-o", str(out), "--part", "state_dict"])
    expected = posthoc.Checkpoints(checkpoints).average(ewma.Exponential(half_life=10)).weights
    assert same(load_file(out), expected)
    main(["average", *paths, "--tail", "20", "-o", str(out)])
    assert load_file(out)["w"].tolist() == [35.0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("reconstruct nowhere --decay .9 -o x", "ewma: nowhere: expected a folder of snapshots, .*; it does not exist"),
        ("reconstruct {archive} --decay 1.5 -o x", r"ewma: decay must be in \[0, 1\)"),
        ("reconstruct {archive} --sweep 1:2 -o x", "ewma: --sweep is FROM:TO:N with N of 2 or more"),
        ("reconstruct {archive} --sweep a:.2:3 -o x", "expected a number in the place of 'a', such as --sweep 0.03:"),
        ("reconstruct {archive} --lr-decay cosine -o x", "expected a number in the place of '', such as --lr-decay co"),
        ("reconstruct {archive} --lr-decay step:9 -o x", "shape must be one of linear, cosine, sqrt"),
        ("reconstruct {archive} --profile {{}} -o x", "no profile is called None"),
        ("reconstruct {archive} --decay .9 -o nowhere/x", "the folder nowhere does not exist; make it first"),
        ("reconstruct {archive} --decay .9 -o x --plot nowhere/x", "--plot: the folder nowhere does not exist"),
        ("average {checkpoints} -o x", "ewma: say which average: --last 10 for the plain mean of the last ten"),
        ("average {checkpoints} --last 9 -o x", "last must be between 1 and 4"),
        ("average {checkpoints} --last 2 --part ema -o x", "--part ema holds no tensors; there are state_dict"),
        ("reconstruct {archive}/manifest.json --decay .9 -o x", "expected a folder of snapshots, .*; this is a file"),
        ("reconstruct {archive} --half-life 1 --max-residual 1e-9 -o x", "--max-residual 1e-09 was asked for"),
        ("reconstruct {archive} --decay .9 -o x --plot x.foo", r"expected a picture's name, .*; got \.foo"),
        ("average {checkpoints} {checkpoints} --last 2 -o x", "Number them, as in step-100.pt, step-200.pt"),
        ("plan --steps 100 --snapshots 1.5 --decay .9", "--snapshots=1.5: expected whole numbers, such as 16 or 250,"),
        ("plan --steps 100 --every 0 --decay .9", "every must be a whole number of at least 1; got 0"),
        ("plan --steps 100 --tail 1000", "last must be above 0 and at most 100, the time there is; got 1000"),
        ("plan --steps 100 --snapshots 500 --decay .9", "expected between 1 and 100 snapshots"),
        ("plan --steps 100 --tracks wide --decay .9", "expected a number in the place of 'wide', such as .05,.10"),
    ],
)
def test_errors_are_one_line(archive, checkpoints: Path, tmp_path: Path, monkeypatch, arguments: str, text: str):
    monkeypatch.chdir(tmp_path)
    filled = arguments.format(archive=archive.folder, checkpoints=checkpoints)
    with pytest.raises(SystemExit, match=text) as caught:
        main(filled.split())
    assert "\n" not in str(caught.value)
    assert not Path("x").exists()


def test_no_input_is_written_over(archive, checkpoints: Path, capsys) -> None:
    """Nor a torch.save file's name given to what is no torch.save file."""
    snapshot = next(archive.folder.glob("*.safetensors"))
    for command, out in ((f"average {checkpoints} --last 2", checkpoints / "checkpoint-40.pt"),
                         (f"reconstruct {archive.folder} --decay .9 --max-residual 9", snapshot)):  # fmt: skip
        before = out.read_bytes()
        with pytest.raises(
            SystemExit, match="it is one of the files that are averaged, and would be lost; name another"
        ):
            main([*command.split(), "-o", str(out)])
        assert out.read_bytes() == before
    with pytest.raises(SystemExit, match=r"new.pt: what is written is safetensors; name it new.safetensors"):
        main(["average", str(checkpoints), "--last", "2", "-o", str(checkpoints / "new.pt")])
    with pytest.raises(SystemExit, match="expected the path of a file; this is a folder"):
        main(["average", str(checkpoints), "--last", "2", "-o", str(archive.folder)])


def test_warnings_name_the_option(archive, tmp_path: Path, capsys) -> None:
    main(["reconstruct", str(archive.folder), "--half-life", "1", "-o", str(tmp_path / "x")])
    assert "take more snapshots; --max-residual makes this an error" in capsys.readouterr().err


def test_an_interrupt_ends_without_a_traceback(archive, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(posthoc.Archive, "reconstruct_to", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["reconstruct", str(archive.folder), "--decay", ".9", "-o", str(tmp_path / "x")])
    assert caught.value.code == 130


def test_what_counts_nothing_is_not_counted(checkpoints: Path, tmp_path: Path, capsys) -> None:
    main(["average", str(checkpoints), "--tail", "20", "-o", str(tmp_path / "x")])
    assert ": 2 checkpoints, checkpoint-30.pt (0.5) to checkpoint-40.pt (0.5)" in capsys.readouterr().out


def test_a_plan_of_long_targets_stays_a_table(capsys) -> None:
    main(["plan", "--steps", "100", "--lr-decay", "cosine:20"])
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.index("residual") + len("residual") == len(row) - 10


def test_exactly_one_target(archive, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["reconstruct", str(archive.folder), "--decay", ".9", "--tail", "3", "-o", "x"])
    assert "not allowed with" in capsys.readouterr().err


def without(name: str, monkeypatch) -> None:
    real = builtins.__import__

    def missing(module: str, *arguments: object) -> object:
        if module.split(".")[0] == name:
            raise ImportError(name)
        return real(module, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_matplotlib_the_plot_is_refused_before_any_work(archive, tmp_path: Path, monkeypatch) -> None:
    without("matplotlib", monkeypatch)
    out = tmp_path / "x.safetensors"
    with pytest.raises(SystemExit, match=r'--plot needs matplotlib: pip install "ewma\[cli\]", or leave it out'):
        main(["reconstruct", str(archive.folder), "--decay", ".9", "-o", str(out), "--plot", str(tmp_path / "x.png")])
    assert not out.exists()


def test_without_tqdm_there_is_no_bar(archive, tmp_path: Path, monkeypatch) -> None:
    without("tqdm", monkeypatch)
    main(["reconstruct", str(archive.folder), "--sigma-rel", ".1", "-o", str(tmp_path / "x.safetensors")])
    assert (tmp_path / "x.safetensors").exists()


def test_a_bar_on_a_terminal_goes_to_the_end(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.bar("reconstruct", 2_000) as done:
        done(1_500)
        done(500)
    assert "reconstruct" in capsys.readouterr().err


def test_help_imports_no_torch(python) -> None:
    program = """
import sys
from ewma.cli import main
try: main(["reconstruct", "--help"])
except SystemExit: print({"torch", "numpy", "matplotlib"} & set(sys.modules))
"""
    assert python(program).endswith("set()")
