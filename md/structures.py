"""Many structures, each of its own kind, evaluated several at a time: for landscapes and sets of frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ffpretrain.errors import UnsupportedInputError
from ffpretrain.graphs import Graph, batch_graphs, build_graph
from ffpretrain.md.native import NativeMany, StructurePairs
from ffpretrain.md.paths import Array, Evaluation, has_volume, refuse_non_finite, refuse_shapes
from ffpretrain.potential import Model

if TYPE_CHECKING:
    from ffpretrain.md.runtime import Runtime

#: pairs evaluated at once without native code
_BATCH_PAIRS = 100_000


class Structure(Protocol):
    """What :func:`evaluate_structures` reads: ``ase.Atoms`` and a dataset's frame both have it."""

    numbers: Any
    positions: Any
    cell: Any
    pbc: Any


class _Arrays(NamedTuple):
    """A structure as arrays: ``numbers [N]``, ``positions [N, 3]`` Å, ``cell [3, 3]`` Å or None."""

    numbers: NDArray[np.int64]
    positions: Array
    cell: Array | None
    pbc: tuple[bool, bool, bool]


def evaluate_structures(
    runtime: Runtime, structures: Iterable[Structure], forces: bool = True
) -> list[Evaluation]:
    """Evaluate structures several at a time, natively where the machine and model allow it.

    Args:
        runtime: of the model.
        structures: ``ase.Atoms``, frames of a dataset, or what has the same attributes.
        forces: False computes energies alone, without a derivative; the first structure passes a gate of its
            own for that.

    Raises:
        UnsupportedInputError, NonFiniteError, AgreementError: as
            :meth:`Runtime.evaluate <ffpretrain.md.Runtime.evaluate>`; the first two name the structure by its
            place.
    """
    if (many := runtime.native_many()) is not None:
        return _natively(runtime, many, [_arrays(one) for one in structures], forces)
    results: list[Evaluation] = []
    waiting: list[_Prepared] = []
    pairs = 0
    for structure in structures:
        one = _arrays(structure)
        if not forces:
            _gate(runtime, _EagerEnergies(runtime, one), one)
        waiting.append(_prepare(runtime, one))
        pairs += waiting[-1].graph.edge_index.shape[1]
        if pairs >= _BATCH_PAIRS:
            results += _eagerly(runtime, waiting, len(results), forces)
            waiting, pairs = [], 0
    if waiting:
        results += _eagerly(runtime, waiting, len(results), forces)
    return results


def _arrays(structure: Structure) -> _Arrays:
    pbc = (bool(structure.pbc[0]), bool(structure.pbc[1]), bool(structure.pbc[2]))
    one = _Arrays(
        np.asarray(structure.numbers, dtype=np.int64),
        np.asarray(structure.positions, dtype=np.float64),
        np.array(structure.cell, dtype=np.float64) if any(pbc) else None,
        pbc,
    )
    refuse_shapes(one.numbers, one.positions, one.cell)
    return one


def _gate(runtime: Runtime, path: _NativeEnergies | _EagerEnergies, one: _Arrays) -> None:
    """Compare energies alone with the plain evaluation, once for each way of computing them."""
    if path.name not in runtime.agreement:
        runtime.check(path, one.numbers, one.positions, one.cell, one.pbc)


class _NativeEnergies:
    """Energies alone of one structure by native code, for the gate."""

    name = "native energies"

    def __init__(self, many: NativeMany, one: _Arrays) -> None:
        self.many, self.pairs = many, StructurePairs(one.numbers, one.pbc, many.cutoff)

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        return self.many([self.pairs], [positions], [cell], forces=False)[0]


class _EagerEnergies:
    """Energies alone of one structure by torch, for the gate."""

    name = "batch energies"

    def __init__(self, runtime: Runtime, one: _Arrays) -> None:
        self.runtime, self.one = runtime, one

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        moved = self.one._replace(positions=positions, cell=cell)
        return _eagerly(self.runtime, [_prepare(self.runtime, moved)], 0, forces=False)[0]


def _natively(
    runtime: Runtime, many: NativeMany, structures: list[_Arrays], forces: bool
) -> list[Evaluation]:
    # pairs of small molecules depend on nothing but the number of atoms
    shared: dict[tuple[bytes, tuple[bool, bool, bool]], StructurePairs] = {}
    pairs: list[StructurePairs] = []
    for one in structures:
        runtime.admit(*one)
        if not forces:
            _gate(runtime, _NativeEnergies(many, one), one)
        kind = (one.numbers.tobytes(), one.pbc)
        if kind not in shared:
            shared[kind] = StructurePairs(one.numbers, one.pbc, runtime.cutoff)
        # a list of pairs belongs to one structure: its neighbours are others'
        fixed = shared[kind].list is None
        pairs.append(shared[kind] if fixed else StructurePairs(one.numbers, one.pbc, runtime.cutoff))
    results = many(pairs, [one.positions for one in structures], [one.cell for one in structures], forces)
    for place, result in enumerate(results):
        if result.shortest == 0:
            raise UnsupportedInputError(f"structure {place}: two atoms are at the same place")
        refuse_non_finite(result, f"structure {place}: ")
    return results


class _Prepared(NamedTuple):
    """A structure's graph, whether it has a stress, and its shortest distance in Å."""

    graph: Graph
    periodic: bool
    shortest: float


def _prepare(runtime: Runtime, one: _Arrays) -> _Prepared:
    graph = build_graph(
        torch.as_tensor(one.numbers),
        torch.tensor(one.positions, dtype=torch.float64),
        runtime.cutoff,
        None if one.cell is None else torch.tensor(one.cell),
        one.pbc,
    )
    vector = graph.pos[graph.edge_index[0]] + graph.edge_shift - graph.pos[graph.edge_index[1]]
    shortest = float(vector.square().sum(-1).min().sqrt()) if len(vector) else float("inf")
    return _Prepared(graph, has_volume(one.cell, one.pbc), shortest)


def _eagerly(runtime: Runtime, waiting: Sequence[_Prepared], done: int, forces: bool) -> list[Evaluation]:
    batch = batch_graphs([one.graph for one in waiting]).to(runtime.device)
    # a model that is none of ours may have no energies alone; it is evaluated in full
    alone = {} if forces or not isinstance(runtime.model, Model) else {"forces": False}
    found: dict[str, torch.Tensor] = runtime.model(batch, **alone)
    out = {key: value.detach().to("cpu", torch.float64).numpy() for key, value in found.items()}
    results, start = [], 0
    for place, (graph, periodic, shortest) in enumerate(waiting):
        atoms = slice(start, start + len(graph.z))
        result = Evaluation(
            float(out["energy"][place]) if "energy" in out else None,
            out["energies"][atoms].copy() if "energies" in out else None,
            out["forces"][atoms].copy() if forces and "forces" in out else None,
            out["stress"][place].copy() if forces and periodic and "stress" in out else None,
            shortest,
        )
        refuse_non_finite(result, f"structure {done + place}: ")
        results.append(result)
        start = atoms.stop
    return results
