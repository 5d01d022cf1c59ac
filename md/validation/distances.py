"""The distribution of interatomic distances h(r), and how far two of them are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Å
BIN = 0.03
#: Å, up to where distances are told apart
REACH = 15.0

Array = NDArray[np.float64]


class Distances:
    """Counts the distances of all pairs of atoms in structures of one size.

    Args:
        n_atoms: N.
        groups: structures counted apart, such as replicas.
        device: of the positions.

    Attributes:
        counts: int64 ``[groups, bins]``; the last bin holds everything beyond :data:`REACH`.
    """

    def __init__(self, n_atoms: int, groups: int, device: torch.device | str = "cpu") -> None:
        self.bins = round(REACH / BIN) + 1
        self.counts = torch.zeros(groups, self.bins, dtype=torch.int64, device=device)
        self._first, self._second = torch.triu_indices(n_atoms, n_atoms, 1, device=device)
        self._offset = torch.arange(groups, device=device).unsqueeze(1) * self.bins

    def add(self, positions: Tensor, chosen: Tensor | None = None) -> None:
        """Count one structure of each group.

        Args:
            positions: ``[groups, N, 3]`` Å.
            chosen: bool ``[groups]``, those that are counted; None counts all.
        """
        distance = (positions[:, self._first] - positions[:, self._second]).norm(dim=-1)
        bins = (distance / BIN).long().clamp_(max=self.bins - 1) + self._offset
        if chosen is not None:
            bins = bins[chosen]
        found = torch.bincount(bins.flatten(), minlength=self.counts.numel())
        self.counts += found.view_as(self.counts)

    def density(self, groups: Tensor | slice = slice(None)) -> Array:
        """Return h(r) in 1/Å of some groups together, ``[bins]``; its integral is 1."""
        return density(self.counts[groups].sum(0).cpu().numpy())


def density(counts: NDArray[np.int64]) -> Array:
    """Return h(r) in 1/Å from counts by bin; zero where nothing was counted."""
    return np.asarray(counts / max(int(counts.sum()), 1) / BIN)


def centres() -> Array:
    """Return the middle of each bin in Å."""
    return np.asarray((np.arange(round(REACH / BIN) + 1) + 0.5) * BIN)


def mean_absolute_error(one: Array, other: Array) -> float:
    """Return the integral over r of ``|h(r) - h'(r)|`` (Fu et al. 2023, TMLR, "Forces are not enough").

    Between 0 and 2; 2 where the two have no distance in common.
    """
    return float(np.abs(one - other).sum() * BIN)


def sampling_error(counts: NDArray[np.int64]) -> float | None:
    """Return what the error would be between the truth and a perfect sample of this size.

    Half the error between the two halves of the groups: each half has twice the variance of the whole, their
    difference four times.

    Args:
        counts: ``[groups, bins]``.

    Returns:
        None with fewer than two groups.
    """
    if len(counts) < 2:
        return None
    return 0.5 * mean_absolute_error(density(counts[::2].sum(0)), density(counts[1::2].sum(0)))


def distances_of(frames: Iterable[Array], n_atoms: int) -> NDArray[np.int64]:
    """Return counts of positions ``[N, 3]`` Å, frames in turn in two groups, ``[2, bins]``."""
    counter = Distances(n_atoms, 1)
    halves = np.zeros((2, counter.bins), dtype=np.int64)
    for place, positions in enumerate(frames):
        counter.counts.zero_()
        counter.add(torch.as_tensor(positions, dtype=torch.float64)[None])
        halves[place % 2] += counter.counts[0].numpy()
    return halves
