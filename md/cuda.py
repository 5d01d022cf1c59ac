"""Molecules of fixed shape on a CUDA device: their kernels recorded once, replayed by one launch a step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ffpretrain.cuda_graph import record
from ffpretrain.errors import UnsupportedInputError, UserError
from ffpretrain.md.compiled import CompileWarning, compile_function
from ffpretrain.md.paths import Array, DenseFunction, Evaluation, dense_function
from ffpretrain.potential import Potential

#: pairs evaluated at once, for the sake of memory: eager, what is kept for the derivative of six layers of
#: 128 channels takes some 100 kB a pair; compiled, only tracing takes as much
PAIRS_EAGER, PAIRS_COMPILED = 150_000, 250_000


class Molecules(NamedTuple):
    """What a potential says of M equal molecules of n atoms, float64 on the device.

    Attributes:
        energies: of the atoms ``[M * n]`` eV.
        forces: ``[M * n, 3]`` eV/Å.
        shortest: ``[M]`` Å, distance of the two closest atoms; infinite for a single atom.
        flags: the smallest of ``shortest`` in Å, and 1 where every energy and force is finite; empty where
            the graph was made without.
    """

    energies: Tensor
    forces: Tensor
    shortest: Tensor
    flags: Tensor


class MoleculeGraph:
    """M equal molecules in vacuum, evaluated by one replay; on another device than CUDA, without recording.

    Args:
        potential: in eval mode, frozen, smooth at its cutoff.
        z: atomic numbers of one molecule ``[n]``, on the potential's device.
        positions: of one molecule ``[n, 3]`` Å, to try it with.
        molecules: M.
        compiled: record what the compiler makes of the kernels; where it cannot, a warning says so.
        flags: compute :attr:`Molecules.flags`.
    """

    def __init__(
        self,
        potential: Potential,
        z: Tensor,
        positions: Array | Tensor,
        molecules: int = 1,
        compiled: bool = False,
        flags: bool = False,
    ) -> None:
        self.n_atoms, self.molecules, self.device, self._flags = len(z), molecules, z.device, flags
        one = torch.as_tensor(positions, dtype=torch.float64, device=self.device)
        self.name = "dense compiled cuda-graph"
        if not compiled or not self._prepare(potential, z, one, PAIRS_COMPILED, compiled=True):
            self.name = "dense cuda-graph"
            self._prepare(potential, z, one, PAIRS_EAGER, compiled=False)
        with _stream_kept(self.device):
            self._replay = record(self._packed, self.device)

    def _prepare(self, potential: Potential, z: Tensor, one: Tensor, pairs: int, compiled: bool) -> bool:
        """Make the function of a chunk and the input of all; return whether it could be built."""
        self._chunks = -(-self.molecules // max(1, pairs // self.n_atoms**2))
        each = -(-self.molecules // self._chunks)
        # all chunks have one size, so the last may hold molecules that nobody asks for
        self._total = each * self._chunks
        self._input = one.repeat(self._total, 1)
        function = _with_shortest(
            dense_function(potential, z.repeat(each), each, once=compiled), self.n_atoms, one
        )
        built = compile_function(function, one.repeat(each, 1)) if compiled else function
        if built is not None:
            self._function = built
        return built is not None

    def _packed(self) -> Tensor:
        """Return everything in one tensor, so that one copy brings it to the host."""
        parts = [self._function(chunk) for chunk in self._input.chunk(self._chunks)]
        energies, forces, shortest = zip(*parts, strict=True)
        pieces = [*energies, *(part.flatten() for part in forces), *shortest]
        if self._flags:
            nearest = torch.cat(shortest)[: self.molecules].amin()
            finite = torch.stack([torch.isfinite(part).all() for part in (*energies, *forces)]).all()
            pieces.append(torch.stack([nearest, finite.to(nearest)]))
        return torch.cat(pieces)

    def run(self, pos: Tensor) -> Tensor:
        """Start the evaluation of positions ``[M * n, 3]`` Å; does not wait for a device.

        Returns:
            One tensor that :meth:`unpack` takes apart; the next call overwrites it.

        Raises:
            UnsupportedInputError: another number of positions.
        """
        wanted = (self.molecules * self.n_atoms, 3)
        if tuple(pos.shape) != wanted:
            raise UnsupportedInputError(f"positions have shape {tuple(pos.shape)}; give {wanted}")
        self._input[: len(pos)].copy_(pos, non_blocking=True)
        return self._replay()

    def unpack(self, packed: Tensor) -> Molecules:
        """Return the parts of what :meth:`run` gave, as views."""
        atoms, asked = self._total * self.n_atoms, self.molecules * self.n_atoms
        energies, forces, shortest, flags = packed.split(
            [atoms, 3 * atoms, self._total, len(packed) - 4 * atoms - self._total]
        )
        return Molecules(energies[:asked], forces.view(-1, 3)[:asked], shortest[: self.molecules], flags)

    def __call__(self, pos: Tensor) -> Molecules:
        """Evaluate positions ``[M * n, 3]`` Å; later calls leave the result alone."""
        return self.unpack(self.run(pos).clone())


def _stream_kept(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make the device current, and its stream again afterwards: a recording that fails leaves another one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.current_stream(device))


def _with_shortest(
    function: DenseFunction, n_atoms: int, like: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the function with each molecule's shortest distance as a third result."""
    itself = torch.diag(like.new_full((n_atoms,), torch.inf))

    def measured(pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energies, forces = function(pos)
        xyz = pos.view(-1, n_atoms, 3)
        squared = (xyz.unsqueeze(1) - xyz.unsqueeze(2)).square().sum(-1) + itself
        return energies, forces, squared.amin((1, 2)).sqrt()

    return measured


def record_molecules(
    potential: Potential,
    z: Tensor,
    positions: Array | Tensor,
    molecules: int = 1,
    compiled: bool = False,
    flags: bool = False,
) -> MoleculeGraph | None:
    """Return a :class:`MoleculeGraph`; None, after a warning with the reason, where it cannot be recorded.

    Memory may be short, or a backbone of somebody else may wait for the device.
    """
    try:
        return MoleculeGraph(potential, z, positions, molecules, compiled, flags)
    except UserError:
        raise
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(
            f"the model cannot be recorded as a CUDA graph ({reason[:160]}); running without, which gives "
            "the same numbers more slowly",
            CompileWarning,
            stacklevel=2,
        )
        return None


class GraphPath:
    """One molecule in vacuum as a :class:`~ffpretrain.md.paths.Path`: two copies, one launch, one wait.

    Args:
        graph: of one molecule.
        shift: eV, added to the energy.
    """

    def __init__(self, graph: MoleculeGraph, shift: float) -> None:
        self.graph, self.name, self._shift = graph, graph.name, shift
        pinned = graph.device.type == "cuda"
        n = graph.n_atoms
        self._there = torch.empty(n, 3, dtype=torch.float64, pin_memory=pinned)
        self._back = torch.empty(4 * n + 1, dtype=torch.float64, pin_memory=pinned)

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`~ffpretrain.md.paths.Path`."""
        if positions.shape != self._there.shape:
            raise UnsupportedInputError(f"positions have shape {positions.shape}; give {self._there.shape}")
        self._there.numpy()[:] = positions
        self._back.copy_(self.graph.run(self._there), non_blocking=True)
        if self.graph.device.type == "cuda":
            torch.cuda.current_stream(self.graph.device).synchronize()
        found = self.graph.unpack(self._back.clone())
        energies: Array = found.energies.numpy()
        energy = float(energies.sum()) + self._shift
        return Evaluation(energy, energies, found.forces.numpy(), None, float(found.shortest))
