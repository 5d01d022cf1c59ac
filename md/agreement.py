"""The agreement gate: a fast way to evaluate a potential is compared with the plain one before it is used."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ffpretrain.errors import NonFiniteError, UserError
from ffpretrain.graphs import build_graph
from ffpretrain.md.paths import Array, Evaluation, Path, evaluation, has_volume

#: Largest error allowed. Forces: relative to the largest force, or to 1 eV/Å if that is larger. Energies:
#: relative to the sum over atoms of the size of what the network adds to the reference energies, or to 1 eV.
#: Constants of the package: a model's file cannot loosen them. Six layers of 128 channels trained on aspirin
#: or ethanol differ by 8e-6 eV/Å and 1.4e-6 eV in float32; their own errors are a thousand times larger.
TOLERANCE: dict[torch.dtype, float] = {torch.float32: 3e-5, torch.float64: 1e-9}
FRAMES = 3
#: Å, standard deviation of the displacements of the frames compared
DISPLACEMENT = 0.02


class AgreementError(UserError):
    """A fast path gives other numbers than the plain evaluation in float64."""


@dataclass(frozen=True)
class Agreement:
    """How far a path is from the plain evaluation in float64.

    Attributes:
        path: such as ``dense`` or ``dense compiled``.
        dtype: precision of the path's network.
        n_atoms: of the structure compared.
        frames: number of frames compared.
        force_error: largest error of a force component in eV/Å.
        force_scale: what it is relative to, eV/Å.
        energy_error: largest error of the energy in eV; 0 for a model without energies.
        energy_scale: what it is relative to, eV.
        tolerance: largest error allowed, relative.
    """

    path: str
    dtype: str
    n_atoms: int
    frames: int
    force_error: float
    force_scale: float
    energy_error: float
    energy_scale: float
    tolerance: float

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for a report."""
        return asdict(self)


def check_agreement(
    path: Path,
    model: nn.Module,
    numbers: NDArray[np.int64],
    positions: Array,
    cell: Array | None,
    pbc: tuple[bool, bool, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Agreement:
    """Compare a path with the plain evaluation in float64 on displaced copies of a structure.

    Args:
        path: what is about to be used.
        model: the same weights as the path's; not changed.
        numbers: atomic numbers ``[N]``.
        positions: ``[N, 3]`` Å.
        cell: ``[3, 3]`` Å or None.
        pbc: which directions repeat.
        dtype: precision of the path's network.
        device: where both are evaluated.

    Raises:
        AgreementError: they differ by more than :data:`TOLERANCE`.
        NonFiniteError: the plain evaluation gives no finite energy or forces for the structure.
    """
    reference = copy.deepcopy(model).to(device, torch.float64)
    rng = np.random.default_rng(0)
    force_error = energy_error = 0.0
    force_scale = energy_scale = 1.0
    _check_finite(_plain(reference, numbers, positions, cell, pbc, device))
    for _ in range(FRAMES):
        # none is the structure itself: where symmetry makes a vector vanish, rounding decides where it points
        moved = positions + rng.normal(0.0, DISPLACEMENT, positions.shape)
        wanted = _plain(reference, numbers, moved, cell, pbc, device)
        _check_finite(wanted)
        found = path(moved, cell)
        if wanted.forces is not None and found.forces is not None:
            force_error = max(force_error, _largest(found.forces - wanted.forces))
            force_scale = max(force_scale, _largest(wanted.forces))
        if wanted.energy is not None and found.energy is not None:
            energy_error = max(energy_error, _largest(np.array(found.energy - wanted.energy)))
            energy_scale = max(energy_scale, _network_part(reference, numbers, wanted))
    agreement = Agreement(
        path.name,
        str(dtype).removeprefix("torch."),
        len(numbers),
        FRAMES,
        force_error,
        force_scale,
        energy_error,
        energy_scale,
        TOLERANCE[dtype],
    )
    _refuse(agreement)
    return agreement


def _plain(
    reference: nn.Module,
    numbers: NDArray[np.int64],
    positions: Array,
    cell: Array | None,
    pbc: tuple[bool, bool, bool],
    device: torch.device,
) -> Evaluation:
    graph = build_graph(
        torch.as_tensor(numbers, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.float64),
        float(reference.cutoff),  # type: ignore[arg-type]
        None if cell is None else torch.tensor(cell, dtype=torch.float64),
        pbc,
    )
    return evaluation(reference(graph.to(device)), float("inf"), periodic=has_volume(cell, pbc))


def _largest(values: Array) -> float:
    """Return the largest absolute value; infinite where one is not finite, so that no comparison passes."""
    return float(np.abs(values).max()) if np.isfinite(values).all() else float("inf")


def _network_part(reference: nn.Module, numbers: NDArray[np.int64], wanted: Evaluation) -> float:
    """Return the sum of ``|e_i|``, what the network adds to the reference energies, in eV."""
    if wanted.energies is None:
        return abs(wanted.energy or 0.0)
    offsets = getattr(reference, "reference", None)
    known = 0.0 if offsets is None else offsets.cpu().numpy()[numbers]
    return float(np.abs(wanted.energies - known).sum())


def _check_finite(wanted: Evaluation) -> None:
    values = [v for v in (wanted.energy, wanted.forces) if v is not None]
    if not all(np.isfinite(value).all() for value in values):
        raise NonFiniteError(
            "the model's energy or forces are not finite for this structure; look for atoms that coincide"
        )


def _refuse(agreement: Agreement) -> None:
    a = agreement
    forces_agree = a.force_error <= a.tolerance * a.force_scale
    energies_agree = a.energy_error <= a.tolerance * a.energy_scale
    if forces_agree and energies_agree:
        return
    raise AgreementError(
        f"the path {a.path!r} ({a.dtype}) does not reproduce the plain float64 evaluation of {a.n_atoms} "
        f"atoms: forces differ by {a.force_error:.3g} eV/Å (allowed {a.tolerance * a.force_scale:.3g}), "
        f"energies by {a.energy_error:.3g} eV (allowed {a.tolerance * a.energy_scale:.3g}); use "
        "dtype='float64' or compile=False"
    )
