"""Energies of many geometries: batched for our models, one by one for other calculators; can be resumed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import nn

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md.calculator import FFCalculator
from ffpretrain.md.landscapes.scan_state import load_arrays, save_arrays
from ffpretrain.md.landscapes.surface import Array, Geometries, Landscape
from ffpretrain.md.runtime import Runtime

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import BaseCalculator

#: structures between two looks at the clock
_CHUNK = 64
#: s between two saves of what is done
_SAVE_EVERY = 10.0

Values = tuple[list[float], list[Array] | None]


class Compute(Protocol):
    """Energies of structures in eV, and forces in eV/Å, or None where there are none or none are wanted."""

    def __call__(self, structures: Sequence[Atoms], forces: bool = True) -> Values:
        """Evaluate structures; ``forces=False`` computes energies alone where that is quicker."""
        ...


class Evaluator(NamedTuple):
    """Computes energies and forces of structures.

    Attributes:
        label: of the model, for figures.
        identity: changes whenever the results would.
        compute: see :class:`Compute`.
        expect: told how many structures are to come, so that many of them are worth the seconds in which the
            native code is built; None where nothing is to be built.
        check: warns of a structure that the model was not trained on, once for each cause; None where nothing
            is known of that.
    """

    label: str
    identity: str
    compute: Compute
    expect: Callable[[int], object] | None = None
    check: Callable[[Atoms], object] | None = None

    def energies(self, structures: Sequence[Atoms], progress: Callable[[int], object] | None = None) -> Array:
        """Return energies of many structures in eV; ``progress`` is called with the number done."""
        found: list[float] = []
        for first in range(0, len(structures), _CHUNK):
            found += self.compute(structures[first : first + _CHUNK], forces=False)[0]
            if progress is not None:
                progress(len(found))
        return np.array(found, dtype=np.float64)

    def forces(self, structures: Sequence[Atoms]) -> list[Array]:
        """Return the forces alone, eV/Å.

        Raises:
            ConfigError: the model has none.
        """
        found = self.compute(structures)[1]
        if found is None:
            raise ConfigError(f"{self.label} has no forces, which relaxations and normal modes need")
        return found


def evaluator(model: object, dtype: str = "float32") -> Evaluator:
    """Return what evaluates a model.

    Args:
        model: a name, a file, a potential, an :class:`~ffpretrain.FFCalculator` or any ASE calculator.
        dtype: of the network, where ``model`` is not a calculator already.

    Raises:
        ArtifactError: no such model.
        ConfigError: a model without energies.
    """
    if isinstance(model, str | Path | nn.Module):
        model = FFCalculator(model, dtype=dtype)
    if isinstance(model, FFCalculator) and len(model.runtimes) == 1:
        return _of_runtime(model)
    if hasattr(model, "get_property") or hasattr(model, "get_potential_energy"):
        return _of_calculator(model)  # type: ignore[arg-type]
    raise ConfigError(f"{type(model).__name__} is neither a model nor an ASE calculator")


def _of_runtime(calculator: FFCalculator) -> Evaluator:
    runtime: Runtime = calculator.runtimes[0]
    card, familiarity = calculator.card, calculator.familiarities[0]

    def compute(structures: Sequence[Atoms], forces: bool = True) -> Values:
        found = runtime.evaluate_batch(structures, forces)
        energies = [one.energy for one in found if one.energy is not None]
        if len(energies) != len(found):
            raise ConfigError(
                "the model has no energy, so it has no landscape; fit a head to it (fit_head=, --fit-head)"
            )
        every = [one.forces for one in found if one.forces is not None]
        return energies, every if len(every) == len(found) else None

    def check(atoms: Atoms) -> None:
        familiarity.check_structure(atoms)
        distances = atoms.get_all_distances(mic=bool(atoms.pbc.any()))[np.triu_indices(len(atoms), 1)]
        if len(distances):
            familiarity.check_distance(float(distances.min()), atoms)

    label = card.name if card is not None else "model"
    return Evaluator(label, runtime.fingerprint(), compute, runtime.native_many, check)


def _of_calculator(calculator: BaseCalculator) -> Evaluator:
    from ffpretrain.datasets.sampling import EngineFailure, engine_errors

    name = str(getattr(calculator, "name", "") or type(calculator).__name__)

    def compute(structures: Sequence[Atoms], forces: bool = True) -> Values:
        energies, every = [], []
        for structure in structures:
            copy = structure.copy()
            copy.calc = calculator
            try:
                with engine_errors():
                    energies.append(float(copy.get_potential_energy()))
                    if forces:
                        every.append(np.array(copy.get_forces()))
            except EngineFailure as error:
                raise UnsupportedInputError(
                    f"{name} fails on a structure of the landscape: {error}"
                ) from error
        return energies, every if forces else None

    return Evaluator(name, f"{name} {getattr(calculator, 'parameters', '')}", compute)


def evaluate(
    geometries: Geometries,
    model: Evaluator,
    state: Path | None = None,
    progress: Callable[[int], object] | None = None,
    forces: bool = True,
) -> Landscape:
    """Return the landscape of a model on a grid.

    Args:
        geometries: the grid.
        model: of :func:`evaluator`.
        state: file that keeps what is done, so that a stopped evaluation goes on; removed at the end. One of
            another grid or model is not used.
        progress: called with the number of structures done.
        forces: False computes energies alone, the same ones, in about half of the time.

    Raises:
        UserError: of the model: an unknown element, atoms on top of each other.
    """
    shape, n = geometries.shape, len(geometries.atoms)
    count = int(np.prod(shape))
    key = _key(geometries, model, forces)
    kept = load_arrays(state, key) or {"energies": np.full(count, np.nan)}
    energies, start = kept["energies"], int(np.isfinite(kept["energies"]).sum())
    if model.expect is not None:
        model.expect(count - start)
    # the first structure passes the runtime's gate; the corner of a plane may be far too strained for that
    first_forces = model.compute([geometries.atoms], forces)[1]
    if first_forces is not None:
        kept.setdefault("forces", np.zeros((count, n, 3)))
    saved = time.monotonic()
    for first in range(start, count, _CHUNK):
        some_energies, some_forces = model.compute(geometries.structures(first, first + _CHUNK), forces)
        energies[first : first + len(some_energies)] = some_energies
        if some_forces is not None:
            kept["forces"][first : first + len(some_forces)] = np.array(some_forces)
        if progress is not None:
            progress(first + len(some_energies))
        if state is not None and time.monotonic() - saved > _SAVE_EVERY:
            save_arrays(state, key, **kept)
            saved = time.monotonic()
    if state is not None:
        state.unlink(missing_ok=True)
    shaped = kept["forces"].reshape(*shape, n, 3) if "forces" in kept else None
    return Landscape(geometries, model.label, energies.reshape(shape), shaped)


def _key(geometries: Geometries, model: Evaluator, forces: bool) -> str:
    value = hashlib.sha256(f"{model.identity} {forces}".encode())
    for array in (geometries.atoms.numbers, geometries.positions, geometries.atoms.cell.array):
        value.update(np.ascontiguousarray(array).tobytes())
    return value.hexdigest()
