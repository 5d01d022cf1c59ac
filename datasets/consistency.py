"""Do energies and forces belong together? A cheap test that catches wrong units and wrong signs.

Between two near geometries a and b, dE = E_b - E_a must equal the work -(F_a + F_b)/2 · (x_b - x_a): the
trapezoid rule, exact for a quadratic surface. Fitting dE = slope · work over many near pairs gives a slope
near 1 where the labels agree; energies in meV give 1000, forces in Hartree/Bohr 51, forces of the wrong sign
-1. A wrong length unit cancels in the work and is seen from bond lengths instead; energies and forces that
are wrong by the same factor cannot be seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets.frames import Dataset, Frame
from ffpretrain.datasets.lengths import wrong_length_unit
from ffpretrain.errors import DataError
from ffpretrain.units import energy_unit, force_unit

Verdict = Literal[
    "consistent",
    "wrong scale",
    "wrong sign",
    "wrong lengths",
    "unrelated",
    "not enough near pairs",
    "no labels",
]

MAX_FRAMES = 2000
"""Frames looked at; more are sampled down to this."""

MIN_PAIRS = 10
"""Fewer near pairs than this decide nothing."""

NEAR, SAME = 0.25, 1e-3
"""Å, root mean square displacement of an atom: bounds of a pair; below ``SAME`` the noise of labels rules."""

SLOPE_TOLERANCE = 0.3
"""Accepted |ln slope|: anharmonic pairs bias it by up to 20 %, the nearest wrong unit is a factor 1.9."""

MIN_CORRELATION = 0.7
"""Below this correlation of dE and work, energies and forces do not belong together."""

_ENERGY_MISTAKES = {
    "mev": "meV",
    "kcal/mol": "kcal/mol",
    "kj/mol": "kJ/mol",
    "hartree": "Hartree",
    "rydberg": "Rydberg",
}
_FORCE_MISTAKES = {
    "hartree/bohr": "Hartree/Bohr",
    "kcal/mol/angstrom": "kcal/mol/Å",
    "mev/angstrom": "meV/Å",
    "hartree/angstrom": "Hartree/Å",
    "ev/bohr": "eV/Bohr",
    "rydberg/bohr": "Rydberg/Bohr",
    "kj/mol/nm": "kJ/mol/nm",
    "kj/mol/angstrom": "kJ/mol/Å",
}
_CANDIDATES_PER_PAIR = 10
_FRAMES_FOR_LENGTHS = 20
_MAX_DISTANCES = 2e7


@dataclass(frozen=True)
class ConsistencyReport:
    """What :func:`check_labels` found.

    Attributes:
        slope: of dE against the work of the forces; 1 where units and sign agree; NaN if not fitted.
        correlation: of the two, through the origin.
        n_pairs: near pairs used.
        verdict: in a few words.
        message: one line with the numbers and the likely cause.
        distance: root mean square displacement of an atom between two geometries in Å, median over pairs.
    """

    slope: float
    correlation: float
    n_pairs: int
    verdict: Verdict
    message: str
    distance: float = math.nan

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the labels; datasets that cannot be judged are not called wrong."""
        return self.verdict in ("consistent", "not enough near pairs", "no labels")


class _Pairs(NamedTuple):
    """Near pairs: energy difference [P], work [P], displacement [P] Å, energetic distance [P]."""

    energy: NDArray[np.float64]
    work: NDArray[np.float64]
    distance: NDArray[np.float64]
    stiffness: NDArray[np.float64]


def check_labels(dataset: Dataset, max_pairs: int = 300, seed: int = 0) -> ConsistencyReport:
    """Compare energies with forces over the nearest pairs of frames of the same molecule or cell.

    Pairs are ranked by sum_i |F_b - F_a|_i |x_b - x_a|_i, which is small where the surface between them is
    close to quadratic; the ranking does not depend on the scale or sign of the forces, nor on the energies.
    The slope is the one of least absolute deviations, so a few bad frames do not move it.

    Args:
        dataset: with energies and forces; unlabelled frames are passed over.
        max_pairs: pairs to use.
        seed: of the sample of frames, where there are more than ``MAX_FRAMES``.

    Raises:
        DataError: ``max_pairs`` is too small, or a frame cannot be read.
    """
    if max_pairs < MIN_PAIRS:
        raise DataError(f"max_pairs={max_pairs} decides nothing; take at least {MIN_PAIRS}")
    frames = _sample(dataset, seed)
    spread = np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES_FOR_LENGTHS)).astype(int)
    lengths = wrong_length_unit([frames[i] for i in spread])
    if lengths is not None:
        return _undecided("wrong lengths", f"atoms lie as if {lengths}: correct the length unit first")
    groups = _groups(frames)
    if not groups:
        return _undecided(
            "no labels", "no frame has both an energy and forces, so there is nothing to compare"
        )
    found = [_near_pairs(group, max_pairs * _CANDIDATES_PER_PAIR) for group in groups if len(group) > 1]
    pairs = _nearest(found, max_pairs)
    if len(pairs.work) < MIN_PAIRS:
        return _undecided(
            "not enough near pairs",
            f"only {len(pairs.work)} pairs of frames are within {NEAR} Å, a judgement needs {MIN_PAIRS}",
            len(pairs.work),
        )
    return _judge(pairs, np.unique([len(group[0]) for group in groups]))


