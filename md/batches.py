"""Many structures evaluated at once, for engines that move them together; tensors stay on the device."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffpretrain.errors import ConfigError, NonFiniteError, UnsupportedInputError
from ffpretrain.graphs import Graph
from ffpretrain.md.paths import DENSE_ATOMS, Array, Evaluation, has_volume
from ffpretrain.md.verlet import VerletList


class BatchEvaluation(NamedTuple):
    """What a potential says of a batch of structures, as float64 on the model's device.

    Attributes:
        energy: ``[B]`` eV.
        forces: ``[N, 3]`` eV/Å.
        stress: ``[B, 3, 3]`` eV/Å³, positive under tension, zero for a structure that does not repeat; None
            where none does.
        shortest: ``[B]`` Å, distance of the two closest atoms; infinite where none are within reach.
        nearest: Å, the smallest of ``shortest`` where it has come to the host anyway, else None.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    shortest: Tensor
    nearest: float | None = None


class Unchanged:
    """Tells without waiting for a device whether tensors are those of an earlier call.

    They are when they are the same memory, seen the same way, and nothing was written to it since, which
    torch counts. The answer is no for tensors on a CPU, where numpy may write to the same memory and where
    comparing is quick, and for those of inference mode, whose writes are not counted.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, ...] = ()
        self._marks: list[Any] = []

    def __call__(self, *tensors: Tensor) -> bool:
        """Return whether these are the tensors kept."""
        return bool(self._marks) and all(map(_counted, tensors)) and self._marks == list(map(_mark, tensors))

    def keep(self, *tensors: Tensor) -> None:
        """Remember tensors, which also keeps their memory from being used for others."""
        usable = all(map(_counted, tensors))
        self._kept, self._marks = (tensors, list(map(_mark, tensors))) if usable else ((), [])


def _counted(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" and not tensor.is_inference()


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    # torch has no public name for its count of writes
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class BatchPath:
    """A batch of structures whose elements and periodicity stay while positions and cells change.

    Molecules of at most :data:`~ffpretrain.md.paths.DENSE_ATOMS` atoms keep all their pairs, of which those
    within the cutoff are picked by one comparison for the whole batch; every other structure has a
    :class:`~ffpretrain.md.verlet.VerletList` of its own. Both give the same pairs in the same order whatever
    was evaluated before.

    Args:
        model: called with a :class:`~ffpretrain.graphs.Graph`; has a ``cutoff`` in Å.
        numbers: atomic numbers ``[N]``, on the model's device.
        batch: structure of each atom ``[N]``, ascending from 0 without gaps.
        periodic: for each structure ``[B]``, whether it repeats in all three directions.

    Raises:
        UnsupportedInputError: the structures are mixed, or one has no atoms.
    """

    name = "batch"
    #: whether calling it refuses positions that are not finite
    checks_positions: ClassVar[bool] = False

    def __init__(self, model: nn.Module, numbers: Tensor, batch: Tensor, periodic: Tensor) -> None:
        if not torch.equal(torch.unique_consecutive(batch), torch.arange(len(periodic)).to(batch)):
            raise UnsupportedInputError(
                "the atoms of a structure must stand together, the structures in order and none empty"
            )
        # copies, so that a change that an engine makes in place is noticed
        self.numbers, self.batch, self.periodic = numbers.clone(), batch.clone(), periodic.clone()
        self._unchanged = Unchanged()
        self.model = model
        self.cutoff = float(model.cutoff)  # type: ignore[arg-type]
        counts = torch.bincount(batch, minlength=len(periodic)).cpu().numpy()
        ends = np.cumsum(counts)
        self.slices = [slice(int(end - n), int(end)) for n, end in zip(counts, ends, strict=True)]
        self.lists: dict[int, VerletList] = {}
        pairs: list[NDArray[np.int64]] = [np.empty((2, 0), dtype=np.int64)]
        for place, repeats in enumerate(periodic.tolist()):
            if repeats or counts[place] > DENSE_ATOMS:
                self.lists[place] = VerletList(self.cutoff)
            else:
                pairs.append(_all_pairs(int(counts[place])) + self.slices[place].start)
        self.pairs = torch.from_numpy(np.concatenate(pairs, axis=1)).to(numbers.device)
        self.owner = batch[self.pairs[0]]

    def serves(self, numbers: Tensor, batch: Tensor, periodic: Tensor) -> bool:
        """Return whether the path was made for these elements, structures and periodicity."""
        mine, asked = (self.numbers, self.batch, self.periodic), (numbers, batch, periodic)
        if self._unchanged(*asked):
            return True
        same = all(torch.equal(one, other) for one, other in zip(mine, asked, strict=True))
        if same:
            self._unchanged.keep(*asked)
        return same

    def __call__(self, pos: Tensor, cell: Tensor) -> BatchEvaluation:
        """Evaluate positions ``[N, 3]`` Å in cells (rows) ``[B, 3, 3]`` Å, both float64.

        Raises:
            UnsupportedInputError: two atoms at the same place, or a cell without volume.
            ConfigError: the model has no energy or no forces.
            NonFiniteError: an energy or force is not finite; it names the structure and the atom.
        """
        cell = torch.where(self.periodic.view(-1, 1, 1), cell, torch.zeros_like(cell))
        index, shift, shortest = self._pairs(pos, cell)
        out: dict[str, Tensor] = self.model(
            Graph(self.numbers, pos, index, shift, self.batch, cell, len(self.periodic))
        )
        if "energy" not in out or "forces" not in out:
            raise ConfigError("the model has no energy or no forces, which dynamics needs; give a potential")
        energy = out["energy"].detach().to(torch.float64)
        forces = out["forces"].detach().to(torch.float64)
        self._refuse_non_finite(energy, forces)
        stress = out["stress"].detach().to(torch.float64) if "stress" in out else None
        return BatchEvaluation(energy, forces, stress, shortest)

    def _pairs(self, pos: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs within the cutoff, their lattice translations, and each structure's shortest."""
        squared = (pos[self.pairs[0]] - pos[self.pairs[1]]).square().sum(-1)
        near = self.pairs[:, squared < self.cutoff**2]
        shortest = pos.new_full((len(self.periodic),), torch.inf)
        shortest.scatter_reduce_(0, self.owner, squared, "amin")
        shortest = shortest.sqrt()
        indices, shifts = [near], [pos.new_zeros(near.shape[1], 3)]
        for place, verlet in self.lists.items():
            atoms = self.slices[place]
            try:
                index, shift, least = verlet.pairs(pos[atoms], cell[place], (bool(self.periodic[place]),) * 3)
            except UnsupportedInputError as error:
                raise UnsupportedInputError(f"structure {place}: {error}") from error
            indices.append(index + atoms.start)
            shifts.append(shift)
            shortest[place] = least
        self._refuse_coinciding(shortest)
        return torch.cat(indices, dim=1), torch.cat(shifts), shortest

    def _refuse_coinciding(self, shortest: Tensor) -> None:
        if bool((shortest == 0).any()):
            raise UnsupportedInputError(
                f"structure {int(shortest.argmin())}: two atoms are at the same place; move or remove one"
            )

    def _refuse_non_finite(self, energy: Tensor, forces: Tensor) -> None:
        if bool(torch.isfinite(forces).all()) and bool(torch.isfinite(energy).all()):
            return
        bad = (~torch.isfinite(forces)).any(dim=1).nonzero()
        if len(bad):
            atom = int(bad[0])
            place = int(self.batch[atom])
            what = f"the force on atom {atom - self.slices[place].start}"
        else:
            place = int((~torch.isfinite(energy)).nonzero()[0])
            what = "the energy"
        raise NonFiniteError(
            f"structure {place}: {what} is not finite; look for atoms on top of each other or a step that is "
            "too long"
        )


