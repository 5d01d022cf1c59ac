"""Revised MD17 (Christensen and von Lilienfeld, Mach. Learn.: Sci. Technol. 1, 045018, 2020)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets import _io
from ffpretrain.datasets._units import KCAL_ANGSTROM
from ffpretrain.datasets.arrays import ArrayDataset
from ffpretrain.datasets.cache import cache_folder
from ffpretrain.datasets.frames import Dataset, DatasetMetadata
from ffpretrain.errors import ConfigError, DataError, nearest

MOLECULES = (
    "aspirin",
    "azobenzene",
    "benzene",
    "ethanol",
    "malonaldehyde",
    "naphthalene",
    "paracetamol",
    "salicylic",
    "toluene",
    "uracil",
)
N_SPLITS = 5
KEYS = ("nuclear_charges", "coords", "energies", "forces")
# the publisher's README: coordinates in Å, energies in kcal/mol, forces in kcal/mol/Å
UNITS = KCAL_ANGSTROM
LEVELS = {"revised": "PBE/def2-SVP", "original": "PBE+vdW-TS"}
ENERGY_ZERO = "separated electrons and nuclei"
_LABEL_KEYS = {"revised": ("energies", "forces"), "original": ("old_energies", "old_forces")}
_ALIASES = {"salicylic acid": "salicylic", "salicylic-acid": "salicylic", "salicylic_acid": "salicylic"}
_PIECE = re.compile(r"_(train|test)_(\d\d)\.npz$")

Labels = Literal["revised", "original"]
Part = Literal["train", "test"]


def open_rmd17(
    path_or_molecule: str | os.PathLike[str],
    *,
    labels: Labels = "revised",
    split: int | None = None,
    part: Part | None = None,
    root: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Open revised MD17: a file by path, or a molecule by name from a folder or the cache.

    A split pair of files (``rmd17_aspirin_train_01.npz`` and ``..._test_01.npz``) opens as one dataset,
    training frames first, with ``metadata.splits["train"]`` and ``["test"]``. The archive's single file
    (``rmd17_aspirin.npz``) takes its splits from the published ``index_train_01.csv`` files where they lie in
    the same folder, in ``splits/`` or ``../splits/``: ``split=1`` as ``"train"`` and ``"test"``,
    ``split=None`` all of them as ``"train_01"``, ``"test_01"``, ...

    The geometries come from MD17's dynamics, on another potential energy surface than that of the revised
    labels; the frames' properties ``sampling_energy`` and ``sampling_forces`` are theirs on that one, in eV
    and eV/Å.

    Args:
        path_or_molecule: an ``.npz`` path, or a molecule such as ``"aspirin"``.
        labels: ``"revised"`` (PBE/def2-SVP) or ``"original"`` (MD17's own labels of the same frames).
        split: which of the five published splits, 1 to 5.
        part: give only the frames of ``"train"`` or ``"test"`` of the split.
        root: folder to search for a molecule; the cache folder otherwise.

    Raises:
        DataError: the file is absent or damaged, or the molecule is unknown.
        ConfigError: ``labels``, ``split`` or ``part`` is none of its values.
    """
    _check_options(labels, split, part)
    if _is_path(path_or_molecule):
        files: Sequence[Path] = [_io.existing_file(path_or_molecule, "rMD17 file")]
        name = _name_of(files[0])
    else:
        molecule = molecule_name(str(path_or_molecule))
        name = f"rmd17-{molecule}"
        files = _find(molecule, split, part, root)
    if len(files) == 2:
        return _open_pair(files[0], files[1], name, labels)
    piece = _PIECE.search(files[0].name)
    if piece and (part not in (None, piece[1]) or split not in (None, int(piece[2]))):
        raise DataError(
            f"{files[0]}: is the {piece[1]} part of split {int(piece[2])}, not split={split} part={part}"
        )
    dataset = _open_file(files[0], name, labels, {} if piece else _published_splits(files[0], split))
    if part is None or piece:
        return dataset
    key = part if split is not None else f"{part}_01"
    if key not in dataset.metadata.splits:
        raise DataError(
            f"{files[0]}: no split file index_{part}_{split or 1:02d}.csv beside it, so its {part} part is "
            "unknown; put the archive's splits/ folder next to it"
        )
    return dataset[dataset.metadata.splits[key]]


def molecule_name(text: str) -> str:
    """Return the name of an rMD17 molecule as the files spell it.

    Raises:
        DataError: there is no such molecule; the nearest names are offered.
    """
    name = text.strip().lower()
    name = _ALIASES.get(name, name)
    if name not in MOLECULES:
        raise DataError(f"rMD17 has no molecule {text!r}{nearest(name, MOLECULES)}")
    return name


def _check_options(labels: str, split: int | None, part: str | None) -> None:
    if labels not in LEVELS:
        raise ConfigError(f"labels={labels!r} is not known for rMD17{nearest(str(labels), LEVELS)}")
    if split is not None and split not in range(1, N_SPLITS + 1):
        raise ConfigError(f"split={split!r} is not one of rMD17's published splits 1 to {N_SPLITS}")
    if part is not None and part not in ("train", "test"):
        raise ConfigError(f"part={part!r} is not known for rMD17{nearest(str(part), ('train', 'test'))}")


def _is_path(source: str | os.PathLike[str]) -> bool:
    return not isinstance(source, str) or source.endswith(".npz") or os.sep in source


def _name_of(file: Path) -> str:
    match = re.match(r"rmd17_([a-z]+)", file.stem)
    return f"rmd17-{match[1]}" if match else file.stem


