"""torch-sim: a trained potential as its model, so that one batch moves hundreds of structures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain import units
from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError
from ffpretrain.md.batch_model import BatchModel
from ffpretrain.md.calculator import FFCalculator, Model
from ffpretrain.md.engines import Motion, TorchIntegrator
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.unfamiliar import Policy

try:
    from torch_sim.integrators import nve, nvt_langevin
    from torch_sim.integrators.md import MDState
    from torch_sim.io import atoms_to_state
    from torch_sim.models.interface import ModelInterface
    from torch_sim.state import SimState
except ImportError as error:
    raise MissingDependencyError(
        f'torch-sim cannot be imported ({error}); pip install "ffpretrain[torch-sim]"'
    ) from error

if TYPE_CHECKING:
    from torch_sim.typing import MemoryScaling

_SCALINGS = ("n_atoms", "n_atoms_x_density")


class FFModel(ModelInterface):
    """What torch-sim 0.3 calls as its model: energies, forces and stress of a batch of structures.

    States are best made in float64 (``model.dtype``), whatever the precision of the network: an energy of
    -17,600 eV has no digits left for dynamics in float32. Energies are float64 always, forces and stress have
    the precision of the state's positions. A state knows no total charge or multiplicity, so nothing can say
    that a structure has another than those the model learned.

    Args:
        model: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`.
        device: ``auto`` (CUDA where there is one) or a device torch knows.
        dtype: ``float32`` or ``float64``, of the network.
        compile: False evaluates with torch alone; else natively where the machine and the model allow it.
        compute_stress: give a stress as well; zero for a structure that does not repeat.
        on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.
        memory_scales_with: how torch-sim's automatic batching estimates memory. ``n_atoms_x_density`` needs
            cells with a volume and suits periodic structures of different density.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, or a device that is absent.
    """

    def __init__(
        self,
        model: Model | BatchModel,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        *,
        compile: CompileOption = "auto",
        compute_stress: bool = True,
        on_unfamiliar: Policy = "warn",
        memory_scales_with: MemoryScaling = "n_atoms",
    ) -> None:
        super().__init__()
        if memory_scales_with not in _SCALINGS:
            known = " or ".join(_SCALINGS)
            raise ConfigError(f"memory_scales_with={memory_scales_with!r} is not {known}")
        precision = str(dtype).removeprefix("torch.")
        self.batch_model = BatchModel.load(model, device, precision, compile, on_unfamiliar)
        self._device = self.batch_model.runtime.device
        self._dtype = torch.float64
        self._compute_stress = compute_stress
        self._compute_forces = True
        self._memory_scales_with = memory_scales_with
        self._asked: tuple[list[bool], int, torch.device] | None = None
        self._periodic: Tensor | None = None

    @property
    def compute_stress(self) -> bool:
        """Whether a stress is given."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, wanted: bool) -> None:
        self._compute_stress = wanted

    @property
    def compute_forces(self) -> bool:
        """Whether forces are given; they are computed in any case."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, wanted: bool) -> None:
        self._compute_forces = wanted

    def forward(self, state: SimState | dict[str, Any], **_: Any) -> dict[str, Tensor]:
        """Evaluate a state; it is not changed.

        Args:
            state: positions ``[N, 3]`` Å, cells as columns ``[B, 3, 3]`` Å (torch-sim's convention), atomic
                numbers ``[N]`` and the structure of each atom ``[N]``, or a dictionary of the same.

        Returns:
            ``energy [B]`` eV, ``forces [N, 3]`` eV/Å and ``stress [B, 3, 3]`` eV/Å³, positive under tension.

        Raises:
            UnsupportedInputError: an element or composition the model was not trained on, a position that is
                not finite, two atoms at the same place, a cell without volume, directions of which only some
                repeat, or atoms of a structure that do not stand together.
            NonFiniteError: an energy or force is not finite.
        """
        if not isinstance(state, SimState):
            state = SimState(**state)
        cell = state.row_vector_cell.detach()
        # the same tensor as long as nothing changes, so that it need not be compared on the device
        asked = (torch.as_tensor(state.pbc).flatten().tolist(), len(cell), cell.device)
        if self._periodic is None or asked != self._asked:
            self._periodic, self._asked = _repeats(*asked), asked
        found = self.batch_model.evaluate(
            state.atomic_numbers, state.positions.detach(), state.system_idx, cell, self._periodic
        )
        dtype, device = state.positions.dtype, state.positions.device
        out = {"energy": found.energy.to(device)}
        if self._compute_forces:
            out["forces"] = found.forces.to(device, dtype)
        if self._compute_stress:
            stress = found.stress if found.stress is not None else torch.zeros_like(cell)
            out["stress"] = stress.to(device, dtype)
        return out


class TorchSimIntegrator(TorchIntegrator):
    """``ffpretrain md --engine torch-sim``: velocity Verlet, or torch-sim's BAOAB Langevin integrator."""

    def __init__(self, ensemble: str, calculator: FFCalculator, *others: Any) -> None:
        super().__init__(ensemble, calculator, *others)
        self._interface = FFModel(self.model, compute_stress=False)
        number: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        options = {
            "model": self._interface,
            "dt": torch.tensor(self.timestep, **number),
            "kT": torch.tensor(units.KB * self.temperature, **number),
        }
        if self.thermostatted:
            self._update = nvt_langevin(**options, gamma=torch.tensor(self.rate, **number))[1]
        else:
            self._update = nve(**options)[1]
        self._cell = np.array(self.atoms.cell.array) if all(self.atoms.pbc) else None

    def load(self) -> Motion:
        """See :class:`~ffpretrain.md.engines.EngineIntegrator`."""
        momenta = torch.tensor(self.atoms.get_momenta(), device=self.device)
        return self.set_raw(torch.tensor(self.atoms.positions, device=self.device), momenta)

    def raw(self) -> tuple[Tensor, Tensor]:
        """See :class:`~ffpretrain.md.engines.TorchIntegrator`."""
        return self._state.positions, self._state.momenta

    def set_raw(self, positions: Tensor, velocities: Tensor) -> Motion:
        """See :class:`~ffpretrain.md.engines.TorchIntegrator`."""
        atoms = self.atoms.copy()
        if self._cell is None:
            atoms.cell = np.zeros((3, 3))
        state = atoms_to_state(atoms, self.device, torch.float64)
        state.positions = positions
        fields = ("masses", "cell", "pbc", "system_idx", "atomic_numbers")
        found = self._interface(state)
        self._state = MDState(
            positions=positions,
            momenta=velocities,
            energy=found["energy"],
            forces=found["forces"],
            **{name: getattr(state, name) for name in fields},
        )
        return self._motion(positions.cpu().numpy().copy())

    def advance(self) -> Motion:
        """See :class:`~ffpretrain.md.engines.EngineIntegrator`."""
        before = self._state.positions.cpu().numpy().copy()
        with self.own_noise():
            self._state = self._update(self._state)
        positions = self._state.positions.cpu().numpy().copy()
        if self._cell is not None:
            # torch-sim puts atoms back into the cell; a trajectory does not jump
            moved = positions - before
            moved -= np.rint(moved @ np.linalg.inv(self._cell)) @ self._cell
            positions = self.atoms.positions + moved
        return self._motion(positions)

    def _motion(self, positions: NDArray[np.float64]) -> Motion:
        return self.motion(positions, self._state.momenta.cpu().numpy().copy())


def _repeats(directions: list[bool], n_structures: int, device: torch.device) -> Tensor:
    """Return for each structure whether it repeats; a state has one answer for all its structures."""
    if any(directions) != all(directions):
        raise UnsupportedInputError(
            f"only some directions repeat ({directions}); torch-sim runs need all or none"
        )
    return torch.full((n_structures,), all(directions), device=device)
