"""TorchMD: a trained potential as its ``external`` force, many replicas in one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffpretrain import units
from ffpretrain.errors import ConfigError, UnsupportedInputError, nearest
from ffpretrain.md.batch_model import BatchModel
from ffpretrain.md.calculator import Model
from ffpretrain.md.unfamiliar import Policy

_OPTIONS = ("dtype", "on_unfamiliar")


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
        on_unfamiliar: ``warn``, ``raise`` or ``ignore``; see :class:`~ffpretrain.FFCalculator`.
        **unknown: anything else in the configuration is refused.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, or a device that is absent.
        UnsupportedInputError: atomic numbers of the wrong shape, or an element the model never saw.
    """

    def __init__(
        self,
        name_or_path: Model,
        atomic_numbers: Any,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        on_unfamiliar: Policy = "warn",
        **unknown: Any,
    ) -> None:
        if unknown:
            key = next(iter(unknown))
            raise ConfigError(f"unknown option {key!r} of the external force{nearest(key, _OPTIONS)}")
        self.model = BatchModel(name_or_path, device, dtype, on_unfamiliar)
        self.device = self.model.runtime.device
        self.numbers = _checked_numbers(atomic_numbers).to(self.device)
        self.replicas, self.atoms = self.numbers.shape
        check = getattr(self.model.runtime.model, "check_elements", None)
        if check is not None:
            check(self.numbers.flatten())
        self._batch = torch.arange(self.replicas, device=self.device).repeat_interleave(self.atoms)

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
                box without volume, or unfamiliar input under ``raise``.
            NonFiniteError: an energy or force is not finite.
        """
        self._check_shapes(pos, box)
        periodic = _periodic(box)
        found = self.model.evaluate(
            self.numbers.flatten(), pos.detach().reshape(-1, 3), self._batch, box.detach(), periodic
        )
        energy = (found.energy / units.KCAL_PER_MOL).to(pos.device).unsqueeze(1)
        forces = (found.forces / units.KCAL_PER_MOL).to(pos.device).view(pos.shape)
        if pos.requires_grad:
            # zero, with the forces as its derivative
            energy = energy - (forces * (pos - pos.detach())).sum(dim=(1, 2)).unsqueeze(1)
        return energy, forces.to(pos.dtype)

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