def _find(
    molecule: str, split: int | None, part: str | None, root: str | os.PathLike[str] | None
) -> Sequence[Path]:
    folder = Path(root).expanduser() if root is not None else cache_folder() / "rmd17"
    if root is not None and not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give root= the folder that holds the rMD17 files")
    parts = ("train", "test") if part is None else (part,)
    for place in (folder, folder / "rmd17", folder / "npz_data", folder / "rmd17" / "npz_data"):
        whole = place / f"rmd17_{molecule}.npz"
        if whole.is_file():
            return [whole]
        pieces = [place / f"rmd17_{molecule}_{p}_{split or 1:02d}.npz" for p in parts]
        if all(piece.is_file() for piece in pieces):
            return pieces
    raise DataError(
        f"{folder}: holds neither rmd17_{molecule}.npz nor rmd17_{molecule}_train_{split or 1:02d}.npz and "
        "its _test_ file; run 'ffpretrain data download rmd17' or give root= the folder that has them"
    )


def _open_pair(train: Path, test: Path, name: str, labels: str) -> ArrayDataset:
    first, second = (_load(path, labels) for path in (train, test))
    if not np.array_equal(first["nuclear_charges"], second["nuclear_charges"]):
        raise DataError(f"{test}: its atoms differ from those of {train.name}; they are not one split")
    both = {key: np.concatenate([first[key], second[key]]) for key in first if key != "nuclear_charges"}
    both["nuclear_charges"] = first["nuclear_charges"]
    if "old_indices" in both and len(np.unique(both["old_indices"])) < len(both["old_indices"]):
        raise DataError(f"{test}: shares frames with {train.name}; the two files are not one published split")
    n_train, n_all = len(first["coords"]), len(both["coords"])
    splits = {"train": np.arange(n_train), "test": np.arange(n_train, n_all)}
    return _dataset(
        f"{train.name} + {test.name}", both, _metadata([train, test], name, labels, splits), labels
    )


def _open_file(path: Path, name: str, labels: str, splits: dict[str, NDArray[np.int64]]) -> ArrayDataset:
    arrays = _load(path, labels)
    for key, indices in splits.items():
        if len(indices) and indices.max() >= len(arrays["coords"]):
            raise DataError(
                f"{path}: has {len(arrays['coords'])} frames but the published split {key!r} names frame "
                f"{indices.max()}; the file is not the whole archive file"
            )
    return _dataset(path, arrays, _metadata([path], name, labels, splits), labels)


def _load(path: Path, labels: str) -> dict[str, NDArray[Any]]:
    energy_key, force_key = _LABEL_KEYS[labels]
    needed = ("nuclear_charges", "coords", energy_key, force_key)
    sampled = ("old_energies", "old_forces") if labels == "revised" else ()
    arrays = _io.read_npz(path, (*needed, *sampled, "old_indices"))
    missing = [key for key in needed if key not in arrays]
    if missing:
        raise DataError(f"{path}: has no {missing[0]!r}, so it is no rMD17 file with {labels} labels")
    _io.check_real(
        path, arrays, ("coords", energy_key, force_key, *(key for key in sampled if key in arrays))
    )
    return arrays


def _dataset(
    file: object, arrays: dict[str, NDArray[Any]], metadata: DatasetMetadata, labels: str
) -> ArrayDataset:
    energy_key, force_key = _LABEL_KEYS[labels]
    properties = {"old_index": arrays["old_indices"]} if "old_indices" in arrays else {}
    if labels == "revised" and "old_energies" in arrays:
        properties["sampling_energy"] = UNITS.energies(arrays["old_energies"])
    if labels == "revised" and "old_forces" in arrays:
        properties["sampling_forces"] = UNITS.forces(arrays["old_forces"])
    return ArrayDataset(
        file,
        arrays["nuclear_charges"],
        arrays["coords"],
        metadata,
        energy=UNITS.energies(arrays[energy_key]),
        forces=UNITS.forces(arrays[force_key]),
        properties=properties,
    )


def _metadata(
    files: Sequence[Path], name: str, labels: str, splits: dict[str, NDArray[np.int64]]
) -> DatasetMetadata:
    return DatasetMetadata(
        name=name if labels == "revised" else f"{name}-original-labels",
        source=" + ".join(file.name for file in files),
        sha256={file.name: _io.sha256_of(file) for file in files},
        level_of_theory=LEVELS[labels],
        energy_zero=ENERGY_ZERO,
        licence="CC0-1.0",
        units=UNITS.as_dict(),
        splits=splits,
        properties={
            "old_index": "index of the frame in the original MD17 file",
            "sampling_energy": "eV",
            "sampling_forces": "eV/Å",
        },
    )


def _published_splits(file: Path, split: int | None) -> dict[str, NDArray[np.int64]]:
    found: dict[str, NDArray[np.int64]] = {}
    for folder in (file.parent, file.parent / "splits", file.parent.parent / "splits"):
        for number in range(1, N_SPLITS + 1) if split is None else (split,):
            for part in ("train", "test"):
                table = folder / f"index_{part}_{number:02d}.csv"
                if table.is_file():
                    found.setdefault(
                        part if split is not None else f"{part}_{number:02d}", read_indices(table)
                    )
    return found


def read_indices(table: Path) -> NDArray[np.int64]:
    """Read a published split file: one frame index a line.

    Raises:
        DataError: a line is not a non-negative integer, or an index stands twice.
    """
    try:
        indices = np.array([int(line) for line in table.read_text().split()], dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{table}: is not one frame index a line ({error}); download it again") from error
    if len(np.unique(indices)) != len(indices) or (len(indices) and indices.min() < 0):
        raise DataError(f"{table}: has negative or repeated frame indices; download it again")
    return indices
