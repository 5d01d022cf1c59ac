"""Which frames train, which validate, which test: drawn from a seed, saved with a run, checked when read."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import _io
from ffpretrain.datasets.frames import Dataset
from ffpretrain.errors import ConfigError, DataError

FORMAT = "ffpretrain-splits"
FORMAT_VERSION = 1
PARTS = ("train", "val", "test")
# names other programs give the three arrays of a split.npz (SchNetPack: train_idx; TorchMD-Net: idx_train)
_NPZ_NAMES = {part: (part, f"{part}_idx", f"idx_{part}") for part in PARTS}


def _no_frames() -> NDArray[np.int64]:
    return np.array([], dtype=np.int64)


@dataclass(frozen=True)
class Splits:
    """Indices of the frames of each part; no frame stands in two parts, or twice in one.

    Attributes:
        train: int64 ``[n_train]``, frames to learn from.
        val: int64 ``[n_val]``, frames to stop and select by.
        test: int64 ``[n_test]``, frames to report errors on.
        n_frames: size of the dataset that the indices belong to; every index is below it.
        seed: that drew them; None for published splits.
        dataset: name of the dataset.
        sha256: checksums of the dataset's files, by file name.

    Raises:
        DataError: two parts share a frame, a frame stands twice, or an index is out of range.
    """

    train: NDArray[np.int64]
    val: NDArray[np.int64] = field(default_factory=_no_frames)
    test: NDArray[np.int64] = field(default_factory=_no_frames)
    n_frames: int | None = None
    seed: int | None = None
    dataset: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the parts against each other."""
        for part in PARTS:
            object.__setattr__(self, part, _indices(getattr(self, part), part, self.n_frames))
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = np.intersect1d(getattr(self, one), getattr(self, other))
            if len(shared):
                raise DataError(
                    f"splits: {one!r} and {other!r} share {len(shared)} frames, first frame {shared[0]}; "
                    "make the parts disjoint"
                )

    def __getitem__(self, part: str) -> NDArray[np.int64]:
        """Return the indices of ``"train"``, ``"val"`` or ``"test"``."""
        if part not in PARTS:
            raise KeyError(part)
        indices: NDArray[np.int64] = getattr(self, part)
        return indices

    def sizes(self) -> dict[str, int]:
        """Return the number of frames of each part."""
        return {part: len(self[part]) for part in PARTS}

    def apply(self, dataset: Dataset) -> dict[str, Dataset]:
        """Return the three parts of ``dataset``.

        Raises:
            DataError: the splits were made for another dataset.
        """
        check_belongs(self, dataset)
        return {part: dataset[self[part]] for part in PARTS}


def random_split(n_frames: int, sizes: Sequence[int], seed: int, dataset: Dataset | None = None) -> Splits:
    """Draw a split: the same numbers give the same split on every machine and with every NumPy.

    Args:
        n_frames: size of the dataset.
        sizes: frames to train and to validate on, and, where given, to test on: ``(950, 50)``.
        seed: of the draw.
        dataset: recorded by name and checksum in the result, so that the split is not used with another.

    Raises:
        ConfigError: the sizes are not two or three non-negative integers, or the seed is negative.
        DataError: the dataset has fewer frames than the parts ask for.
    """
    if len(sizes) not in (2, 3) or any(isinstance(s, bool) or int(s) != s or s < 0 for s in sizes):
        raise ConfigError(f"split sizes {list(sizes)} are not two or three non-negative integers")
    if seed < 0:
        raise ConfigError(f"split seed {seed} is negative; take 0 or more")
    counts = [int(size) for size in sizes]
    if sum(counts) > n_frames:
        raise DataError(
            f"a split of {counts} frames asks for {sum(counts)}, the dataset has {n_frames}; ask for fewer"
        )
    if dataset is not None and len(dataset) != n_frames:
        raise DataError(
            f"dataset {dataset.metadata.name!r} has {len(dataset)} frames, the split was asked for {n_frames}"
        )
    # NumPy promises the raw stream of PCG64 for ever, but not what Generator.permutation makes of it
    order = np.argsort(np.random.PCG64(seed).random_raw(n_frames), kind="stable")
    train, val, test, _ = np.split(order, np.cumsum([*counts, 0][:3]))
    return Splits(
        train,
        val,
        test,
        n_frames=n_frames,
        seed=seed,
        dataset=None if dataset is None else dataset.metadata.name,
        sha256={} if dataset is None else dict(dataset.metadata.sha256),
    )


