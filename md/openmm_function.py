"""What OpenMM calls at every step, and what its XML keeps of it: a model's name and checksum, no weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from torch import nn

from ffpretrain import units
from ffpretrain.artifacts import file_sha256
from ffpretrain.errors import ArtifactError, ConfigError
from ffpretrain.md.calculator import Model, load_model
from ffpretrain.md.native.ready import NATIVE_MIN_STEPS
from ffpretrain.md.runtime import CompileOption, Runtime
from ffpretrain.md.unfamiliar import Familiarity, Policy, require_molecule
from ffpretrain.zoo import locate

if TYPE_CHECKING:
    import openmm

_ANGSTROM_PER_NM = units.LENGTH_UNITS["nm"]


class Reference(NamedTuple):
    """What a ``System`` in XML says of its model.

    Attributes:
        model: its name, or the full path of its file.
        sha256: of the file, in hexadecimal.
    """

    model: str
    sha256: str

    def load(self) -> nn.Module:
        """Return the potential.

        Raises:
            ArtifactError: the model is absent or damaged, or its file is another one than it was.
        """
        found = reference_of(self.model)
        if found != self:
            has = "nothing" if found is None else f"SHA-256 {found.sha256[:12]}…"
            raise ArtifactError(
                f"{self.model}: the System was made with a model of SHA-256 {self.sha256[:12]}…, the "
                f"file has {has}; bring that file back or make the System anew"
            )
        return load_model(self.model)


def reference_of(model: Model) -> Reference | None:
    """Return what a ``System`` can say of a model; None for a potential that is not read from a file.

    Raises:
        ArtifactError: no such model, or its file cannot be read.
    """
    if not isinstance(model, str | os.PathLike):
        return None
    path, name = locate(model if isinstance(model, str) else Path(model))
    return Reference(str(path.resolve()) if name is None else name, file_sha256(path))


class Options(NamedTuple):
    """How a model is evaluated and watched; see :func:`ffpretrain.md.openmm.add_force`."""

    device: str = "auto"
    dtype: str = "float32"
    compile: CompileOption = "auto"
    on_unfamiliar: Policy = "warn"


class ModelFunction:
    """What OpenMM calls: a ``State`` in, the energy in kJ/mol and forces ``[N, 3]`` in kJ/mol/nm out.

    OpenMM's XML holds the pickle of this object: a call of :func:`restore_function` with a
    :class:`Reference`. The weights stay where they are and are read again at the first evaluation.

    Args:
        numbers: atomic numbers ``[N]`` of the particles that OpenMM hands over.
        periodic: whether they repeat in OpenMM's box.
        options: how the model is evaluated and watched.
        reference: where the potential is read from; None for one that has no file.
    """

    def __init__(
        self, numbers: NDArray[np.int64], periodic: bool, options: Options, reference: Reference | None
    ) -> None:
        self.numbers, self.periodic, self.options, self.reference = numbers, periodic, options, reference
        self._runtime: Runtime | None = None
        self._familiarity = Familiarity(None, "ignore")

    def use(self, potential: nn.Module) -> Runtime:
        """Evaluate this potential from now on.

        Raises:
            ConfigError: an unknown option, a device that is absent, or a model without an energy.
            UnsupportedInputError: an element or a composition the model was not trained on.
        """
        device, dtype, compile, on_unfamiliar = self.options
        require_molecule(potential, self.numbers)
        self._familiarity = Familiarity(getattr(potential, "card", None), on_unfamiliar)
        self._runtime = Runtime(potential, device, dtype, compile)
        # OpenMM runs long: worth the seconds that the native code takes to build, once per machine
        self._runtime.expected_steps = NATIVE_MIN_STEPS
        return self._runtime

    def __call__(self, state: openmm.State) -> tuple[float, NDArray[np.float64]]:
        """Evaluate a state; an error here ends OpenMM's call with the same message.

        Raises:
            ArtifactError: a restored system's model is absent or another one.
            UnsupportedInputError: as :meth:`ffpretrain.md.Runtime.evaluate`, or atoms closer than any in
                training under ``raise``.
            NonFiniteError: as :meth:`ffpretrain.md.Runtime.evaluate`.
        """
        runtime = self._runtime or self.use(self._restored())
        from openmm.unit import angstrom

        positions = state.getPositions(asNumpy=True).value_in_unit(angstrom)
        cell = None
        if self.periodic:
            cell = state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(angstrom)
        result = runtime.evaluate(self.numbers, positions, cell, (self.periodic,) * 3)
        if result.energy is None or result.forces is None:
            raise ConfigError("the model gives no energy, which OpenMM needs; use a potential")
        closest = self._familiarity.min_distance
        if closest is not None and result.shortest < closest:
            atoms = Atoms(self.numbers, positions, cell=cell, pbc=self.periodic)
            self._familiarity.check_distance(result.shortest, atoms)
        scale = 1.0 / units.KJ_PER_MOL
        return result.energy * scale, result.forces * (scale * _ANGSTROM_PER_NM)

    def _restored(self) -> nn.Module:
        if self.reference is None:
            raise ArtifactError("this copy of the System has lost its potential; make the System anew")
        return self.reference.load()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Return the call that makes this object again.

        Raises:
            ArtifactError: the potential has no file; OpenMM then says that it cannot write the function.
        """
        if self.reference is None:
            raise ArtifactError(
                "the System was made from a Potential, of which no file is known; save it with "
                "save_potential and give add_force the model's name or file"
            )
        numbers = tuple(self.numbers.tolist())
        return restore_function, (*self.reference, numbers, self.periodic, *self.options)


def restore_function(
    model: str,
    sha256: str,
    numbers: tuple[int, ...],
    periodic: bool,
    device: str,
    dtype: str,
    compile: CompileOption = "auto",
    on_unfamiliar: Policy = "warn",
) -> ModelFunction:
    """Make again what a ``System`` in XML refers to; the model is read at the first evaluation.

    Args:
        model: as :class:`Reference`.
        sha256: as :class:`Reference`.
        numbers: as :class:`ModelFunction`.
        periodic: as :class:`ModelFunction`.
        device: as :class:`Options`.
        dtype: as :class:`Options`.
        compile: as :class:`Options`.
        on_unfamiliar: as :class:`Options`.
    """
    options = Options(device, dtype, compile, on_unfamiliar)
    return ModelFunction(np.array(numbers, dtype=np.int64), periodic, options, Reference(model, sha256))
