"""The ways to evaluate a potential: a list of pairs for any structure, all pairs for a small molecule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffpretrain.errors import NonFiniteError, UnsupportedInputError
from ffpretrain.graphs import Graph
from ffpretrain.md.verlet import VerletList
from ffpretrain.pairs import DensePairs, PairRows
from ffpretrain.potential import Potential

Array = NDArray[np.float64]
#: positions ``[N, 3]`` to atomic energies ``[N]`` eV and forces ``[N, 3]`` eV/Å, both float64; N counts the
#: atoms of one molecule or of several equal ones
DenseFunction = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Largest molecules for which every pair is kept. On a CPU, eager, all pairs and a list of pairs take about
#: the same time up to 24 atoms and all pairs lose beyond; for a compiler, which needs fixed shapes, they stay
#: worth it for longer.
DENSE_ATOMS_EAGER_CPU = 24
DENSE_ATOMS = 64


class Evaluation(NamedTuple):
    """What a potential says of one structure, as float64.

    Attributes:
        energy: eV; None for a model that has none.
        energies: atomic energies ``[N]`` eV, or None.
        forces: ``[N, 3]`` eV/Å; None for a model that has none.
        stress: ``[3, 3]`` eV/Å³, positive under tension; None where the structure is not periodic.
        shortest: Å, distance of the two closest atoms; infinite where none are within reach.
    """

    energy: float | None
    energies: Array | None
    forces: Array | None
    stress: Array | None
    shortest: float


class Path(Protocol):
    """One way to evaluate one kind of structure (its elements and periodic directions)."""

    name: str

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """Evaluate positions ``[N, 3]`` Å in a cell ``[3, 3]`` Å."""
        ...


class EdgePath:
    """Any structure and any model: a list of pairs, kept while atoms move little.

    Args:
        model: called with a :class:`~ffpretrain.graphs.Graph`; has a ``cutoff`` in Å.
        numbers: atomic numbers ``[N]``.
        pbc: which directions repeat.
        device: where the model is.
    """

    name = "edges"

    def __init__(
        self, model: nn.Module, numbers: NDArray[np.int64], pbc: tuple[bool, bool, bool], device: torch.device
    ) -> None:
        self.model, self.pbc, self.device = model, pbc, device
        self.z = torch.as_tensor(numbers, dtype=torch.int64, device=device)
        self.batch = torch.zeros_like(self.z)
        self.list = VerletList(float(model.cutoff))  # type: ignore[arg-type]

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`Path`."""
        pos = torch.tensor(positions, dtype=torch.float64, device=self.device)
        box = None if cell is None else torch.tensor(cell, dtype=torch.float64, device=self.device)
        index, shift, shortest = self.list.pairs(pos, box, self.pbc)
        lattice = box if box is not None and any(self.pbc) else pos.new_zeros(3, 3)
        graph = Graph(self.z, pos, index, shift, self.batch, lattice.unsqueeze(0), 1)
        return evaluation(self.model(graph), shortest, periodic=has_volume(cell, self.pbc))


