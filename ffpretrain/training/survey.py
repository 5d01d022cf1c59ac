"""What training frames are made of, for the model's card: compositions, distances, charges, lowest energy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ffpretrain.datasets.frames import Frame
from ffpretrain.errors import DataError
from ffpretrain.neighbors import neighbor_list

#: a model trained on more different compositions than this is not tied to any
MANY_COMPOSITIONS = 20


@dataclass(frozen=True)
class Survey:
    """What a set of frames holds.

    Attributes:
        elements: atomic numbers, ascending.
        compositions: formulas in Hill order, ascending.
        charges: total charges, e.
        spins: multiplicities 2S + 1.
        pair_distances: smallest and largest distance below the cutoff by pair such as ``"C-H"`` (symbols in
            alphabetical order), Å.
        lowest: the frame of lowest energy; the first one where there are no energies.
    """

    elements: list[int]
    compositions: list[str]
    charges: list[int]
    spins: list[int]
    pair_distances: dict[str, tuple[float, float]]
    lowest: Frame

    @property
    def min_distance(self) -> float | None:
        """Smallest distance of two atoms, Å; None where no two are within the cutoff."""
        return min((low for low, _ in self.pair_distances.values()), default=None)


def survey_frames(frames: Iterable[Frame], cutoff: float) -> Survey:
    """Look through frames once.

    Args:
        frames: at least one.
        cutoff: Å, of the distances.

    Raises:
        DataError: there are no frames.
    """
    from ase.formula import Formula

    compositions: dict[tuple[int, ...], str] = {}
    charges, spins = set(), set()
    distances: dict[str, tuple[float, float]] = {}
    lowest: Frame | None = None
    for frame in frames:
        key = tuple(sorted(frame.numbers.tolist()))
        if key not in compositions:
            compositions[key] = Formula.from_list([_symbol(z) for z in key]).format("hill")
        charges.add(frame.charge)
        spins.add(frame.spin)
        _widen(distances, frame, cutoff)
        if lowest is None or _lower(frame, lowest):
            lowest = frame
    if lowest is None:
        raise DataError("the training split is empty; give at least one frame")
    return Survey(
        sorted({z for key in compositions for z in key}),
        sorted(compositions.values()),
        sorted(charges),
        sorted(spins),
        dict(sorted(distances.items())),
        lowest,
    )


def _lower(frame: Frame, than: Frame) -> bool:
    return frame.energy is not None and than.energy is not None and frame.energy < than.energy


def _widen(distances: dict[str, tuple[float, float]], frame: Frame, cutoff: float) -> None:
    """Extend the range of each pair by the distances of a frame."""
    pos = torch.as_tensor(frame.positions, dtype=torch.float64)
    cell = None if frame.cell is None else torch.as_tensor(frame.cell, dtype=torch.float64)
    (neighbor, center), shift = neighbor_list(pos, cutoff, cell, frame.pbc)
    length = (pos[neighbor] + shift - pos[center]).norm(dim=1)
    numbers = torch.as_tensor(frame.numbers, dtype=torch.int64)
    low, high = (
        torch.minimum(numbers[neighbor], numbers[center]),
        torch.maximum(numbers[neighbor], numbers[center]),
    )
    code = low * 1000 + high
    for pair in code.unique().tolist():
        found = length[code == pair]
        name = "-".join(sorted((_symbol(pair // 1000), _symbol(pair % 1000))))
        before = distances.get(name, (float("inf"), 0.0))
        distances[name] = (min(before[0], float(found.min())), max(before[1], float(found.max())))


def _symbol(number: int) -> str:
    from ase.data import chemical_symbols

    return str(chemical_symbols[number])
