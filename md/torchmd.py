"""TorchMD: a trained potential as its ``external`` force, many replicas in one batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffpretrain import units
from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError, nearest
from ffpretrain.md.batch_model import BatchModel
from ffpretrain.md.batches import Unchanged
from ffpretrain.md.calculator import FFCalculator, Model
from ffpretrain.md.engines import Motion, TorchIntegrator
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.unfamiliar import Policy

_OPTIONS = ("dtype", "compile", "on_unfamiliar")


class External:
    """What TorchMD 1.1 calls as ``external``: ``calculate(pos, box)`` in kcal/mol and Å.

    TorchMD makes it from the ``external`` section of its configuration, ``module: ffpretrain.md.torchmd``,
    or it is given to ``torchmd.forces.Forces(parameters, terms=[], external=External(...))``.

    Args:
        name_or_path: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`.
        atomic_numbers: ``[replicas, atoms]``, or ``[atoms]`` for one replica; TorchMD's embeddings.
        device: ``auto``, or where TorchMD has its tensors.
        dtype: ``float32`` or ``float64``, of the network; the energy is float64 in both.
        compile: False evaluates with torch alone; else natively where the machine and the model allow it.
        on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.
        **unknown: anything else in the configuration is refused.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, or a device that is absent.
        UnsupportedInputError: atomic numbers of the wrong shape, or an element or composition the model
            was not trained on.
    """

    def __init__(
        self,
        name_or_path: Model | BatchModel,
        atomic_numbers: Any,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        compile: CompileOption = "auto",
        on_unfamiliar: Policy = "warn",
        **unknown: Any,
    ) -> None:
        if unknown:
            key = next(iter(unknown))
            raise ConfigError(f"unknown option {key!r} of the external force{nearest(key, _OPTIONS)}")
        self.model = BatchModel.load(name_or_path, device, dtype, compile, on_unfamiliar)
        self.device = self.model.runtime.device
        self.numbers = _checked_numbers(atomic_numbers).to(self.device)
        self.replicas, self.atoms = self.numbers.shape
        self._batch = torch.arange(self.replicas, device=self.device).repeat_interleave(self.atoms)
        self._flat_numbers = self.numbers.flatten().clone()
        self.model.check_composition(self._flat_numbers, self._batch)
        self._unchanged = Unchanged()
        self._box: Tensor | None = None
        self._periodic = torch.zeros(self.replicas, dtype=torch.bool)
        self._known_batch = object()

    def calculate(self, pos: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate all replicas as one batch.

        Args:
            pos: ``[replicas, atoms, 3]`` Å. Where it requires a gradient the energy can be differentiated
                once, so that TorchMD's ``explicit_forces=False`` sees this force as well.
            box: lattice vectors ``[replicas, 3, 3]`` Å, all zero for a replica that does not repeat.

        Returns:
            Energy ``[replicas, 1]`` kcal/mol, float64, and forces ``[replicas, atoms, 3]`` kcal/mol/Å in the
            precision of ``pos``, both where ``pos`` is.

        Raises:
            UnsupportedInputError: wrong shapes, positions that are not finite, two atoms at the same place, a
                box without volume, or atoms closer than any in training under ``raise``.
            NonFiniteError: an energy or force is not finite.
        """
        self._check_shapes(pos, box)
        if not self._unchanged(box):
            # boxes seldom change, and looking at one takes as long as all else here: a copy tells a known one
            if not self._known(box):
                self._periodic, self._box = _periodic(box), box.detach().clone()
                self._known_batch = object()
            if self.device.type != "cpu":
                self._unchanged.keep(box)
        # numbers, batch and periodicity belong to this object alone: one look at them is enough
        found = self.model.evaluate(
            self._flat_numbers,
            pos.detach().reshape(-1, 3),
            self._batch,
            box.detach(),
            self._periodic,
            self._known_batch,
        )
        energy = (found.energy / units.KCAL_PER_MOL).to(pos.device).unsqueeze(1)
        forces = (found.forces / units.KCAL_PER_MOL).to(pos.device).view(pos.shape)
        if pos.requires_grad:
            # zero, with the forces as its derivative
            energy = energy - (forces * (pos - pos.detach())).sum(dim=(1, 2)).unsqueeze(1)
        return energy, forces.to(pos.dtype)

    def _known(self, box: Tensor) -> bool:
        known = self._box
        return (
            known is not None
            and (known.dtype, known.device) == (box.dtype, box.device)
            and torch.equal(known, box)
        )

    def _check_shapes(self, pos: Tensor, box: Tensor) -> None:
        wanted = (self.replicas, self.atoms, 3)
        if tuple(pos.shape) != wanted:
            raise UnsupportedInputError(
                f"positions have shape {tuple(pos.shape)}, the atomic numbers call for {wanted}: replicas, "
                "atoms, 3"
            )
        wanted = (self.replicas, 3, 3)
        if tuple(box.shape) != wanted:
            raise UnsupportedInputError(f"the box has shape {tuple(box.shape)}; give {wanted}")


class TorchMDIntegrator(TorchIntegrator):
    """``ffpretrain md --engine torchmd``: velocity Verlet, with TorchMD's Langevin noise between its halves.

    Raises:
        MissingDependencyError: TorchMD is not installed.
    """

    def __init__(self, ensemble: str, calculator: FFCalculator, *others: Any) -> None:
        super().__init__(ensemble, calculator, *others)
        try:
            from torchmd.forces import Forces
            from torchmd.integrator import TIMEFACTOR
            from torchmd.integrator import Integrator as Dynamics
            from torchmd.systems import System
        except ImportError as error:
            raise MissingDependencyError(
                f'TorchMD cannot be imported ({error}); pip install "ffpretrain[torchmd]"'
            ) from error
        atoms, masses = self.atoms, torch.tensor(self.atoms.get_masses(), device=self.device)
        self._system = System(len(atoms), 1, torch.float64, self.device)
        self._system.set_masses(masses)
        if any(atoms.pbc):
            self._system.box[0] = torch.tensor(atoms.cell.array, device=self.device)
        external = External(self.model, atoms.numbers, self.device)
        parameters = SimpleNamespace(masses=masses, nonbonded_params=None)
        self._forces = Forces(parameters, terms=[], external=external)
        # TorchMD's unit of velocity is one Å in so many fs
        self._velocity = units.FS * TIMEFACTOR
        kelvin, rate = (
            (self.temperature, 1000.0 * self.friction_per_fs) if self.thermostatted else (None, None)
        )
        self._dynamics = Dynamics(
            self._system, self._forces, self.timestep / units.FS, self.device, gamma=rate, T=kelvin
        )

    def load(self) -> Motion:
        """See :class:`~ffpretrain.md.engines.EngineIntegrator`."""
        velocities = torch.tensor(self.atoms.get_velocities() * self._velocity, device=self.device)
        return self.set_raw(torch.tensor(self.atoms.positions, device=self.device), velocities)

    def raw(self) -> tuple[Tensor, Tensor]:
        """See :class:`~ffpretrain.md.engines.TorchIntegrator`."""
        return self._system.pos[0], self._system.vel[0]

    def set_raw(self, positions: Tensor, velocities: Tensor) -> Motion:
        """See :class:`~ffpretrain.md.engines.TorchIntegrator`."""
        system = self._system
        system.pos[0], system.vel[0] = positions, velocities
        self._forces.compute(system.pos, system.box, system.forces)
        return self._motion()

    def advance(self) -> Motion:
        """See :class:`~ffpretrain.md.engines.EngineIntegrator`."""
        with self.own_noise():
            self._dynamics.step(niter=1)
        return self._motion()

    def _motion(self) -> Motion:
        positions, velocities = (tensor.cpu().numpy().copy() for tensor in self.raw())
        return self.motion(positions, velocities / self._velocity * self.atoms.get_masses()[:, None])


def _checked_numbers(atomic_numbers: Any) -> Tensor:
    """Return atomic numbers as int64 ``[replicas, atoms]``."""
    raw = np.asarray(atomic_numbers.cpu() if isinstance(atomic_numbers, Tensor) else atomic_numbers)
    if raw.ndim == 1:
        raw = raw[None]
    if raw.ndim != 2 or raw.size == 0:
        raise UnsupportedInputError(
            f"the atomic numbers have shape {raw.shape}; give one row of them for each replica"
        )
    if not np.issubdtype(raw.dtype, np.integer):
        raise UnsupportedInputError(f"the atomic numbers are of type {raw.dtype}; give whole numbers")
    return torch.tensor(raw, dtype=torch.int64)


def _periodic(box: Tensor) -> Tensor:
    """Return for each replica whether it repeats, ``[replicas]``.

    Raises:
        UnsupportedInputError: a box that is neither zero nor spans a volume.
    """
    if not bool(torch.isfinite(box).all()):
        raise UnsupportedInputError("the box is not finite; give lengths in Å, or zeros for a vacuum")
    periodic = (box != 0).flatten(1).any(1)
    flat = periodic & (torch.linalg.det(box.to(torch.float64)).abs() < 1e-6)
    if bool(flat.any()):
        raise UnsupportedInputError(
            f"the box of replica {int(flat.nonzero()[0])} has no volume; give three lengths in Å, or "
            "zeros for a vacuum"
        )
    return periodic
