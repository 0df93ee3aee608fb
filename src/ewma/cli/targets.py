"""Which average is asked for, on the command line."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from ewma import profiles
from ewma.profiles import Exponential, Power, Profile, Uniform

if TYPE_CHECKING:
    import torch

SHAPES = "|".join(profiles.from_lr_decay.SHAPES)


def add(parser: argparse.ArgumentParser, sweep: bool = True, required: bool = True) -> None:
    """The options that name a profile, of which one is taken."""
    group = parser.add_argument_group("which average", "exactly one" if required else "at most one")
    one = group.add_mutually_exclusive_group(required=required)
    one.add_argument("--sigma-rel", type=float, metavar="S", help="power profile: its width as a share of the run")
    if sweep:
        one.add_argument("--sweep", metavar="FROM:TO:N", help="N power profiles, from one sigma_rel to another")
    one.add_argument("--half-life", type=float, metavar="STEPS", help="exponential, by its half-life")
    one.add_argument("--decay", type=float, metavar="D", help="exponential, by the weight kept per step, such as .999")
    one.add_argument("--tail", type=float, metavar="STEPS", help="the plain mean of the last steps")
    one.add_argument("--triangle", type=float, metavar="STEPS", help="weights that rise over the last steps")
    one.add_argument("--lr-decay", metavar="SHAPE:STEPS", help=f"what stands in for a decay ({SHAPES}) over them")
    one.add_argument("--profile", metavar="JSON", help="any profile, as Profile.to_json() writes it")


def named(given: argparse.Namespace) -> list[tuple[str, Profile, float | None]]:
    """What was asked for: a name for files, the profile, and for how many steps before the end it goes, if not all."""
    if getattr(given, "sweep", None):
        return [(f"{sigma:.4g}", Power(sigma_rel=sigma), None) for sigma in spaced(given.sweep)]
    if given.sigma_rel is not None:
        return [("", Power(sigma_rel=given.sigma_rel), None)]
    if given.half_life is not None or given.decay is not None:
        return [("", Exponential(half_life=given.half_life, decay=given.decay), None)]
    if given.tail is not None:
        return [("", Uniform(), given.tail)]
    if given.triangle is not None:
        return [("", profiles.triangular(steps=given.triangle), given.triangle)]
    if given.lr_decay is not None:
        shape, _, steps = given.lr_decay.partition(":")
        length = number(steps, f"--lr-decay={given.lr_decay}", "--lr-decay cosine:1000")
        return [("", profiles.from_lr_decay(shape=shape, steps=length), length)]
    return [("", profiles.from_json(given.profile), None)] if given.profile is not None else []


def spaced(sweep: str) -> list[float]:
    """Evenly spaced numbers, both ends among them.

    >>> spaced("0.05:0.1:3")
    [0.05, 0.075, 0.1]
    """
    parts = sweep.split(":")
    example = "--sweep 0.03:0.25:12"
    if len(parts) != 3 or not parts[2].isdigit() or int(parts[2]) < 2:
        raise ValueError(f"--sweep is FROM:TO:N with N of 2 or more, such as {example}; got {sweep!r}")
    first, last = (number(part, f"--sweep={sweep}", example) for part in parts[:2])
    between = int(parts[2]) - 1
    return [round(first + (last - first) * k / between, 12) for k in range(between + 1)]


def number(text: str, where: str, example: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: expected a number in the place of {text!r}, such as {example}")
    return value


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where to write, and as what."""
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="safetensors file to write")
    add_dtype(parser, "float32 or wider")
    parser.add_argument("--plot", metavar="PNG", help="draw the weights over the run; needs matplotlib")


def add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    kinds = ("float32", "bfloat16", "float16", "float64")
    parser.add_argument("--dtype", choices=kinds, help=f"of the floating tensors (default: {default})")


def dtype(given: argparse.Namespace) -> torch.dtype | None:
    import torch

    return getattr(torch, given.dtype) if given.dtype else None
