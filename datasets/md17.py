"""MD17 and its coupled-cluster companion sets, as published at sgdml.org in kcal/mol and Å.

Sources: Chmiela et al., Sci. Adv. 3, e1603015 (2017) and Nat. Commun. 9, 3887 (2018).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffpretrain.datasets import _io
from ffpretrain.datasets._units import KCAL_ANGSTROM
from ffpretrain.datasets.arrays import ArrayDataset
from ffpretrain.datasets.cache import cache_folder
from ffpretrain.datasets.frames import Dataset, DatasetMetadata
from ffpretrain.datasets.npz import KEYS, efrz_dataset, text_of, units_of
from ffpretrain.errors import DataError, nearest

ENERGY_ZERO = "separated electrons and nuclei"
_DFT = "PBE+vdW-TS"


@dataclass(frozen=True)
class Md17Set:
    """One published set.

    Attributes:
        files: names the file has had; a pair ``(train, test)`` for the coupled-cluster sets.
        level_of_theory: as published, for files that do not say it themselves.
    """

    files: tuple[str, ...]
    level_of_theory: str = _DFT
    paired: bool = False


def _dft(stem: str) -> Md17Set:
    return Md17Set((f"md17_{stem}.npz", f"{stem}_dft.npz"))


def _coupled_cluster(stem: str, level: str) -> Md17Set:
    return Md17Set((f"{stem}-train.npz", f"{stem}-test.npz"), level, paired=True)


SETS: dict[str, Md17Set] = {
    "aspirin": _dft("aspirin"),
    "azobenzene": Md17Set(("azobenzene_dft.npz", "md17_azobenzene.npz")),
    "benzene2017": _dft("benzene2017"),
    "benzene2018": Md17Set(("benzene2018_dft.npz", "md17_benzene2018.npz")),
    "ethanol": _dft("ethanol"),
    "malonaldehyde": _dft("malonaldehyde"),
    "naphthalene": _dft("naphthalene"),
    "paracetamol": Md17Set(("paracetamol_dft.npz", "md17_paracetamol.npz")),
    "salicylic": _dft("salicylic"),
    "toluene": _dft("toluene"),
    "uracil": _dft("uracil"),
    "aspirin-ccsd": _coupled_cluster("aspirin_ccsd", "CCSD/cc-pVDZ"),
    "benzene-ccsd-t": _coupled_cluster("benzene_ccsd_t", "CCSD(T)/cc-pVDZ"),
    "ethanol-ccsd-t": _coupled_cluster("ethanol_ccsd_t", "CCSD(T)/cc-pVTZ"),
    "malonaldehyde-ccsd-t": _coupled_cluster("malonaldehyde_ccsd_t", "CCSD(T)/cc-pVDZ"),
    "toluene-ccsd-t": _coupled_cluster("toluene_ccsd_t", "CCSD(T)/cc-pVDZ"),
}
"""The published sets by name. Two different benzene sets exist, so ``benzene`` alone is not a name."""


def open_md17(
    path_or_molecule: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    level_of_theory: str | None = None,
) -> Dataset:
    """Open a set of the MD17 page: a file by path, or a molecule by name from a folder or the cache.

    The coupled-cluster sets are published as a training and a test file: by name they open as one dataset
    with ``metadata.splits["train"]`` and ``["test"]``.

    Args:
        path_or_molecule: an ``.npz`` path, or a name of :data:`SETS` such as ``"aspirin"``.
        root: folder to search for a name; the cache folder otherwise.
        level_of_theory: the method, where neither the file nor the name says it.

    Raises:
        DataError: the file is absent or damaged, or the name is unknown.
    """
    text = str(path_or_molecule)
    if not isinstance(path_or_molecule, str) or text.endswith(".npz") or os.sep in text:
        file = _io.existing_file(path_or_molecule, "MD17 file")
        known = next((name for name, known in SETS.items() if file.name in known.files), None)
        level = level_of_theory or (SETS[known].level_of_theory if known else None)
        return _open(file, f"md17-{known or file.stem}", level)
    name = text.strip().lower().replace("(", "-").replace(")", "").replace("--", "-").replace(" ", "-")
    if name not in SETS:
        raise DataError(f"MD17 has no set {text!r}{nearest(name, SETS)}")
    chosen = SETS[name]
    files = _find(name, chosen, root)
    opened = [_open(file, f"md17-{name}", level_of_theory or chosen.level_of_theory) for file in files]
    return opened[0] if len(opened) == 1 else _join(opened[0], opened[1], files)


def _find(name: str, chosen: Md17Set, root: str | os.PathLike[str] | None) -> Sequence[Path]:
    folder = Path(root).expanduser() if root is not None else cache_folder() / "md17"
    for place in (folder, folder / chosen.files[0].removesuffix("-train.npz")):
        present = [place / file for file in chosen.files if (place / file).is_file()]
        if chosen.paired and len(present) == 2:
            return present
        if present and not chosen.paired:
            return present[:1]
    wanted = " and ".join(chosen.files) if chosen.paired else " nor ".join(chosen.files)
    lacks = "does not hold" if chosen.paired else "holds neither"
    raise DataError(
        f"{folder}: {lacks} {wanted}; run 'ffpretrain data download md17-{name}' or give root= their folder"
    )


def _open(file: Path, name: str, level_of_theory: str | None) -> ArrayDataset:
    arrays = _io.read_npz(file, KEYS)
    # the publisher's page declares the units; a file that says otherwise is not one of its own
    units = units_of(file, arrays, KCAL_ANGSTROM.as_dict())
    theory = text_of(arrays["theory"]) if "theory" in arrays else ""
    metadata = DatasetMetadata(
        name=name,
        source=file.name,
        sha256={file.name: _io.sha256_of(file)},
        level_of_theory=level_of_theory or (theory if theory != "unknown" else "") or None,
        energy_zero=ENERGY_ZERO,
        units=units.as_dict(),
    )
    return efrz_dataset(file, arrays, units, metadata)


def _join(train: ArrayDataset, test: ArrayDataset, files: Sequence[Path]) -> ArrayDataset:
    if not np.array_equal(train.numbers, test.numbers):
        raise DataError(f"{files[1]}: its atoms differ from those of {files[0].name}; they are not one set")
    splits = {"train": np.arange(len(train)), "test": np.arange(len(train), len(train) + len(test))}
    metadata = DatasetMetadata(
        name=train.metadata.name,
        source=" + ".join(file.name for file in files),
        sha256={**train.metadata.sha256, **test.metadata.sha256},
        level_of_theory=train.metadata.level_of_theory,
        energy_zero=train.metadata.energy_zero,
        units=train.metadata.units,
        splits=splits,
    )
    both = [(one, other) for one, other in ((train.energy, test.energy), (train.forces, test.forces))]
    energy, forces = (None if a is None or b is None else np.concatenate([a, b]) for a, b in both)
    positions = np.concatenate([train.positions, test.positions])
    return ArrayDataset(files[0], train.numbers, positions, metadata, energy=energy, forces=forces)