def _undecided(verdict: Verdict, message: str, n_pairs: int = 0) -> ConsistencyReport:
    return ConsistencyReport(math.nan, math.nan, n_pairs, verdict, message)


def _sample(dataset: Dataset, seed: int) -> list[Frame]:
    chosen = np.arange(len(dataset))
    if len(dataset) > MAX_FRAMES:
        chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), MAX_FRAMES, replace=False))
    return [dataset[int(index)] for index in chosen]


def _groups(frames: list[Frame]) -> list[list[Frame]]:
    """Return labelled frames, grouped by what must be equal for energies to be comparable."""
    groups: dict[tuple[object, ...], list[Frame]] = {}
    for frame in frames:
        if frame.energy is None or frame.forces is None:
            continue
        cell = b"" if frame.cell is None else np.round(frame.cell, 6).tobytes()
        key = (frame.numbers.tobytes(), frame.charge, frame.spin, frame.pbc, cell)
        groups.setdefault(key, []).append(frame)
    return list(groups.values())


def _near_pairs(frames: list[Frame], n_candidates: int) -> _Pairs:
    """Return the pairs of one group that are near, rotated onto each other where nothing is periodic."""
    x = np.array([frame.positions for frame in frames])
    forces = np.array([frame.forces for frame in frames])
    energy = np.array([frame.energy for frame in frames])
    periodic = any(frames[0].pbc)
    if periodic:
        x = _unwrapped(x, frames[0])
    a, b = _candidates(x, periodic, n_candidates)
    x_a, x_b, f_a, f_b = x[a], x[b], forces[a], forces[b]
    if not periodic:
        x_a, x_b, f_b = _aligned(x_a, x_b, f_b)
    step = x_b - x_a
    distance = np.sqrt((step**2).sum(axis=(1, 2)) / x.shape[1])
    near = (distance < NEAR) & (distance > SAME)
    work = -0.5 * ((f_a + f_b) * step).sum(axis=(1, 2))
    stiffness = (np.linalg.norm(f_b - f_a, axis=2) * np.linalg.norm(step, axis=2)).sum(axis=1)
    return _Pairs((energy[b] - energy[a])[near], work[near], distance[near], stiffness[near])


