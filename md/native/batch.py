"""The native counterpart of :class:`~ffpretrain.md.batches.BatchPath`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ffpretrain.errors import UnsupportedInputError
from ffpretrain.md.batches import BatchEvaluation, BatchPath, refuse_bad_positions
from ffpretrain.md.native.many import NativeMany
from ffpretrain.md.native.path import StructurePairs
from ffpretrain.neighbors import neighbor_list


class NativeBatch(BatchPath):
    """A batch of structures evaluated one by one by native code, on as many threads as torch uses.

    Args:
        many: evaluates them.
        model: as for the base class; its weights are those of ``many``.
        numbers: atomic numbers ``[N]``.
        batch: structure of each atom ``[N]``.
        periodic: for each structure ``[B]``, whether it repeats.

    Raises:
        UnsupportedInputError: as the base class.
    """

    name = "batch native"
    checks_positions = True

    def __init__(
        self, many: NativeMany, model: nn.Module, numbers: Tensor, batch: Tensor, periodic: Tensor
    ) -> None:
        super().__init__(model, numbers, batch, periodic)
        z = numbers.numpy()
        self._many = many
        self._repeats: list[bool] = periodic.tolist()
        self._structures = [
            StructurePairs(z[atoms], (repeats,) * 3, self.cutoff)
            for atoms, repeats in zip(self.slices, self._repeats, strict=True)
        ]

    def __call__(self, pos: Tensor, cell: Tensor) -> BatchEvaluation:
        """See :class:`~ffpretrain.md.batches.BatchPath`."""
        xyz, boxes = pos.numpy(), cell.numpy()
        if not np.isfinite(xyz).all():
            refuse_bad_positions(pos, self.batch)
        found = self._many(
            self._structures,
            [xyz[atoms] for atoms in self.slices],
            [box if repeats else None for box, repeats in zip(boxes, self._repeats, strict=True)],
        )
        # numpy takes a quarter of torch's time for arrays this small
        shortest = np.array([one.shortest for one in found])
        if not shortest.all():
            self._refuse_coinciding_atoms(int(shortest.argmin()), pos, cell)
        energy = np.array([one.energy for one in found], dtype=np.float64)
        forces = np.concatenate([one.forces for one in found if one.forces is not None])
        result = BatchEvaluation(
            torch.from_numpy(energy),
            torch.from_numpy(forces),
            None,
            torch.from_numpy(shortest),
            float(shortest.min()),
        )
        if not (np.isfinite(forces).all() and np.isfinite(energy).all()):
            self._refuse_non_finite(result.energy, result.forces)
        if any(self._repeats):
            zero = np.zeros((3, 3))
            stress = np.stack([zero if one.stress is None else one.stress for one in found])
            result = result._replace(stress=torch.from_numpy(stress))
        return result

    def _refuse_coinciding_atoms(self, place: int, pos: Tensor, cell: Tensor) -> None:
        """Name the atoms, which the native code does not: a plain list of pairs does."""
        try:
            repeats = self._repeats[place]
            neighbor_list(pos[self.slices[place]], self.cutoff, cell[place], (repeats,) * 3)
        except UnsupportedInputError as error:
            raise UnsupportedInputError(f"structure {place}: {error}") from error
        raise UnsupportedInputError(f"structure {place}: two atoms are at the same place; move or remove one")
