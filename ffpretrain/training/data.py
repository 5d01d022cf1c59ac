"""From frames to batches: samples held in memory, an endless seeded stream of batches, collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from ffpretrain.datasets.frames import Dataset, Frame
from ffpretrain.errors import DataError
from ffpretrain.graphs import Sample, batch_graphs, graph_from_frame
from ffpretrain.training.properties import PropertyReader

_LABELS = ("energy", "forces", "stress")
#: properties of frames that list atoms, and the length of a row; they become extras, their number beside them
_LISTS = {"bonds": 3, "torsions": 4}


def sample_from_frame(frame: Frame, cutoff: float, index: int) -> Sample:
    """Return a frame as a sample of one structure.

    Args:
        frame: labels that it has become targets; ``bonds`` and ``torsions`` among its properties extras.
        cutoff: Å, of the edges.
        index: identifies the frame; noise is drawn by it.
    """
    targets: dict[str, torch.Tensor] = {}
    if frame.energy is not None:
        targets["energy"] = torch.tensor([frame.energy], dtype=torch.float64)
    if frame.forces is not None:
        targets["forces"] = torch.as_tensor(frame.forces, dtype=torch.float64)
    if frame.stress is not None:
        targets["stress"] = torch.as_tensor(frame.stress, dtype=torch.float64).unsqueeze(0)
    extras = {
        "index": torch.tensor([index]),
        "charge": torch.tensor([frame.charge]),
        "spin": torch.tensor([frame.spin]),
    }
    if frame.fixed is not None:
        extras["fixed"] = torch.as_tensor(frame.fixed)
    for name, width in _LISTS.items():
        rows = np.asarray(frame.properties.get(name, 0))
        if rows.ndim == 2 and rows.shape[1] == width:
            extras[name] = torch.as_tensor(rows.astype(np.int64))
            extras[f"n_{name}"] = torch.tensor([len(rows)])
    return Sample(graph_from_frame(frame, cutoff), targets, extras)


class SampleDataset(TorchDataset[Sample]):
    """Samples of a dataset; graphs are built once and kept, so an epoch does no neighbour search.

    Args:
        frames: the frames, in eV and Å.
        cutoff: Å.
        needs: labels every frame must have; names of properties become targets of that name.
        ids: number of each frame, for noise and messages; None counts from 0.

    Raises:
        ConfigError: the data have no such property.
        DataError: a frame lacks a label; names it.
    """

    def __init__(
        self,
        frames: Dataset,
        cutoff: float,
        needs: Sequence[str] = (),
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        self._samples = []
        numbers = range(len(frames)) if ids is None else ids.tolist()
        readers = {name: PropertyReader.of(frames, name) for name in needs if name not in _LABELS}
        for i, frame in zip(numbers, frames, strict=True):
            for name in needs:
                if name not in readers and getattr(frame, name) is None:
                    raise DataError(
                        f"frame {i} of {frames.metadata.name} has no {name}; label the data first "
                        "(ffpretrain label) or choose an objective that needs no labels"
                    )
            sample = sample_from_frame(frame, cutoff, i)
            for name, read in readers.items():
                sample.targets[name] = torch.tensor([read(frame, i)], dtype=torch.float64)
            self._samples.append(sample)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def collate(samples: Sequence[Sample]) -> Sample:
    """Concatenate samples; labels and extras that not all of them have are left out.

    Of bonds and torsions, which count atoms in each structure, the number is -1 where a structure has none.
    """
    for name, width in _LISTS.items():
        if any(name in s.extras for s in samples):
            absent = {name: torch.empty(0, width, dtype=torch.int64), f"n_{name}": torch.tensor([-1])}
            samples = [s if name in s.extras else s._replace(extras={**s.extras, **absent}) for s in samples]
    first = samples[0]
    targets = {
        key: torch.cat([s.targets[key] for s in samples])
        for key in first.targets
        if all(key in s.targets for s in samples)
    }
    extras = {
        key: torch.cat([s.extras[key] for s in samples])
        for key in first.extras
        if all(key in s.extras for s in samples)
    }
    return Sample(batch_graphs([s.graph for s in samples]), targets, extras)


class StreamSampler(Sampler[list[int]]):
    """An endless stream of batches: seeded permutations of the data, one after another, cut into batches.

    The k-th batch depends on the seed and k alone, so a run can be taken up at any step; with several
    processes each takes its slice of the same global batch.

    Args:
        n: number of samples.
        batch_size: of the global batch; every process must get an equal share.
        seed: of the permutations.
        start: called when iteration begins; gives the first batch. A run that is taken up passes its step.
        rank: this process.
        world_size: number of processes.

    Raises:
        DataError: no samples, or the batch does not divide among the processes.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        start: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if n == 0:
            raise DataError("the training split is empty; give at least one frame")
        if batch_size % world_size:
            raise DataError(f"batch_size={batch_size} does not divide among {world_size} processes")
        self.n, self.batch_size, self.seed, self.start = n, batch_size, seed, start
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)

    def batch(self, k: int) -> list[int]:
        """Return the indices of this process's part of batch ``k``."""
        first = k * self.batch_size
        picks = []
        for position in range(first, first + self.batch_size)[self._slice]:
            epoch, offset = divmod(position, self.n)
            picks.append(int(self._permutation(epoch)[offset]))
        return picks

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start()
        while True:
            yield self.batch(k)
            k += 1

    def _permutation(self, epoch: int) -> np.ndarray:
        cached = getattr(self, "_cache", None)
        if cached is None or epoch not in cached:
            # a batch can straddle two epochs: keep both
            kept = {} if cached is None else {e: p for e, p in cached.items() if e == epoch - 1}
            kept[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._cache = kept
        return self._cache[epoch]
