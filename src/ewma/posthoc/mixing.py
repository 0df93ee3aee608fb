"""One model out of several files, tensor by tensor: the mixture of those of one name, or a copy of the newest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import inf, prod
from pathlib import Path

import torch
from torch import Tensor

from ewma import kernels, pieces
from ewma.pieces import Piece
from ewma.readers import Checkpoint

BLOCK = 2**17
"""Elements of a tensor that are mixed at a time: what is read of each file is still in the caches when it is used."""

MANY = 256
"""With more files than this, each is closed after use: processes may not have many more open."""


def nothing(elements: int) -> None:
    """Where nobody wants to be told."""


class Source:
    """A file, and what its tensors are called in it."""

    def __init__(self, file: Checkpoint, names: Mapping[str, str]) -> None:
        self.file, self.names = file, names

    def dtype(self, name: str) -> torch.dtype:
        return self.file.dtype(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.shape(self.names[name])

    def read(self, name: str) -> Tensor:
        return self.file.read(self.names[name])

    def into(self, name: str, out: Tensor) -> Callable[[int], object]:
        return self.file.into(self.names[name], out)


@dataclass(frozen=True)
class Mixture:
    """Tensors to be made of those in several files.

    Args:
        sources: oldest first.
        shares: each tensor's coefficients, one a file, which sum to 1; None copies the newest, as integers are.
        aliases: further names under which a tensor is given.
    """

    sources: Sequence[Source]
    shares: Mapping[str, Sequence[float] | None]
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def tensors(self, done: Callable[[int], object] = nothing) -> dict[str, Tensor]:
        """All of them, in memory, in float32 or wider. `done` is told the elements of each tensor once it is made."""
        made = {}
        for name in self.shares:
            made[name] = self.make(name)
            done(made[name].numel())
        return {alias: made[name] for name in made for alias in (name, *self.aliases.get(name, ()))}

    def write(
        self,
        path: str | os.PathLike[str],
        told: Mapping[str, str],
        dtype: torch.dtype | None = None,
        done: Callable[[int], object] = nothing,
    ) -> None:
        """Write them as safetensors, each as soon as it is made: whole, or not at all.

        Args:
            dtype: of the floating ones; by default float32 or wider.
        """
        place = Path(path)
        if not place.parent.is_dir():
            raise FileNotFoundError(f"{place}: the folder {place.parent} does not exist; make it first")
        if place.is_dir():
            raise IsADirectoryError(f"{place}: expected the path of a file; this is a folder")
        if any(place.resolve() == source.file.path.resolve() for source in self.sources):
            raise FileExistsError(f"{place}: it is one of the files that are averaged, and would be lost; name another")
        if place.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            raise ValueError(f"{place}: what is written is safetensors; name it {place.stem}.safetensors")
        pieces.check_dtype(dtype)
        shards = pieces.split(self._pieces(dtype), inf)

        def stream() -> Iterator[Tensor]:
            for piece in shards[0]:
                done(prod(piece.shape))
                yield piece.read()

        pieces.write(place, shards, stream(), {"format": "pt", **told})

    @property
    def elements(self) -> int:
        """How many there are to make."""
        return sum(self.sources[-1].file.entry(self.sources[-1].names[name]).numel for name in self.shares)

    def make(self, name: str) -> Tensor:
        """One of the tensors."""
        return mix(name, parts) if (parts := self._parts(name)) else self.sources[-1].read(name)

    def _parts(self, name: str) -> list[tuple[Source, float]]:
        """What a tensor is mixed of; nothing where it is copied."""
        shares = self.shares[name] or [0.0] * len(self.sources)
        return [(source, share) for source, share in zip(self.sources, shares, strict=True) if share]

    def _pieces(self, dtype: torch.dtype | None) -> Iterator[Piece]:
        for name in self.shares:
            dtypes = [source.dtype(name) for source, _ in self._parts(name)]
            own = _wide(dtypes) if dtypes else self.sources[-1].dtype(name)
            chosen = dtype if dtype is not None and own.is_floating_point else own
            for alias in (name, *self.aliases.get(name, ())):
                yield Piece(alias, chosen, self.sources[-1].shape(name), partial(self.make, name))


def mix(name: str, parts: Sequence[tuple[Source, float]]) -> Tensor:
    """The mixture of a tensor in several files, by shares that sum to 1, as a running weighted mean over the files:

        weight' = weight + share        mean' = mean + share / weight' * (x - mean)

    What is the same in all files comes out the same, to the bit. The largest shares come first and negative ones last,
    so that the weight never comes near 0.
    """
    parts = sorted(parts, key=lambda part: -part[1])
    weights = accumulate(share for _, share in parts)
    terms = [(source, share / weight) for (source, share), weight in zip(parts, weights, strict=True)]
    sources = [source for source, _ in parts]
    dtype = _wide([source.dtype(name) for source in sources])
    out = torch.empty(sources[0].shape(name), dtype=dtype, device="cpu")
    flat = out.view(-1)
    in_parts = all(source.file.in_parts for source in sources)
    blocks = -(-len(flat) // BLOCK) if in_parts else 1
    size = -(-len(flat) // max(1, blocks))
    begins = [min(number * size, len(flat) - size) for number in range(blocks)]  # the last two may overlap
    half = -(-blocks // 2)
    with _one_thread():
        # Two threads: while one waits for a file the other computes.
        runs = [_prepare(name, terms, flat, part, size) for part in (begins[:half], begins[half:]) if part]
        if len(runs) > 1 and len(terms) <= MANY:
            with ThreadPoolExecutor(len(runs)) as pool:
                finite = list(pool.map(lambda run: run(), runs))
        else:
            finite = [run() for run in runs]
    return out if all(finite) else _not_finite(name, sources, out)


def _prepare(
    name: str, terms: Sequence[tuple[Source, float]], flat: Tensor, begins: Sequence[int], size: int
) -> Callable[[], bool]:
    """What mixes blocks of a tensor, each from an element on; and tells whether they are finite for sure."""
    mean = flat.new_empty(size)
    rooms = {dtype: flat.new_empty(size, dtype=dtype) for dtype in {source.dtype(name) for source, _ in terms}}
    updates = {dtype: kernels.lerp([_real(room)], [[_real(mean)]], [0], guard=False) for dtype, room in rooms.items()}
    steps = []
    for source, coefficient in terms:
        room = rooms[source.dtype(name)]
        steps.append((source.into(name, room), source, coefficient, room, updates[room.dtype]))
        if len(terms) > MANY:
            source.file.close()

    def run() -> bool:
        finite = True
        for begin in begins:
            for fill, source, coefficient, room, update in steps:
                fill(begin)
                if coefficient == 1.0:
                    mean.copy_(room)
                else:
                    update([coefficient], [None])
                if len(terms) > MANY:
                    source.file.close()
            flat[begin : begin + size] = mean
            finite = finite and bool(mean.sum().isfinite())
        return finite

    return run


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch share no operation among threads: on blocks as small as these they would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _wide(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        # Of float8 no torch operation knows what to promote it to.
        wide = torch.promote_types(wide, dtype if dtype.itemsize > 1 else torch.float32)
    return wide


def _not_finite(name: str, sources: Sequence[Source], out: Tensor) -> Tensor:
    """Say which file holds something that is no number; but a mask that is the same in all of them is what it is."""
    for source in sources:
        wrong = (~source.read(name).to(out.dtype).isfinite()).sum().item()
        if wrong:
            newest = sources[-1].read(name)
            if all(torch.equal(other.read(name), newest) for other in sources):
                return newest.to(out.dtype)
            raise ValueError(
                f"{source.file.path}: {name} holds NaN or infinity in {wrong} of {out.numel()} elements, and nothing "
                f"can be made of it. Leave this file out."
            )
    return out
