"""Copies of one structure, each at positions of its own, evaluated as one batch of fixed shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.errors import NonFiniteError, UnsupportedInputError
from ffpretrain.md.agreement import check_agreement
from ffpretrain.md.compiled import COMPILE_MIN_STEPS, compile_dense
from ffpretrain.md.cuda import MoleculeGraph, record_molecules
from ffpretrain.md.native import NativeMany, StructurePairs
from ffpretrain.md.paths import Array, DenseFunction, Evaluation, dense_fits, dense_function
from ffpretrain.md.runtime import Runtime

#: Å, displacements of the replicas that stand around the one the gate compares
_SPREAD = 0.02


class Replicas:
    """Evaluates copies of one structure together.

    Molecules in vacuum that fit the dense layout keep all their pairs: no list to build, and one forward pass
    with fixed shapes for all copies, compiled where it pays. Others go through
    :meth:`Runtime.evaluate_tensors <ffpretrain.md.Runtime.evaluate_tensors>`. Either way is compared with the
    plain evaluation in float64 before it is used. Copies do not see each other: one that has gone wrong
    leaves the others as they are.

    Args:
        runtime: of the model; its ``compile`` decides, ``auto`` by the number of evaluations to come.
        numbers: atomic numbers ``[N]``.
        positions: ``[N, 3]`` Å, a structure for the comparison.
        count: copies R.
        cell: lattice vectors in rows ``[3, 3]`` Å; only read where ``pbc`` is set.
        pbc: all three directions repeat, or none.
        steps: how many times the batch is to be evaluated.

    Raises:
        UnsupportedInputError: an element the model never saw, or only one or two directions repeat.
        AgreementError: the path gives other numbers than the plain evaluation.
        NonFiniteError: the plain evaluation of the structure is not finite.
    """

    def __init__(
        self,
        runtime: Runtime,
        numbers: NDArray[np.integer],
        positions: Array,
        count: int,
        cell: Array | None = None,
        pbc: Sequence[bool] = (False, False, False),
        steps: int = 0,
    ) -> None:
        directions = (bool(pbc[0]), bool(pbc[1]), bool(pbc[2]))
        if any(directions) and not all(directions):
            raise UnsupportedInputError(
                "replicas are molecules or repeat in all three directions; set atoms.pbc to True or False"
            )
        self.runtime, self.count, self.pbc = runtime, count, directions
        self.numbers: NDArray[np.int64] = np.asarray(numbers, dtype=np.int64)
        self.device = runtime.device
        z = torch.as_tensor(self.numbers, device=self.device)
        check = getattr(runtime.model, "check_elements", None)
        if check is not None:
            check(z)
        self._z = z.repeat(count)
        self._box = np.asarray(cell, dtype=np.float64) if cell is not None and any(directions) else None
        self.name = "replicas batch"
        one = _OneReplica(self, np.asarray(positions, dtype=np.float64))
        self._dense = self._make_dense(steps, one.positions)
        one.name = self.name
        runtime.agreement[self.name] = check_agreement(
            one, runtime.model, self.numbers, one.positions, self._box, directions, runtime.dtype, self.device
        )

    @property
    def backend(self) -> str:
        """How the copies are evaluated, such as ``replicas dense compiled float32 cpu``."""
        return f"{self.name} {str(self.runtime.dtype).removeprefix('torch.')} {self.device}"

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate all copies.

        Args:
            positions: ``[R, N, 3]`` Å, float64, finite, on the runtime's device.

        Returns:
            Energies ``[R]`` eV and forces ``[R, N, 3]`` eV/Å, float64. Where the model gives a copy something
            that is not finite, that copy's values are not finite.
        """
        if self._dense is None:
            return self._batch(positions)
        energies, forces = self._dense(positions.reshape(-1, 3))
        energy = energies.view(self.count, -1).sum(1) + self.runtime.model.shift  # type: ignore[operator]
        return energy, forces.view(self.count, -1, 3).to(torch.float64)

    def _make_dense(self, steps: int, positions: Array) -> DenseFunction | None:
        """Return the function of fixed shape; None where the structure needs lists of pairs."""
        runtime, n = self.runtime, len(self.numbers)
        model = runtime.model
        if (many := runtime.native_many(steps * self.count)) is not None:
            self.name = "replicas native"
            return self._native_function(many)
        wanted = runtime.compile is True or (
            runtime.compile == "auto" and steps * self.count >= COMPILE_MIN_STEPS
        )
        if runtime.records and dense_fits(model, n, self.pbc, self.device, compiled=True):
            graph = record_molecules(model, self._z[:n], positions, self.count, wanted)  # type: ignore[arg-type]
            if graph is not None:
                self.name = f"replicas {graph.name}"
                return _without_distances(graph)
        if wanted and dense_fits(model, n, self.pbc, self.device, compiled=True):
            example = torch.zeros(self.count * n, 3, dtype=torch.float64, device=self.device)
            example += torch.arange(len(example), device=self.device).unsqueeze(1)
            function = compile_dense(model, self._z, example, self.count)  # type: ignore[arg-type]
            if function is not None:
                self.name = "replicas dense compiled"
                return function
        if dense_fits(model, n, self.pbc, self.device, compiled=False):
            self.name = "replicas dense"
            return dense_function(model, self._z, self.count)  # type: ignore[arg-type]
        return None

    def _native_function(self, many: NativeMany) -> DenseFunction:
        structures = [StructurePairs(self.numbers, self.pbc, many.cutoff) for _ in range(self.count)]
        cells = [self._box] * self.count

        def function(pos: Tensor) -> tuple[Tensor, Tensor]:
            found = many(structures, list(pos.view(self.count, -1, 3).numpy()), cells)
            energies = np.concatenate([one.energies for one in found if one.energies is not None])
            forces = np.concatenate([one.forces for one in found if one.forces is not None])
            return torch.from_numpy(energies), torch.from_numpy(forces)

        return function

    def _batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        count, n = self.count, len(self.numbers)
        try:
            return self._tensors(positions)
        except NonFiniteError:
            # which of them it was: rare, so that one after another is quick enough
            energy = positions.new_full((count,), torch.nan)
            forces = positions.new_full((count, n, 3), torch.nan)
            for place in range(count):
                try:
                    alone = self._tensors(positions[place].expand(count, -1, -1))
                except NonFiniteError:
                    continue
                energy[place], forces[place] = alone[0][place], alone[1][place]
            return energy, forces

    def _tensors(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        count, n = self.count, len(self.numbers)
        batch = torch.arange(count, device=self.device).repeat_interleave(n)
        box = np.zeros((3, 3)) if self._box is None else self._box
        cell = torch.as_tensor(box, device=self.device).expand(count, 3, 3)
        periodic = torch.full((count,), any(self.pbc), device=self.device)
        found = self.runtime.evaluate_tensors(self._z, positions.reshape(-1, 3), batch, cell, periodic)
        return found.energy, found.forces.view(count, n, 3)


def _without_distances(graph: MoleculeGraph) -> DenseFunction:
    def function(pos: Tensor) -> tuple[Tensor, Tensor]:
        found = graph(pos)
        return found.energies, found.forces

    return function


class _OneReplica:
    """The last of the copies as a :class:`~ffpretrain.md.paths.Path`, for the agreement gate.

    The last, because a slip in an offset between copies leaves the first one right.
    """

    def __init__(self, replicas: Replicas, positions: Array) -> None:
        self.replicas, self.positions, self.name = replicas, positions, replicas.name
        others = np.random.default_rng(0).normal(0.0, _SPREAD, (replicas.count, *positions.shape))
        self._all = positions + others

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`~ffpretrain.md.paths.Path`; the cell stays that of the copies."""
        every = self._all.copy()
        every[-1] = positions
        energy, forces = self.replicas(torch.as_tensor(every, device=self.replicas.device))
        return Evaluation(float(energy[-1]), None, forces[-1].cpu().numpy(), None, float("inf"))
