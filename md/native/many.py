"""Many structures evaluated natively, small molecules several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from ffpretrain.errors import UnsupportedInputError
from ffpretrain.md.native.path import JoinedMolecules, NativeNetwork, StructurePairs
from ffpretrain.md.paths import Array, Evaluation

#: molecules are joined up to so many atoms: enough for the weights, which are fetched once for all of them,
#: not to be what takes the time, and few enough for what they make to stay in a cache
_JOINED = 96
#: structures of an engine that are asked for again and again; more are those of a landscape, met once
_REMEMBERED = 1024


class NativeMany:
    """Evaluates structures on as many threads as torch uses; Python's lock is free while they compute.

    Small molecules in vacuum are evaluated several at a time. A structure's numbers do not depend on the
    number of threads or on the other structures.

    Args:
        potential: as :class:`~ffpretrain.md.native.NativePath`.
        threads: None takes ``torch.get_num_threads()``.

    Raises:
        NativeUnavailable: as :class:`~ffpretrain.md.native.NativePath`.
    """

    def __init__(self, potential: nn.Module, threads: int | None = None) -> None:
        self._networks = [NativeNetwork(potential) for _ in range(threads or torch.get_num_threads())]
        self.cutoff = self._networks[0].cutoff
        self._known: tuple[tuple[int, ...], list[StructurePairs], list[_Group]] | None = None

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
        groups = self._grouped(structures, cells)
        threads = min(len(self._networks), len(groups))
        results: list[Evaluation] = [None] * len(structures)  # type: ignore[list-item]

        def some(place: int) -> None:
            for group in groups[place::threads]:
                for i, found in zip(
                    group.members, self._group(place, group, positions, cells, forces), strict=True
                ):
                    results[i] = found

        if threads == 1:
            some(0)
        elif threads:
            with ThreadPoolExecutor(threads) as pool:
                for part in [pool.submit(some, place) for place in range(threads)]:
                    part.result()
        return results

    def _grouped(self, structures: Sequence[StructurePairs], cells: Sequence[Array | None]) -> list[_Group]:
        if len(structures) > _REMEMBERED:
            return _groups(structures, cells, len(self._networks))
        key = (*map(id, structures), *(cell is None for cell in cells))
        if self._known is None or self._known[0] != key:
            # the structures are kept with their groups, so that no other object takes over an id
            self._known = key, list(structures), _groups(structures, cells, len(self._networks))
        return self._known[2]

    def _group(
        self,
        place: int,
        group: _Group,
        positions: Sequence[Array],
        cells: Sequence[Array | None],
        forces: bool,
    ) -> list[Evaluation]:
        network, (first, *others) = self._networks[place], group.members
        if isinstance(group.structure, JoinedMolecules):
            return network.evaluate_joined(group.structure, [positions[i] for i in (first, *others)], forces)
        try:
            return [network.evaluate(group.structure, positions[first], cells[first], forces)]
        except UnsupportedInputError as error:
            raise UnsupportedInputError(f"structure {first}: {error}") from error


class _Group(NamedTuple):
    """Structures that are evaluated together.

    Attributes:
        members: their places.
        structure: the only one, or all of them as one.
    """

    members: list[int]
    structure: StructurePairs | JoinedMolecules


def _groups(
    structures: Sequence[StructurePairs], cells: Sequence[Array | None], threads: int
) -> list[_Group]:
    """Join neighbours in the list that are molecules whose pairs never change, evenly for the threads."""
    fits = [s.list is None and cell is None for s, cell in zip(structures, cells, strict=True)]
    atoms = sum(len(s.z) for s, fit in zip(structures, fits, strict=True) if fit)
    most = min(_JOINED, -(-atoms // threads))
    members: list[list[int]] = []
    size = 0
    for i, structure in enumerate(structures):
        n = len(structure.z)
        if members and fits[i] and fits[members[-1][0]] and size + n <= most:
            members[-1].append(i)
            size += n
        else:
            members.append([i])
            size = n
    return [
        _Group(each, JoinedMolecules([structures[i] for i in each]) if each[1:] else structures[each[0]])
        for each in members
    ]