def published_split(
    dataset: Dataset, train: str = "train", test: str = "test", val: str | None = None
) -> Splits:
    """Return splits that came with the dataset, unchanged.

    Args:
        dataset: with ``metadata.splits``.
        train: name of the training part there.
        test: name of the test part.
        val: name of the validation part; none where the publisher has none.

    Raises:
        DataError: the dataset has no split of that name.
    """
    published = dataset.metadata.splits
    for name in (train, test, *([] if val is None else [val])):
        if name not in published:
            known = ", ".join(published) or "none"
            raise DataError(
                f"dataset {dataset.metadata.name!r} has no published split {name!r}; it has: {known}"
            )
    return Splits(
        published[train],
        _no_frames() if val is None else published[val],
        published[test],
        n_frames=len(dataset),
        dataset=dataset.metadata.name,
        sha256=dict(dataset.metadata.sha256),
    )


def check_belongs(splits: Splits, dataset: Dataset) -> None:
    """Refuse splits that were made for another dataset.

    Raises:
        DataError: the number of frames, or the checksum of a file of the same name, differs.
    """
    name = dataset.metadata.name
    if splits.n_frames is not None and splits.n_frames != len(dataset):
        raise DataError(
            f"the splits are of a dataset of {splits.n_frames} frames, {name!r} has {len(dataset)}; "
            "use the splits that belong to it"
        )
    last = max((int(part.max()) for part in (splits.train, splits.val, splits.test) if len(part)), default=-1)
    if last >= len(dataset):
        raise DataError(
            f"the splits name frame {last}, {name!r} has {len(dataset)} frames; use its own splits"
        )
    if splits.sha256 and dataset.metadata.sha256 and dict(splits.sha256) != dict(dataset.metadata.sha256):
        raise DataError(
            f"the splits were made for other files (by checksum: {', '.join(splits.sha256)}) than those of "
            f"{name!r}; use the splits that belong to it"
        )


def save_splits(path: str | os.PathLike[str], splits: Splits) -> Path:
    """Write splits as JSON, or as ``.npz`` where the name ends so; never half a file.

    Raises:
        DataError: the file cannot be written.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "n_frames": splits.n_frames,
        "seed": splits.seed,
        "dataset": splits.dataset,
        "sha256": dict(splits.sha256),
    }
    if Path(path).suffix == ".npz":
        arrays = {part: splits[part] for part in PARTS}

        def write(file: Path) -> None:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]

        return _io.write_atomically(path, write)
    content = {**header, **{part: splits[part].tolist() for part in PARTS}}
    return _io.write_atomically(path, lambda file: _write_text(file, json.dumps(content) + "\n"))


def load_splits(path: str | os.PathLike[str], dataset: Dataset | None = None) -> Splits:
    """Read splits: JSON as :func:`save_splits` writes them, or ``.npz`` with train/val/test index arrays.

    Args:
        path: the file.
        dataset: refuse splits made for another one.

    Raises:
        DataError: the file is absent or damaged, its parts overlap, or it belongs to another dataset.
    """
    file = _io.existing_file(path, "split file")
    content = _read_npz(file) if zipfile.is_zipfile(file) or file.suffix == ".npz" else _read_json(file)
    if content.get("version", FORMAT_VERSION) > FORMAT_VERSION:
        raise DataError(
            f"{file}: was written by a newer version (format {content['version']}); update ffpretrain"
        )
    try:
        splits = Splits(
            content["train"],
            content.get("val", _no_frames()),
            content.get("test", _no_frames()),
            n_frames=content.get("n_frames"),
            seed=content.get("seed"),
            dataset=content.get("dataset"),
            sha256=content.get("sha256") or {},
        )
    except KeyError as error:
        raise DataError(f"{file}: has no {error} part; give a split file with train, val and test") from error
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    if dataset is not None:
        check_belongs(splits, dataset)
    return splits


def _indices(values: Any, part: str, n_frames: int | None) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        return _no_frames()
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"splits: {part!r} is {array.dtype} {array.shape}, expected a list of frame indices")
    indices = array.astype(np.int64)
    unique, counts = np.unique(indices, return_counts=True)
    if (counts > 1).any():
        raise DataError(
            f"splits: frame {unique[counts > 1][0]} stands twice in {part!r}; remove the duplicate"
        )
    if unique[0] < 0 or (n_frames is not None and unique[-1] >= n_frames):
        bad = unique[0] if unique[0] < 0 else unique[-1]
        last = "" if n_frames is None else f", the last is {n_frames - 1}"
        raise DataError(f"splits: {part!r} names frame {bad}, which does not exist{last}; correct the index")
    return indices


def _read_npz(file: Path) -> dict[str, Any]:
    arrays = _io.read_npz(file)
    content: dict[str, Any] = {}
    if "header" in arrays:
        try:
            content = json.loads(str(arrays["header"]))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: its header is damaged ({error}); write the splits again") from error
    for part, names in _NPZ_NAMES.items():
        for name in names:
            if name in arrays:
                content[part] = arrays[name]
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: is no JSON ({error}); write the splits again") from error
    if not isinstance(content, dict) or content.get("format", FORMAT) != FORMAT:
        raise DataError(f"{file}: is no split file; give one that save_splits wrote")
    return content


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