class OneOfBatch:
    """The last structure of a batch as a :class:`~ffpretrain.md.paths.Path`, for the agreement gate.

    The last, because a slip in an offset between structures leaves the first one right.

    Args:
        path: of the batch.
        pos: of all atoms ``[N, 3]`` Å.
        cell: of all structures ``[B, 3, 3]`` Å.
    """

    def __init__(self, path: BatchPath, pos: Tensor, cell: Tensor) -> None:
        self.path, self.pos, self.cell, self.name = path, pos, cell, path.name
        self.atoms = path.slices[-1]
        self.numbers: NDArray[np.int64] = path.numbers[self.atoms].cpu().numpy()
        self.positions: Array = pos[self.atoms].cpu().numpy()
        self.pbc = (bool(path.periodic[-1]),) * 3

    def __call__(self, positions: Array, cell: Array | None) -> Evaluation:
        """See :class:`~ffpretrain.md.paths.Path`; the cell stays that of the batch."""
        pos = self.pos.clone()
        pos[self.atoms] = torch.as_tensor(positions, dtype=pos.dtype, device=pos.device)
        found = self.path(pos, self.cell)
        periodic = has_volume(cell, self.pbc) and found.stress is not None
        return Evaluation(
            energy=float(found.energy[-1]),
            energies=None,
            forces=found.forces[self.atoms].cpu().numpy(),
            stress=found.stress[-1].cpu().numpy() if periodic and found.stress is not None else None,
            shortest=float(found.shortest[-1]),
        )


def refuse_bad_positions(positions: Tensor, batch: Tensor) -> None:
    """Refuse a batch without atoms, or with positions that are not finite.

    Raises:
        UnsupportedInputError: names the structure and the atom.
    """
    if len(positions) == 0:
        raise UnsupportedInputError("the batch has no atoms; give at least one structure")
    if not bool(torch.isfinite(positions).all()):
        atom = int((~torch.isfinite(positions).all(dim=1)).nonzero()[0])
        place = int(batch[atom])
        inside = atom - int((batch < place).sum())
        raise UnsupportedInputError(
            f"structure {place}: the position of atom {inside} is not finite; check the structure"
        )


def _all_pairs(n: int) -> NDArray[np.int64]:
    """Return every ordered pair of ``n`` atoms, (neighbour, centre) ``[2, n (n - 1)]``, sorted by centre."""
    center, neighbor = np.nonzero(~np.eye(n, dtype=bool))
    pairs: NDArray[Any] = np.stack([neighbor, center])
    return pairs.astype(np.int64)
