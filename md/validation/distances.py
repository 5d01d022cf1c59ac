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
#: of the fit of weights to a distance: most steps, and the largest logarithm of a weight
_NEWTON_STEPS, _LARGEST = 30, 50.0

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


def density(counts: NDArray[np.int64] | Array) -> Array:
    """Return h(r) in 1/Å from counts by bin; zero where nothing was counted."""
    total = float(counts.sum())
    return np.asarray(counts / (total if total > 0 else 1.0) / BIN)


def centres() -> Array:
    """Return the middle of each bin in Å."""
    return np.asarray((np.arange(round(REACH / BIN) + 1) + 0.5) * BIN)


def mean_absolute_error(one: Array, other: Array) -> float:
    """Return the integral over r of ``|h(r) - h'(r)|`` (Fu et al. 2023, TMLR, "Forces are not enough").

    Between 0 and 2; 2 where the two have no distance in common.
    """
    return float(np.abs(one - other).sum() * BIN)


def sampling_error(counts: NDArray[np.int64] | Array) -> float | None:
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


def boltzmann_weights(excess: Array, kT: float) -> Array:
    """Return weights ``[F]``, of mean 1, that take frames of one potential to the ensemble of another.

    Args:
        excess: energy on the other potential less that on the one they were sampled with, eV ``[F]``.
        kT: of both ensembles, eV.
    """
    exponent = -excess / kT
    weights = np.exp(exponent - exponent.max())
    return np.asarray(weights / weights.mean())


def effective_number(weights: Array) -> float:
    """Return how many frames of equal weight say as much as these (Kish): ``(sum w)^2 / sum w^2``."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def reweighted_counts(positions: Array, weights: Array) -> Array:
    """Return counts of distances in another ensemble than the frames were drawn from, by bin ``[bins]``.

    The distribution of one pair's distance r in the other ensemble is that in the frames times ``E[w | r]``.
    This mean of the weights is a smooth function of r, fitted by ``exp(a + b r + c r^2)`` for each pair: mean
    and variance of r come out as with the weights themselves, while the noise of what all other coordinates
    add to the weights stays out.

    Args:
        positions: ``[F, N, 3]`` Å.
        weights: of the frames, mean 1, ``[F]``.
    """
    first, second = np.triu_indices(positions.shape[1], 1)
    bins = round(REACH / BIN) + 1
    counts = np.zeros(bins)
    for i, j in zip(first, second, strict=True):
        distance = np.linalg.norm(positions[:, i] - positions[:, j], axis=1)
        places = np.minimum((distance / BIN).astype(np.int64), bins - 1)
        counts += np.bincount(places, weights=_mean_weight(distance, weights), minlength=bins)
    return counts


def _mean_weight(distance: Array, weights: Array) -> Array:
    """Return ``E[w | r]`` of one pair at each frame's own distance, mean 1, ``[F]``.

    Fitted by Poisson regression, which is a convex problem: Newton's method with halved steps.
    """
    spread = float(distance.std())
    if spread == 0:
        return np.ones_like(weights)
    powers = np.vander((distance - distance.mean()) / spread, 3)
    found = np.zeros(3)

    def cost(parameters: Array) -> float:
        exponent = powers @ parameters
        return float((np.exp(exponent) - weights * exponent).mean()) if exponent.max() < _LARGEST else np.inf

    value = cost(found)
    for _ in range(_NEWTON_STEPS):
        fit = np.exp(powers @ found)
        slope = powers.T @ (fit - weights)
        step = np.linalg.lstsq(powers.T @ (fit[:, None] * powers), slope, rcond=None)[0]
        size = 1.0
        while size > 1e-6 and not (after := cost(found - size * step)) < value:
            size /= 2
        if size <= 1e-6:
            break
        found, gained, value = found - size * step, value - after, after
        if gained < 1e-10:
            break
    fit = np.exp(powers @ found)
    return np.asarray(fit / fit.mean())
