"""i-PI: a trained potential as its driver; the beads of a path integral are evaluated as one batch.

i-PI reads this file by its path, from ``<ffdirect>`` in its input or in the process of a socket client::

    <ffdirect name='ff'>
      <pes>custom</pes>
      <pes_path> … </pes_path>        (python -c "import ffpretrain.md.ipi_driver as d; print(d.__file__)")
      <batch_size> 8 </batch_size>
      <parameters>{model: ndem-ethanol}</parameters>
    </ffdirect>

    i-pi-py_driver -m custom -P PATH -o model=ndem-ethanol -u -a ADDRESS
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.artifacts import read_card
from ffpretrain.datasets.structures import read_structure
from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError, nearest
from ffpretrain.md.batch_model import BatchModel
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.unfamiliar import Policy

try:
    from ipi.pes.dummy import Dummy_driver
except ImportError as error:
    raise MissingDependencyError(
        f'i-PI cannot be imported ({error}); pip install "ffpretrain[ipi]"'
    ) from error

#: what i-PI looks for in this file
__DRIVER_NAME__ = "ffpretrain"
__DRIVER_CLASS__ = "FFDriver"

Array = NDArray[np.float64]
#: energy, forces ``[N, 3]``, virial ``[3, 3]`` and text that goes with them, in atomic units
Answer = tuple[float, Array, Array, str]
_OPTIONS = ("model", "template", "periodic", "device", "dtype", "compile", "on_unfamiliar")


class FFDriver(Dummy_driver):
    """What i-PI calls: cell and positions in Bohr in, energy, forces and virial in Hartree and Bohr out.

    Args:
        model: a name of :func:`ffpretrain.list_models` or a model file.
        template: structure file that gives the elements, in i-PI's order of atoms; None for the model's own
            reference geometry. Its positions are not read.
        periodic: the structure repeats in i-PI's cell. Without it the virial is zero.
        device: ``auto`` (CUDA where there is one) or a device torch knows.
        dtype: ``float32`` or ``float64``, of the network.
        compile: False evaluates with torch alone; else natively where the machine and the model allow it.
        on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.
        verbosity: i-PI's, not used.
        verbose: i-PI's, not used.
        **unknown: any other parameter is refused.

    Raises:
        ArtifactError: no such model, or a damaged one.
        DataError: the template cannot be read, or is needed.
        ConfigError: an unknown parameter, or a device that is absent.
        UnsupportedInputError: an element or composition the model was not trained on.
    """

    def __init__(
        self,
        model: str,
        template: str | None = None,
        periodic: bool | str = False,
        device: str = "auto",
        dtype: str = "float32",
        compile: CompileOption = "auto",
        on_unfamiliar: Policy = "warn",
        verbosity: Any = None,
        verbose: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            key = next(iter(unknown))
            raise ConfigError(f"unknown parameter {key!r} of the driver{nearest(key, _OPTIONS)}")
        self.model = BatchModel.load(model, device, dtype, compile, on_unfamiliar)
        self.periodic = _flag("periodic", periodic)
        self.numbers = torch.tensor(_numbers(model, template), dtype=torch.int64)
        self.model.check_composition(self.numbers, torch.zeros_like(self.numbers))
        super().__init__(verbose=verbose)

    def compute(self, cell: Any, pos: Any) -> Answer | list[Answer]:
        """Evaluate one structure, or a list of them as one batch; called by i-PI.

        Args:
            cell: lattice vectors in columns ``[3, 3]`` Bohr, or a list of them.
            pos: positions ``[N, 3]`` Bohr, or a list of them.

        Raises:
            UnsupportedInputError: another number of atoms than the template's, positions that are not finite,
                two atoms at the same place, or a cell without volume.
            NonFiniteError: an energy or force is not finite.
        """
        if not isinstance(pos, list):
            return self._batch([cell], [pos])[0]
        return self._batch(cell, pos)

    def _batch(self, cells: list[Array], positions: list[Array]) -> list[Answer]:
        atoms, count = len(self.numbers), len(positions)
        for one in positions:
            if one.shape != (atoms, 3):
                raise UnsupportedInputError(
                    f"i-PI has positions of shape {one.shape}, the template has {atoms} atoms; give the same "
                    "structure to both"
                )
        rows = np.stack([np.asarray(cell).T for cell in cells]) * units.BOHR
        found = self.model.evaluate(
            self.numbers.repeat(count),
            torch.tensor(np.concatenate(positions) * units.BOHR),
            torch.arange(count).repeat_interleave(atoms),
            torch.tensor(rows),
            torch.full((count,), self.periodic),
        )
        energies = found.energy.cpu().numpy() / units.HARTREE
        forces = found.forces.cpu().numpy().reshape(count, atoms, 3) * (units.BOHR / units.HARTREE)
        virials = np.zeros((count, 3, 3))
        if self.periodic and found.stress is not None:
            volumes = np.abs(np.linalg.det(rows))[:, None, None]
            virials = -volumes * found.stress.cpu().numpy() / units.HARTREE
        return [(float(e), f, v, "") for e, f, v in zip(energies, forces, virials, strict=True)]


def _numbers(model: str, template: str | None) -> NDArray[np.integer]:
    """Return the atomic numbers ``[N]`` of a structure file, or of the model's own molecule."""
    if template is not None:
        return np.asarray(read_structure(template)[0].numbers)
    geometry = read_card(model).reference_geometry
    if geometry is None:
        raise ConfigError("the model has no reference geometry of its own; name a structure file as template")
    return np.asarray(geometry.numbers)


def _flag(name: str, value: bool | str) -> bool:
    """Return a truth value that i-PI may hand over as text."""
    known = {"true": True, "false": False}
    if str(value).strip().lower() not in known:
        raise ConfigError(f"{name} must be True or False, not {value!r}")
    return known[str(value).strip().lower()]
