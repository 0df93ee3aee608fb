"""`ewma convert`: another tool's averages as a plain model file."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ewma.cli import targets
from ewma.cli.progress import bar

if TYPE_CHECKING:
    from torch import nn

EXAMPLE = "--model package.module:function"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="the averages in another tool's checkpoint, as a plain model file",
        description="Find the averaged weights in a checkpoint of torch's AveragedModel, timm, diffusers, torch_ema, "
        "ema-pytorch, Lightning, mmengine, LitEma, NeMo or ewma itself, and write them as safetensors.",
    )
    parser.add_argument("checkpoint", metavar="FILE", help="or folder: torch.save, safetensors, distributed checkpoint")
    parser.add_argument("-o", "--out", required=True, metavar="PATH", help="safetensors file, or a folder for it")
    parser.add_argument("--at", metavar="PLACE", help="which averages, where there are several")
    parser.add_argument("--model", metavar="MODULE:CALL", help="what builds the model, where names have to be known")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file (default: 5GB)")
    targets.add_dtype(parser, "as they are")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from ewma import checkpoints

    if Path(given.out).resolve() == Path(given.checkpoint).resolve():
        raise ValueError(
            f"--out {given.out} is the checkpoint itself, from which could not be resumed then; name another"
        )
    model = build(given.model) if given.model else None
    try:
        averages = checkpoints.read(given.checkpoint, model, at=given.at)
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from error
    size = given.max_shard_size
    limit = int(size) if size.isdigit() else size
    with bar("convert", sum(tensor.numel() for tensor in averages.weights.values())) as done:
        kind = targets.dtype(given)
        written = checkpoints.export(averages, given.out, max_shard_size=limit, dtype=kind, done=done)
    known = [f"at {averages.at}"] if averages.at else []
    known += [f"{averages.count:,} updates"] if averages.count is not None else []
    known += [f"decay {averages.decay:g}"] if averages.decay is not None else []
    print(f"{written[-1]}: {len(averages.weights)} tensors, from {', '.join([averages.source, *known])}")


def build(call: str) -> nn.Module:
    """What "package.module:function" gives when it is called; the current folder is looked in first."""
    from torch import nn

    name, _, function = call.partition(":")
    if not name or not function:
        raise ValueError(f"--model is MODULE:CALL, as in {EXAMPLE}; got {call!r}")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(name), function)()
    except AttributeError as error:
        raise ValueError(f"--model {call}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {call}: expected it to give an nn.Module; got {type(model).__name__}")
    return model


def _as_options(told: str) -> str:
    """An error's fix, as one would type it here."""
    return told.replace("read(path, model=model)", EXAMPLE).replace("example at=", "example --at ")
