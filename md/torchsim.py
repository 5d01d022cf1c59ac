"""torch-sim: a trained potential as its model, so that one batch moves hundreds of structures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError
from ffpretrain.md.batch_model import BatchModel
from ffpretrain.md.calculator import Model
from ffpretrain.md.unfamiliar import Policy

try:
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
        compute_stress: give a stress as well; zero for a structure that does not repeat.
        on_unfamiliar: ``warn``, ``raise`` or ``ignore``; see :class:`~ffpretrain.FFCalculator`.
        memory_scales_with: how torch-sim's automatic batching estimates memory. ``n_atoms_x_density`` needs
            cells with a volume and suits periodic structures of different density.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, or a device that is absent.
    """

    def __init__(
        self,
        model: Model,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        *,
        compute_stress: bool = True,
        on_unfamiliar: Policy = "warn",
        memory_scales_with: MemoryScaling = "n_atoms",
    ) -> None:
        super().__init__()
        if memory_scales_with not in _SCALINGS:
            known = " or ".join(_SCALINGS)
            raise ConfigError(f"memory_scales_with={memory_scales_with!r} is not {known}")
        precision = str(dtype).removeprefix("torch.")
        self.batch_model = BatchModel(model, device, precision, on_unfamiliar)
        self._device = self.batch_model.runtime.device
        self._dtype = torch.float64
        self._compute_stress = compute_stress
        self._compute_forces = True
        self._memory_scales_with = memory_scales_with

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
            UnsupportedInputError: an element the model never saw, a position that is not finite, two atoms at
                the same place, a cell without volume, directions of which only some repeat, atoms of a
                structure that do not stand together, or unfamiliar input under ``raise``.
            NonFiniteError: an energy or force is not finite.
        """
        if not isinstance(state, SimState):
            state = SimState(**state)
        cell = state.row_vector_cell.detach()
        periodic = _repeats(state.pbc, len(cell), cell.device)
        found = self.batch_model.evaluate(
            state.atomic_numbers, state.positions.detach(), state.system_idx, cell, periodic
        )
        dtype, device = state.positions.dtype, state.positions.device
        out = {"energy": found.energy.to(device)}
        if self._compute_forces:
            out["forces"] = found.forces.to(device, dtype)
        if self._compute_stress:
            stress = found.stress if found.stress is not None else torch.zeros_like(cell)
            out["stress"] = stress.to(device, dtype)
        return out


def _repeats(pbc: Any, n_structures: int, device: torch.device) -> Tensor:
    """Return for each structure whether it repeats; a state has one answer for all its structures."""
    directions = torch.as_tensor(pbc).flatten()
    if bool(directions.any()) != bool(directions.all()):
        raise UnsupportedInputError(
            f"only some directions repeat ({directions.tolist()}); torch-sim runs need all or none"
        )
    return torch.full((n_structures,), bool(directions.all()), device=device)
