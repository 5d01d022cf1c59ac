"""A potential as a TorchScript file: the energy of fixed atoms, as OpenMM-Torch's ``TorchForce`` calls it."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffpretrain import units
from ffpretrain._version import __version__
from ffpretrain.artifacts.files import write_file
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph
from ffpretrain.md.agreement import Agreement, check_agreement
from ffpretrain.md.calculator import Model, load_model
from ffpretrain.md.openmm_function import reference_of
from ffpretrain.md.paths import DENSE_ATOMS, Array, Evaluation
from ffpretrain.md.unfamiliar import checked_numbers, require_molecule
from ffpretrain.pairs import DensePairs
from ffpretrain.potential import Potential

#: every pair of atoms is looked at in each call, so memory grows as the square of their number
MOST_ATOMS = 500
#: Å, between atoms of a molecule without a geometry
_SPACING = 1.5
_ANGSTROM_PER_NM = units.LENGTH_UNITS["nm"]
_CPU = torch.device("cpu")


class TorchForceFile(NamedTuple):
    """What was written.

    Attributes:
        path: of the file.
        numbers: atomic numbers ``[N]`` of the particles it is for, in their order.
        agreement: differences from the plain evaluation, without and with a box.
    """

    path: Path
    numbers: list[int]
    agreement: list[Agreement]


def export_torch_force(
    model: Model, path: str | os.PathLike[str], numbers: Sequence[int] | None = None
) -> TorchForceFile:
    """Write the TorchScript module that OpenMM-Torch's ``TorchForce`` takes.

    It is called with positions ``[N, 3]`` in nm and, by a ``TorchForce`` that is periodic, with box vectors
    ``[3, 3]`` in nm, and returns the energy in kJ/mol, a float64 scalar that ``TorchForce`` differentiates.
    All of it is computed in float64 whatever the type of the positions. The atoms are fixed; their periodic
    images are those of the minimum image convention, so a box narrower than twice the cutoff is an error.
    What the file holds is compared with the plain evaluation before it is written.

    Args:
        model: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`.
        path: of the new file; one that is there is replaced.
        numbers: atomic numbers of the particles in OpenMM's order; None takes the molecule in the model's
            card.

    Raises:
        ArtifactError: no such model, or the file cannot be written.
        ConfigError: no ``numbers`` and no molecule in the card, a model without an energy, or a network that
            is bound to one device.
        UnsupportedInputError: an element or a composition the model was not trained on, or too many atoms.
        AgreementError: the module gives other numbers than the plain evaluation.
    """
    potential = _potential(model)
    z, positions = _molecule(potential, numbers)
    content = _module_bytes(potential, z, positions, _origin(model, potential, z))
    loaded = _load(content)
    box, spread = _full_box(positions, potential.cutoff)
    agreement = []
    for name, cell, pos in (("torch-force", None, positions), ("torch-force periodic", box, spread)):
        way, pbc = _ModulePath(loaded, name), (cell is not None,) * 3
        agreement.append(check_agreement(way, potential, z, pos, cell, pbc, torch.float64, _CPU))
    target = Path(path)
    write_file(target, content)
    return TorchForceFile(target, z.tolist(), agreement)


class _Molecule(nn.Module):
    """Energy in kJ/mol of positions in nm: every pair of a small molecule, else a list of pairs."""

    z: Tensor

    def __init__(self, potential: Potential, z: Tensor) -> None:
        super().__init__()
        self.potential = potential
        self.register_buffer("z", z)

    def forward(self, positions: Tensor) -> Tensor:
        """Evaluate positions ``[N, 3]`` nm."""
        potential = self.potential
        pos = positions.to(torch.float64) * _ANGSTROM_PER_NM
        if potential.backbone.smooth and len(self.z) <= DENSE_ATOMS:
            features = potential.backbone.encode(self.z, DensePairs(pos, 1, potential.dtype))
        else:
            features = potential.backbone(_listed(self.z, pos, None, potential.cutoff))
        return _total(potential.atomic_energies(features, self.z), potential)


class _InBox(_Molecule):
    """The same for atoms that repeat in a box."""

    def forward(self, positions: Tensor, box: Tensor) -> Tensor:  # type: ignore[override]
        """Evaluate positions ``[N, 3]`` nm in OpenMM's reduced box vectors ``[3, 3]`` nm."""
        potential = self.potential
        pos = positions.to(torch.float64) * _ANGSTROM_PER_NM
        cell = box.to(torch.float64) * _ANGSTROM_PER_NM
        features = potential.backbone(_listed(self.z, pos, cell, potential.cutoff))
        return _total(potential.atomic_energies(features, self.z), potential)


class _Module(nn.Module):
    """What ``TorchForce`` calls; compiled from its source, so that it may branch and raise."""

    def __init__(self, vacuum: nn.Module, periodic: nn.Module, n_atoms: int, narrowest: float) -> None:
        super().__init__()
        self.vacuum, self.periodic = vacuum, periodic
        self.n_atoms, self.narrowest = n_atoms, narrowest

    def forward(self, positions: Tensor, boxvectors: Tensor | None = None) -> Tensor:
        """Return the energy in kJ/mol of positions ``[N, 3]`` nm, in a box ``[3, 3]`` nm or in none."""
        if positions.size(0) != self.n_atoms:
            raise ValueError(
                f"this ffpretrain file is for {self.n_atoms} atoms and the System has {positions.size(0)} "
                "particles; export it for the atoms of the System"
            )
        if boxvectors is None:
            return self.vacuum(positions)
        width = float(boxvectors.diagonal().min())
        if width < self.narrowest:
            raise ValueError(
                f"the box is {width} nm wide; this ffpretrain file needs {self.narrowest} nm, twice the "
                "model's cutoff"
            )
        return self.periodic(positions, boxvectors)


def _listed(z: Tensor, pos: Tensor, cell: Tensor | None, cutoff: float) -> Graph:
    """Return the graph of the nearest images, found among all pairs with operations that can be traced."""
    fixed = pos.detach()
    vector = fixed.unsqueeze(0) - fixed.unsqueeze(1)
    shift = torch.zeros_like(vector)
    if cell is not None:
        # OpenMM's box vectors are reduced: c is the only one with a z component, a has only an x component
        for axis in (2, 1, 0):
            times = torch.round((vector + shift)[..., axis] / cell[axis, axis])
            shift = shift - times.unsqueeze(-1) * cell[axis].detach()
    near = (vector + shift).square().sum(-1) < cutoff * cutoff
    near = near & ~torch.eye(pos.shape[0], dtype=torch.bool, device=pos.device)
    pairs = near.nonzero()
    center, neighbor = pairs[:, 0], pairs[:, 1]
    cell_unread = pos.new_zeros(1, 3, 3)
    edges = torch.stack([neighbor, center])
    return Graph(z, pos, edges, shift[center, neighbor], torch.zeros_like(z), cell_unread, 1)


def _total(energies: Tensor, potential: Potential) -> Tensor:
    return (energies.sum() + potential.shift) / units.KJ_PER_MOL


def _module_bytes(
    potential: Potential, numbers: NDArray[np.int64], positions: Array, origin: dict[str, Any]
) -> bytes:
    """Return the TorchScript file."""
    z = torch.as_tensor(numbers)
    pos = torch.tensor(positions / _ANGSTROM_PER_NM, dtype=torch.float32)
    box = torch.eye(3) * (3 * potential.cutoff / _ANGSTROM_PER_NM)
    with warnings.catch_warnings():
        # the tracer speaks of sizes it takes as fixed, which they are; torch.jit of its own deprecation
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.simplefilter("ignore", DeprecationWarning)
        vacuum = _traced(_Molecule(potential, z), (pos,))
        periodic = _traced(_InBox(potential, z), (pos, box))
        narrowest = 2.0 * potential.cutoff / _ANGSTROM_PER_NM
        module = torch.jit.script(_Module(vacuum, periodic, len(numbers), narrowest).eval())
        buffer = io.BytesIO()
        torch.jit.save(module, buffer, _extra_files={"ffpretrain.json": json.dumps(origin)})
    return buffer.getvalue()


def _traced(module: nn.Module, example: tuple[Tensor, ...]) -> torch.jit.ScriptModule:
    """Trace a module so that it runs on the device of its first argument.

    The tracer writes the device of every tensor that is made on the way into the code as a constant.
    """
    traced = torch.jit.trace(module.eval(), example, check_trace=False)
    torch._C._jit_pass_inline(traced.graph)
    graph = traced.graph
    here = graph.create("prim::device", [list(graph.inputs())[1]])
    here.output().setType(torch._C.DeviceObjType.get())
    for constant in graph.findAllNodes("prim::Constant"):
        if constant.output().type().kind() == "DeviceObjType":
            constant.output().replaceAllUsesWith(here.output())
    graph.prependNode(here)
    return traced


class _ModulePath:
    """A loaded file as a path of the agreement gate, called as ``TorchForce`` calls it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`~ffpretrain.md.paths.Path`."""
        pos = torch.tensor(positions / _ANGSTROM_PER_NM).requires_grad_(True)
        boxes = () if cell is None else (torch.tensor(cell / _ANGSTROM_PER_NM),)
        energy = self.module(pos, *boxes)
        (gradient,) = torch.autograd.grad(energy, pos)
        forces = -gradient.numpy() * (units.KJ_PER_MOL / _ANGSTROM_PER_NM)
        return Evaluation(float(energy.detach()) * units.KJ_PER_MOL, None, forces, None, float("inf"))


def _load(content: bytes) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(content), map_location=_CPU)


def _potential(model: Model) -> Potential:
    """Return a float64 copy on the CPU.

    Raises:
        ConfigError: the model has no energy, or is not a :class:`~ffpretrain.potential.Potential`.
    """
    given = load_model(model)
    if not isinstance(given, Potential):
        raise ConfigError(
            f"only a Potential can be written for TorchForce, not {type(given).__name__}; add_force takes "
            "any model that has an energy"
        )
    return copy.deepcopy(given).to(_CPU, torch.float64).eval().requires_grad_(False)


def _molecule(potential: Potential, numbers: Sequence[int] | None) -> tuple[NDArray[np.int64], Array]:
    """Return atomic numbers ``[N]`` and positions ``[N, 3]`` Å to compare at.

    The geometry is the card's where the atoms are the same, else atoms on a lattice: agreement is a matter of
    arithmetic, any geometry in which they do not coincide shows it.
    """
    card = potential.card
    reference = None if card is None else card.reference_geometry
    if numbers is None:
        if reference is None:
            raise ConfigError("the model's card names no molecule; give the atomic numbers of the particles")
        numbers = reference.numbers
    z = checked_numbers(numbers)
    if len(z) > MOST_ATOMS:
        raise UnsupportedInputError(
            f"{len(z)} atoms are too many for a TorchForce file, which looks at all pairs (at most "
            f"{MOST_ATOMS}); use ffpretrain.md.openmm.add_force"
        )
    require_molecule(potential, z)
    if reference is not None and reference.numbers == z.tolist():
        return z, np.array(reference.positions, dtype=np.float64)
    side = math.ceil(len(z) ** (1 / 3))
    lattice = np.stack(np.unravel_index(np.arange(len(z)), (side,) * 3), axis=1) * _SPACING
    return z, lattice + np.random.default_rng(0).uniform(-0.1, 0.1, lattice.shape)


def _full_box(positions: Array, cutoff: float) -> tuple[Array, Array]:
    """Return reduced box vectors ``[3, 3]`` Å and the positions drawn out to fill them.

    Atoms at opposite faces then see each other's images, which the comparison is to show.
    """
    extent = float(np.ptp(positions, axis=0).max())
    width = max(2.02 * cutoff, extent + _SPACING)
    drawn = positions * ((width - _SPACING) / extent) if extent > 0 else positions
    return width * np.array([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [-0.3, 0.1, 1.0]]), drawn


def _origin(model: Model, potential: Potential, numbers: NDArray[np.int64]) -> dict[str, Any]:
    """Return what the file says of itself, as ``ffpretrain.json`` inside it."""
    card = potential.card
    reference = reference_of(model)
    return {
        "schema": "ffpretrain-torch-force",
        "version": 1,
        "package_version": __version__,
        "model": None if card is None else card.name,
        "sha256": None if reference is None else reference.sha256,
        "numbers": numbers.tolist(),
        "level_of_theory": None if card is None else card.level_of_theory,
        "energy_zero": None if card is None else card.energy_zero,
        "units": {"positions": "nm", "boxvectors": "nm", "energy": "kJ/mol"},
    }
