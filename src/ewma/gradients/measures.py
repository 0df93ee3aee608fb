"""What averages of gradients can tell: the slow gradient's size and direction, and how noisy the gradients are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ewma.gradients import noise
from ewma.gradients.owners import Owners
from ewma.kernels.layout import parts_of
from ewma.shards import local, summed
from ewma.tracks import Track


class Measured:
    """Who keeps averages of gradients."""

    owners: Owners
    track: Track
    squares: dict[str, Tensor] | None
    """The averages of the squared gradients, where they are kept."""

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and average of each gradient so far. These are the averages themselves: clone one to keep it."""
        yield from self.track.averages.items()

    def norm(self) -> Tensor:
        """The norm of the slow gradient over all parameters: a 0-dim float64 tensor, not waited for. Collective where
        parameters are sharded."""
        return sum((self._square(average) for average in self._seen_averages().values()), start=_zero()).sqrt()

    def cosine(self) -> Tensor:
        """The cosine between the slow gradient and the one that is there now: ask after backward, before the step."""
        across, size = _zero(), _zero()
        averages = self._seen_averages()
        for (name, parameter), gradient in zip(*self.owners.present(), strict=True):
            if name in averages:
                across = across + noise.product(gradient, averages[name], parameter)
                size = size + noise.product(gradient, gradient, parameter)
        return across / (size.sqrt() * self.norm())

    def noise_scale(self, batch_size: float) -> Tensor:
        """The simple noise scale: at how many samples a batch's gradient is as noisy as it is large.

            tr(S) / |G|^2 = batch_size * (V - M) / (M - q V)      M = |average|^2, V = sum of the averages of squares

        q is the sum of the squared weights of all steps. Both estimates are ratios' parts, averaged each on its own.

        Args:
            batch_size: samples behind each gradient, over all ranks and accumulated batches.

        Needs squares=True. Right where the gradient drifts little within the half-life; noisy below half-lives of
        some 30 steps. A 0-dim float64 tensor, not waited for. Source: McCandlish et al. 2018, arXiv 1812.06162,
        appendix A. Beside it: `NoiseScale` for who has gradients of two batch sizes.
        """
        signal, spread = _zero(), _zero()
        for mean, square, concentration in self._moments().values():
            signal = signal + (mean - concentration * square) / (1.0 - concentration)
            spread = spread + (square - mean) / (1.0 - concentration)
        return batch_size * spread / signal

    def snr(self) -> dict[str, Tensor]:
        """The signal-to-noise ratio of each parameter's gradient, `|G|^2 / tr(S of a batch)`: 0-dim float64 tensors.

        Needs squares=True; NaN until two steps were seen.
        """
        return {name: (mean - q * square) / (square - mean) for name, (mean, square, q) in self._moments().items()}

    def _seen_averages(self) -> dict[str, Tensor]:
        if not self.track.averages:
            raise RuntimeError("GradientEMA has seen no gradient yet; ask after the first optimizer step")
        return self.track.averages

    def _square(self, average: Tensor) -> Tensor:
        return noise.product(local(average), local(average), average)

    def _moments(self) -> dict[str, tuple[Tensor, Tensor, Any]]:
        """Of each parameter |average|^2, the sum of the averages of squares, and the concentration of their weights."""
        averages = self._seen_averages()
        if self.squares is None:
            raise RuntimeError(
                "this needs the averages of the squared gradients, which were not kept: GradientEMA(..., squares=True)"
            )
        return {
            name: (
                self._square(average),
                summed(torch.nansum(parts_of(local(self.squares[name])), dtype=torch.float64), average),
                self.track.clock_of(name).concentration,
            )
            for name, average in averages.items()
            if name in self.squares
        }


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")
