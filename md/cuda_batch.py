"""The counterpart of :class:`~ffpretrain.md.batches.BatchPath` that is recorded as a CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ffpretrain.md.batches import BatchEvaluation, BatchPath, refuse_bad_positions
from ffpretrain.md.cuda import MoleculeGraph, record_molecules
from ffpretrain.md.paths import dense_fits
from ffpretrain.potential import Potential


class GraphBatch(BatchPath):
    """A batch of equal molecules, evaluated by one replay; one small tensor is read back.

    Args:
        graph: of all molecules, with flags.
        model: as for the base class.
        numbers: atomic numbers ``[N]``.
        batch: structure of each atom ``[N]``.
        periodic: for each structure ``[B]``; none does.
    """

    checks_positions = True

    def __init__(
        self, graph: MoleculeGraph, model: Potential, numbers: Tensor, batch: Tensor, periodic: Tensor
    ) -> None:
        super().__init__(model, numbers, batch, periodic)
        self.graph, self.name, self._shift = graph, f"batch {graph.name}", model.shift

    def __call__(self, pos: Tensor, cell: Tensor) -> BatchEvaluation:
        """See :class:`~ffpretrain.md.batches.BatchPath`; refuses positions that are not finite, too."""
        found = self.graph(pos)
        energy = found.energies.view(self.graph.molecules, -1).sum(1) + self._shift
        nearest, finite = found.flags.tolist()
        if not (nearest > 0 and finite):
            refuse_bad_positions(pos, self.batch)
            self._refuse_coinciding(found.shortest)
            self._refuse_non_finite(energy, found.forces)
        return BatchEvaluation(energy, found.forces, None, found.shortest, nearest)


def graph_batch(
    model: nn.Module, numbers: Tensor, batch: Tensor, periodic: Tensor, positions: Tensor, compiled: bool
) -> GraphBatch | None:
    """Return the path of equal molecules in vacuum; None for others, or where it cannot be recorded."""
    molecules = len(periodic)
    n = len(numbers) // max(molecules, 1)
    if not n or n * molecules != len(numbers) or bool(periodic.any()):
        return None
    if not isinstance(model, Potential) or not dense_fits(model, n, (False,), numbers.device, True):
        return None
    place = torch.arange(len(numbers), device=numbers.device) // n
    if not torch.equal(batch, place) or not torch.equal(numbers, numbers[:n].repeat(molecules)):
        return None
    graph = record_molecules(model, numbers[:n], positions[:n], molecules, compiled, flags=True)
    return None if graph is None else GraphBatch(graph, model, numbers, batch, periodic)
