"""OpenMM: a trained potential as a force of a ``System``, for all of its particles or for some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError
from ffpretrain.md.calculator import Model, load_model
from ffpretrain.md.export import export_torch_force
from ffpretrain.md.openmm_function import ModelFunction, Options, reference_of
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.unfamiliar import Policy, checked_numbers
from ffpretrain.neighbors import refuse_crowded

try:
    import openmm
    from openmm import unit
except ImportError as error:
    raise MissingDependencyError(
        f'OpenMM cannot be imported ({error}): pip install "ffpretrain[openmm]"'
    ) from error

if TYPE_CHECKING:
    from openmm.app import Topology

__all__ = ["add_force", "create_system", "export_torch_force"]

_FORCE_GROUPS = 32


def add_force(
    system: openmm.System,
    model: Model,
    numbers: Sequence[int],
    atoms: Iterable[int] | None = None,
    periodic: bool = False,
    *,
    force_group: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    compile: CompileOption = "auto",
    on_unfamiliar: Policy = "warn",
) -> int:
    """Add a trained potential to a ``System``; forces that are there already stay as they are.

    Args:
        system: changed in place.
        model: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`. OpenMM cannot write or copy a system with the latter.
        numbers: atomic numbers of ``atoms``, or of all particles.
        atoms: particles the potential is for; None for all. Terms of other forces among them are not removed:
            openmm-ml's ``createMixedSystem`` does that.
        periodic: whether they repeat in OpenMM's box; must be set where other forces of the system are
            periodic, for then a molecule may be split over a face of the box.
        force_group: 0 to 31.
        device: ``auto`` (a CUDA device where there is one, else the CPU) or a name torch knows.
        dtype: ``float32`` or ``float64``, of the network; the energy is float64 in both.
        compile: False evaluates with torch alone; else as for :class:`~ffpretrain.FFCalculator`, natively
            where the machine and the model allow it.
        on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.

    Returns:
        The index of the force in the system.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, a device that is absent, or a model without an energy.
        UnsupportedInputError: elements or a composition the model was not trained on, a wrong number of
            atomic numbers, virtual sites or constraints among the atoms, a box without volume or too small
            for the atoms, or no ``periodic`` beside forces that are.
    """
    count = system.getNumParticles()
    particles = list(range(count)) if atoms is None else _checked_atoms(atoms, count)
    if len(numbers) != len(particles):
        whose = "particles in the system" if atoms is None else "atoms"
        raise UnsupportedInputError(
            f"{len(numbers)} atomic numbers for {len(particles)} {whose}; give one for each"
        )
    _refuse_moved_by_others(system, particles)
    if periodic:
        check_box(system.getDefaultPeriodicBoxVectors(), len(numbers))
    elif system.usesPeriodicBoundaryConditions():
        raise UnsupportedInputError(
            "other forces of the system are periodic and this one is not; give periodic=True, which also "
            "puts together a molecule that is split over a face of the box"
        )
    options = Options(device, dtype, compile, on_unfamiliar)
    return system.addForce(
        make_force(model, numbers, None if atoms is None else particles, periodic, force_group, options)
    )


def create_system(
    topology: Topology,
    model: Model,
    *,
    device: str = "auto",
    dtype: str = "float32",
    compile: CompileOption = "auto",
    on_unfamiliar: Policy = "warn",
) -> openmm.System:
    """Return a ``System`` in which a trained potential moves all atoms of a topology.

    It is periodic where the topology has box vectors, has no constraints, and holds a ``CMMotionRemover`` as
    those that OpenMM's force fields create.

    Args:
        topology: of the molecule or material the model is for; its bonds are not read.
        model: as for :func:`add_force`.
        device: as for :func:`add_force`.
        dtype: as for :func:`add_force`.
        compile: as for :func:`add_force`.
        on_unfamiliar: as for :func:`add_force`.

    Raises:
        ArtifactError: as :func:`add_force`.
        ConfigError: as :func:`add_force`.
        UnsupportedInputError: as :func:`add_force`, or an atom without element (a virtual site).
    """
    system = openmm.System()
    numbers = topology_numbers(topology)
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        check_box(box, len(numbers))
        system.setDefaultPeriodicBoxVectors(*box)
    add_force(
        system,
        model,
        numbers,
        periodic=box is not None,
        device=device,
        dtype=dtype,
        compile=compile,
        on_unfamiliar=on_unfamiliar,
    )
    system.addForce(openmm.CMMotionRemover())
    return system


def make_force(
    model: Model,
    numbers: Sequence[int],
    atoms: Sequence[int] | None,
    periodic: bool,
    force_group: int,
    options: Options,
) -> openmm.PythonForce:
    """Return the force of :func:`add_force`, not yet part of a system; what depends on one is not checked.

    Raises:
        ArtifactError: as :func:`add_force`.
        ConfigError: as :func:`add_force`.
        UnsupportedInputError: as :func:`add_force`.
    """
    if not 0 <= force_group < _FORCE_GROUPS:
        raise ConfigError(f"force group {force_group} is not one of 0 to {_FORCE_GROUPS - 1}")
    function = ModelFunction(checked_numbers(numbers), periodic, options, reference_of(model))
    # the model is read here, so that what is wrong with it is said before a simulation starts
    function.use(load_model(model))
    force = openmm.PythonForce(function)
    force.setName("ffpretrain")
    force.setForceGroup(force_group)
    force.setUsesPeriodicBoundaryConditions(periodic)
    if atoms is not None:
        force.setParticles(list(atoms))
    return force


def topology_numbers(topology: Topology, atoms: Iterable[int] | None = None) -> list[int]:
    """Return the atomic numbers of some atoms of a topology, or of all.

    Raises:
        UnsupportedInputError: an index that the topology does not have, or an atom without element.
    """
    every = list(topology.atoms())
    chosen = every if atoms is None else [every[index] for index in _checked_atoms(atoms, len(every))]
    for atom in chosen:
        if atom.element is None:
            raise UnsupportedInputError(
                f"atom {atom.index} ({atom.name} of {atom.residue.name}) has no element: the model is for "
                "atoms, not for virtual sites; leave it out"
            )
    return [atom.element.atomic_number for atom in chosen]


def check_box(vectors: Any, n_atoms: int) -> None:
    """Refuse box vectors, with OpenMM's units, that span no volume or one too small for some atoms.

    Raises:
        UnsupportedInputError: their volume is zero or not finite, or as
            :func:`~ffpretrain.neighbors.refuse_crowded`.
    """
    raw = vectors.value_in_unit(unit.angstrom) if unit.is_quantity(vectors) else vectors
    rows = [v.value_in_unit(unit.angstrom) if unit.is_quantity(v) else v for v in raw]
    cell = np.array(rows, dtype=np.float64)
    volume = abs(float(np.linalg.det(cell)))
    if not 1e-6 < volume < np.inf:
        raise UnsupportedInputError(
            "the periodic box has no volume; set three box vectors that are linearly independent, or none"
        )
    refuse_crowded(cell, (True,) * 3, n_atoms)


def _checked_atoms(atoms: Iterable[int], count: int) -> list[int]:
    """Return indices of particles as integers, each one once and all of them there."""
    raw = np.asarray(list(atoms))
    if raw.size == 0 or not np.issubdtype(raw.dtype, np.integer):
        raise UnsupportedInputError("atoms must be indices of particles, at least one")
    chosen: list[int] = raw.tolist()
    outside = [index for index in chosen if not 0 <= index < count]
    if outside:
        raise UnsupportedInputError(
            f"there is no particle {outside[0]}; the indices run from 0 to {count - 1}"
        )
    if len(set(chosen)) < len(chosen):
        twice = next(index for index in chosen if chosen.count(index) > 1)
        raise UnsupportedInputError(f"particle {twice} is given twice; give each atom once")
    return chosen


def _refuse_moved_by_others(system: openmm.System, particles: list[int]) -> None:
    """Refuse virtual sites and constraints, which would not let the potential's forces act."""
    chosen = set(particles)
    for index in particles:
        if system.isVirtualSite(index):
            raise UnsupportedInputError(
                f"particle {index} is a virtual site; the model is for atoms, leave it out of them"
            )
    for constraint in range(system.getNumConstraints()):
        first, second, _ = system.getConstraintParameters(constraint)
        if first in chosen or second in chosen:
            raise UnsupportedInputError(
                f"particles {first} and {second} are constrained, and the model moves at least one of them; "
                "create the system with constraints=None or call system.removeConstraint"
            )