def _candidates(
    x: NDArray[np.float64], periodic: bool, n_candidates: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of frames nearest in a measure that needs no alignment.

    For molecules that is the difference of all interatomic distances, for periodic cells of the positions.
    """
    n_frames, n_atoms = x.shape[:2]
    i, j = np.triu_indices(n_atoms, 1)
    if periodic or n_atoms == 1:
        features = x.reshape(n_frames, -1)
    else:
        # many atoms: distances of a spread of atom pairs rank frames as well as all of them
        stride = max(1, math.ceil(len(i) * n_frames / _MAX_DISTANCES))
        features = np.linalg.norm(x[:, i[::stride]] - x[:, j[::stride]], axis=2)
    squares = (features**2).sum(axis=1)
    first, second = np.triu_indices(n_frames, 1)
    gaps = (squares[:, None] + squares[None, :] - 2 * features @ features.T)[first, second]
    n_candidates = min(n_candidates, len(gaps))
    nearest = np.argpartition(gaps, n_candidates - 1)[:n_candidates]
    return first[nearest], second[nearest]


def _aligned(
    x_a: NDArray[np.float64], x_b: NDArray[np.float64], f_b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Centre both geometries of each pair and turn the second, with its forces, onto the first (Kabsch)."""
    x_a = x_a - x_a.mean(axis=1, keepdims=True)
    x_b = x_b - x_b.mean(axis=1, keepdims=True)
    left, _, right = np.linalg.svd(np.einsum("pni,pnj->pij", x_b, x_a))
    left[:, :, -1] *= np.sign(np.linalg.det(left @ right))[:, None]
    rotation = left @ right
    return x_a, x_b @ rotation, f_b @ rotation


def _unwrapped(x: NDArray[np.float64], frame: Frame) -> NDArray[np.float64]:
    """Move every atom to the periodic image nearest to where it is in the first frame."""
    from ase.geometry import find_mic

    steps = (x - x[0]).reshape(-1, 3)
    nearest, _ = find_mic(steps, frame.cell, pbc=frame.pbc)
    moved: NDArray[np.float64] = x[0] + nearest.reshape(x.shape)
    return moved


def _nearest(found: list[_Pairs], max_pairs: int) -> _Pairs:
    joined = (
        _Pairs(*(np.concatenate([np.empty(0), *column]) for column in zip(*found, strict=True)))
        if found
        else None
    )
    if joined is None:
        return _Pairs(*(np.empty(0) for _ in range(4)))
    order = np.argsort(joined.stiffness, kind="stable")[:max_pairs]
    return _Pairs(*(column[order] for column in joined))


def _judge(pairs: _Pairs, sizes: NDArray[np.int64]) -> ConsistencyReport:
    energy, work = pairs.energy, pairs.work
    norm = math.sqrt(float(energy @ energy) * float(work @ work))
    distance = float(np.median(pairs.distance))
    if norm == 0:
        what = "energies do" if float(energy @ energy) == 0 else "forces do no work, energies"
        message = f"the {what} not change between {len(work)} near pairs: labels are missing or constant"
        return ConsistencyReport(math.nan, 0.0, len(work), "unrelated", message, distance)
    correlation = float(energy @ work) / norm
    slope = _robust_slope(energy, work)
    facts = (
        f"dE = {slope:.4g} x work of the forces, correlation {correlation:.3f}, "
        f"over {len(work)} pairs {distance:.2g} Å apart"
    )
    verdict: Verdict
    if abs(correlation) < MIN_CORRELATION:
        verdict, cause = (
            "unrelated",
            "energies and forces do not belong together (shuffled, or of two methods?)",
        )
    elif slope < 0:
        verdict = "wrong sign"
        scale = "" if abs(math.log(-slope)) <= SLOPE_TOLERANCE else f", and {_cause(-slope, sizes)}"
        cause = f"the forces have the wrong sign (gradients?){scale}"
    elif abs(math.log(slope)) > SLOPE_TOLERANCE:
        verdict, cause = "wrong scale", _cause(slope, sizes)
    else:
        verdict, cause = "consistent", "energies and forces agree"
    return ConsistencyReport(slope, correlation, len(work), verdict, f"{cause}: {facts}", distance)


def _robust_slope(energy: NDArray[np.float64], work: NDArray[np.float64]) -> float:
    """Return the slope of least absolute deviations: the median ratio, weighted by |work|."""
    moved = work != 0
    ratio, weight = energy[moved] / work[moved], np.abs(work[moved])
    order = np.argsort(ratio)
    total = np.cumsum(weight[order])
    return float(ratio[order][np.searchsorted(total, total[-1] / 2)])


def _cause(slope: float, sizes: NDArray[np.int64]) -> str:
    """Name the unit errors whose factor is nearest to the slope, the usual mistakes first."""
    gaps = [(abs(math.log(slope / factor)), rare, name) for name, factor, rare in _known_factors(sizes)]
    best = sorted((gap + rare, name) for gap, rare, name in gaps if gap <= SLOPE_TOLERANCE / 2)[:3]
    if not best:
        return f"energies and forces differ by a factor {slope:.4g} that is no known unit"
    return "it looks as if " + ", or ".join(name for _, name in best)


def _known_factors(sizes: NDArray[np.int64]) -> Iterator[tuple[str, float, float]]:
    """Yield wrong units, the slope each would give, and how much closer it must fit to be named first."""
    for unit, shown in _ENERGY_MISTAKES.items():
        yield f"energies are in {shown} but were read as eV", 1 / energy_unit(unit), _rarity(unit)
        yield f"energies were in eV but were read as {shown}", energy_unit(unit), 0.1
    for unit, shown in _FORCE_MISTAKES.items():
        yield f"forces are in {shown} but were read as eV/Å", force_unit(unit), _rarity(unit)
        yield f"forces were in eV/Å but were read as {shown}", 1 / force_unit(unit), 0.1
    if len(sizes) == 1 and sizes[0] > 1:
        yield f"energies are per atom (of {sizes[0]} atoms)", 1 / float(sizes[0]), 0.05


def _rarity(unit: str) -> float:
    return 0.05 if unit.startswith("rydberg") or unit == "hartree/angstrom" else 0.0