class DensePath:
    """A molecule in vacuum with all its pairs: shapes never change and there is no list to build.

    Args:
        potential: its backbone must be smooth at the cutoff.
        numbers: atomic numbers ``[N]``.
        device: where the potential is.
        function: computes what :func:`dense_function` does, faster; None takes that function itself.
    """

    name = "dense"

    def __init__(
        self,
        potential: Potential,
        numbers: NDArray[np.int64],
        device: torch.device,
        function: DenseFunction | None = None,
    ) -> None:
        self.device, self.shift = device, potential.shift
        z = torch.as_tensor(numbers, dtype=torch.int64, device=device)
        if function is not None:
            self.name = "dense compiled"
        self.function = function or dense_function(potential, z)

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`Path`."""
        pos = torch.tensor(positions, dtype=torch.float64, device=self.device)
        shortest = float(torch.pdist(pos).min()) if len(pos) > 1 else float("inf")
        energies, forces = self.function(pos)
        out = {"energy": energies.sum() + self.shift, "energies": energies, "forces": forces}
        return evaluation(out, shortest, periodic=False)


def dense_function(potential: Potential, z: Tensor, molecules: int = 1, once: bool = False) -> DenseFunction:
    """Return the function of the positions alone that a molecule with atomic numbers ``z [N]`` is.

    The sum over atoms is left to the caller, so that a compiler cannot reorder it.

    Args:
        potential: its backbone must be smooth at the cutoff.
        z: atomic numbers ``[N]``, of all molecules.
        molecules: how many equal molecules the atoms are, one after another.
        once: make functions of the distance once for both directions of a pair, which pays where the result
            is compiled (:class:`~ffpretrain.pairs.DensePairs`).
    """
    rows = PairRows.of(len(z) // molecules, z.device) if once else None

    def function(pos: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            pos = pos.detach().requires_grad_(True)
            features = potential.backbone.encode(z, DensePairs(pos, molecules, potential.dtype, rows))
            energies = potential.atomic_energies(features, z)
            (gradient,) = torch.autograd.grad(energies.sum(), pos)
        return energies.detach(), -gradient

    return function


def dense_fits(
    model: nn.Module, n_atoms: int, pbc: tuple[bool, ...], device: torch.device, compiled: bool
) -> bool:
    """Return whether all pairs give the same result and are not slower."""
    if not isinstance(model, Potential) or not model.backbone.smooth or any(pbc):
        return False
    eager_on_cpu = device.type == "cpu" and not compiled
    return n_atoms <= (DENSE_ATOMS_EAGER_CPU if eager_on_cpu else DENSE_ATOMS)


def has_volume(cell: Array | None, pbc: tuple[bool, ...]) -> bool:
    """Return whether a stress exists: something repeats and the three cell vectors span a volume."""
    return cell is not None and any(pbc) and abs(float(np.linalg.det(cell))) > 1e-6


def evaluation(out: dict[str, Any], shortest: float, periodic: bool) -> Evaluation:
    """Return a model's output for one structure as numpy arrays."""
    arrays = {key: value.detach().to("cpu", torch.float64).numpy() for key, value in out.items()}
    stress = arrays.get("stress")
    return Evaluation(
        energy=float(arrays["energy"].reshape(-1)[0]) if "energy" in arrays else None,
        energies=arrays.get("energies"),
        forces=arrays.get("forces"),
        stress=stress.reshape(3, 3) if stress is not None and periodic else None,
        shortest=shortest,
    )


def refuse_non_finite(result: Evaluation, where: str = "") -> None:
    """Refuse an evaluation that holds NaN or infinity.

    Raises:
        NonFiniteError: names the first atom whose force is not finite.
    """
    if result.forces is not None and not np.isfinite(result.forces).all():
        atom = int(np.flatnonzero(~np.isfinite(result.forces).all(axis=1))[0])
        raise NonFiniteError(
            f"{where}the force on atom {atom} is not finite; look for atoms on top of each other or a step "
            "that is too long"
        )
    if result.energy is not None and not np.isfinite(result.energy):
        raise NonFiniteError(f"{where}the energy is not finite; look for atoms on top of each other")


def refuse_shapes(numbers: NDArray[np.int64], positions: Array, cell: Array | None) -> None:
    """Refuse arrays that do not make a structure together; one without atoms is left to others.

    Raises:
        UnsupportedInputError: their shapes are not ``[N]``, ``[N, 3]`` and ``[3, 3]``.
    """
    if numbers.ndim != 1 or (len(numbers) and positions.shape != (len(numbers), 3)):
        raise UnsupportedInputError(
            f"atomic numbers of shape {numbers.shape} and positions of shape {positions.shape} do not belong "
            "together; give [N] and [N, 3]"
        )
    if cell is not None and cell.shape != (3, 3):
        raise UnsupportedInputError(f"the cell has shape {cell.shape}; give three vectors in rows, [3, 3]")
