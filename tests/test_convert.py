"""`ewma convert`: what it writes and prints, and how its errors are put."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Small, same
from tests.tools import LitEma, LitEmaAlone, TorchEMA, run

import ewma
from ewma.cli import main


@pytest.fixture
def checkpoint(small: Small, tmp_path: Path) -> Path:
    tool = TorchEMA(small)
    run(tool, 3)
    return tool.save(tmp_path / "last.pt")


def test_a_file(checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "averaged.safetensors"
    main(["convert", str(checkpoint), "-o", str(out)])
    kept = torch.load(checkpoint, weights_only=True)["ema"]
    assert same(load_file(out), {n.removeprefix("module."): t for n, t in kept.items() if n != "n_averaged"})
    assert capsys.readouterr().out == f"{out}: 11 tensors, from torch AveragedModel, at ema, 3 updates\n"


def test_the_checkpoint_is_not_written_over(small: Small, tmp_path: Path) -> None:
    """From what is written could not be resumed."""
    path = tmp_path / "ema.safetensors"
    ema = ewma.ModelEMA(small, half_life=3)
    ema.update()
    ema.save(path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"ema.safetensors is the checkpoint itself, .*; name another"):
        main(["convert", str(path), "-o", f"{tmp_path}/./ema.safetensors"])
    assert path.read_bytes() == before


def test_a_folder_of_parts(checkpoint: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "parts").mkdir()
    options = ["--max-shard-size", "100", "--dtype", "bfloat16"]
    main(["convert", str(checkpoint), "-o", str(tmp_path / "parts"), *options])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/parts/model.safetensors.index.json: 11 tensors")
    parts = [load_file(path) for path in (tmp_path / "parts").glob("*.safetensors")]
    assert len(parts) > 1
    assert {tensor.dtype for part in parts for tensor in part.values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }


def test_the_decay_is_told(small: Small, tmp_path: Path, capsys) -> None:
    path = LitEma(small).save(tmp_path / "last.ckpt")
    main(["convert", str(path), "-o", str(tmp_path / "averaged.safetensors"), "--at", "state_dict/model_ema"])
    assert "from LitEma, at state_dict/model_ema, 0 updates, decay 0.75" in capsys.readouterr().out


def test_the_model_for_its_names(small: Small, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_models.py").write_text("from tests.conftest import Small\nnumber = 3\ndef three(): return 3\n")
    out = tmp_path / "averaged.safetensors"
    path = str(LitEmaAlone(small).save(tmp_path / "last.ckpt"))
    main(["convert", path, "-o", str(out), "--model", "my_models:Small"])
    Small().load_state_dict(load_file(out))
    for call, text in {
        "my_models": r"--model is MODULE:CALL, as in --model package.module:function; got 'my_models'",
        "my_models:Large": "--model my_models:Large: module 'my_models' has no attribute 'Large'",
        "my_models:three": "--model my_models:three: expected it to give an nn.Module; got int",
        "no_models:Small": "No module named 'no_models'",
    }.items():
        with pytest.raises(SystemExit, match=text):
            main(["convert", path, "-o", str(out), "--model", call])


def test_errors_are_put_as_options(small: Small, tmp_path: Path) -> None:
    out = str(tmp_path / "averaged.safetensors")
    alone = str(LitEmaAlone(small).save(tmp_path / "last.ckpt"))
    with pytest.raises(SystemExit, match="Pass the model that it averaged: --model package.module:function"):
        main(["convert", alone, "-o", out])
    several = {"a": TorchEMA(small).module.state_dict(), "b": TorchEMA(small).module.state_dict()}
    torch.save(several, tmp_path / "several.pt")
    with pytest.raises(SystemExit, match="found several averages: .* for example --at 'a'"):
        main(["convert", str(tmp_path / "several.pt"), "-o", out])
    torch.save({"weight": torch.ones(2)}, tmp_path / "plain.pt")
    with pytest.raises(SystemExit, match="ewma: .*plain.pt: found no averaged weights"):
        main(["convert", str(tmp_path / "plain.pt"), "-o", out])
    with pytest.raises(SystemExit, match="max_shard_size must be a number of bytes"):
        main(["convert", alone, "-o", out, "--max-shard-size", "much", "--model", "tests.conftest:Small"])
    assert not list(tmp_path.glob("*.safetensors"))
