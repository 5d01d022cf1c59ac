"""Many structures evaluated natively, one thread each."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ffpretrain.errors import UnsupportedInputError
from ffpretrain.md.native.path import NativeNetwork, StructurePairs
from ffpretrain.md.paths import Array, Evaluation


class NativeMany:
    """Evaluates structures on as many threads as torch uses; Python's lock is free while they compute.

    A structure's numbers do not depend on the number of threads or on the other structures.

    Args:
        potential: as :class:`~ffpretrain.md.native.NativePath`.
        threads: None takes ``torch.get_num_threads()``.

    Raises:
        NativeUnavailable: as :class:`~ffpretrain.md.native.NativePath`.
    """

    def __init__(self, potential: nn.Module, threads: int | None = None) -> None:
        self._networks = [NativeNetwork(potential) for _ in range(threads or torch.get_num_threads())]
        self.cutoff = self._networks[0].cutoff

    def __call__(
        self,
        structures: Sequence[StructurePairs],
        positions: Sequence[Array],
        cells: Sequence[Array | None],
        forces: bool = True,
    ) -> list[Evaluation]:
        """Evaluate each structure at its positions ``[N, 3]`` Å in its cell ``[3, 3]`` Å.

        Args:
            structures: elements and pairs of each.
            positions: of each.
            cells: of each, or None.
            forces: False gives energies alone, the same to the last bit.

        Raises:
            UnsupportedInputError: a cell that has no pairs, with the number of its structure.
            NonFiniteError: memory ran out.
        """
        threads = min(len(self._networks), len(structures))
        if threads <= 1:
            return self._some(0, 1, structures, positions, cells, forces)
        results: list[Evaluation] = [None] * len(structures)  # type: ignore[list-item]
        with ThreadPoolExecutor(threads) as pool:
            parts = [
                pool.submit(self._some, place, threads, structures, positions, cells, forces)
                for place in range(threads)
            ]
            for place, part in enumerate(parts):
                results[place::threads] = part.result()
        return results

    def _some(
        self,
        first: int,
        step: int,
        structures: Sequence[StructurePairs],
        positions: Sequence[Array],
        cells: Sequence[Array | None],
        forces: bool,
    ) -> list[Evaluation]:
        network = self._networks[first]
        every = range(first, len(structures), step)
        results = []
        for i in every:
            try:
                results.append(network.evaluate(structures[i], positions[i], cells[i], forces))
            except UnsupportedInputError as error:
                raise UnsupportedInputError(f"structure {i}: {error}") from error
        return results
