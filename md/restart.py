"""The restart file: everything a continued run needs to equal one that was never interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain.datasets._io import existing_file, read_npz, write_atomically
from ffpretrain.datasets.sampling import fixed_atoms
from ffpretrain.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

FORMAT = "ffpretrain.md.restart"
VERSION = 1
_ARRAYS = ("numbers", "positions", "momenta", "masses", "cell", "pbc", "fixed")


@dataclass
class Restart:
    """State of a simulation between two steps.

    Attributes:
        atoms: positions Å, momenta, masses, cell and fixed atoms, all float64 as they were.
        step: steps done.
        settings: what must not change when the run goes on.
        integrator: the thermostat's own variables.
        rng: state of the random generator.
        statistics: running sums.
        files: how much of each output file belongs to the steps done.
    """

    atoms: Atoms
    step: int
    settings: dict[str, Any]
    integrator: dict[str, Any]
    rng: Mapping[str, Any]
    statistics: dict[str, Any]
    files: dict[str, int]

    def save(self, path: Path) -> None:
        """Write the state, whole or not at all. JSON in an npz: no pickle, and every float exactly.

        Raises:
            DataError: the file cannot be written.
        """
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "settings": self.settings,
            "integrator": self.integrator,
            "rng": self.rng,
            "statistics": self.statistics,
            "files": self.files,
            "info": {key: self.atoms.info[key] for key in ("charge", "spin") if key in self.atoms.info},
        }
        arrays = {
            "numbers": self.atoms.numbers,
            "positions": self.atoms.positions,
            "momenta": self.atoms.get_momenta(),
            "masses": self.atoms.get_masses(),
            "cell": np.array(self.atoms.cell.array),
            "pbc": self.atoms.pbc,
            "fixed": fixed_atoms(self.atoms),
        }
        text = np.array(json.dumps(meta, default=_plain))
        write_atomically(path, lambda temporary: np.savez(temporary, meta=text, **arrays))

    @classmethod
    def load(cls, path: Path) -> Restart:
        """Read a state.

        Raises:
            DataError: the file is missing, damaged, no restart file or of a newer version.
        """
        from ase import Atoms
        from ase.constraints import FixAtoms

        arrays = read_npz(existing_file(path, "restart file"))
        if "meta" not in arrays or any(name not in arrays for name in _ARRAYS):
            raise DataError(f"{path}: is not a restart file; give the folder of an earlier run")
        try:
            meta = json.loads(str(arrays["meta"]))
        except ValueError as error:
            raise DataError(f"{path}: is damaged ({error}); start the run anew") from error
        if meta.get("format") != FORMAT or meta.get("version", 0) > VERSION:
            raise DataError(
                f"{path}: is of restart version {meta.get('version')}, this package reads up to {VERSION}; "
                "update the package"
            )
        atoms = Atoms(
            arrays["numbers"],
            positions=arrays["positions"],
            masses=arrays["masses"],
            cell=arrays["cell"],
            pbc=arrays["pbc"],
            info=meta["info"],
        )
        atoms.set_momenta(arrays["momenta"])
        if len(arrays["fixed"]):
            atoms.set_constraint(FixAtoms(indices=arrays["fixed"]))
        kept = {key: meta[key] for key in ("step", "settings", "integrator", "rng", "statistics", "files")}
        kept["settings"].setdefault("engine", "ase")  # files from before there was another
        return cls(atoms=atoms, **kept)

    def check_settings(self, settings: dict[str, Any], path: Path, model: Any = None) -> None:
        """Refuse to go on with other settings than those of the run.

        Args:
            settings: of now.
            path: of the file, for the message.
            model: name of that of now, or names.

        Raises:
            DataError: names what differs and how.
        """
        differ = [key for key in settings if settings[key] != self.settings.get(key)]
        if not differ:
            return
        key = differ[0]
        had, now = _short(self.settings.get(key)), _short(settings[key])
        what = f"that run had {key}={had}, now it is {now}"
        if key == "weights":  # checksums, which say nothing to a reader
            had, now = _names(self.settings.get("model", "another model")), _names(model)
            what = f"that run was of {had}, now it is {now}"
            if had == now:
                what = f"that run had other weights of the name {now}, or another dtype"
        raise DataError(
            f"{path}: {what}; a run is continued with its own model and settings (or start anew in another "
            "folder)"
        )

    def check_continues(self, atoms: Atoms | None, steps: int, path: Path) -> None:
        """Refuse to go on with another structure, or to fewer steps than are done.

        Args:
            atoms: the structure given, or None.
            steps: length of the whole run.
            path: of the file, for the message.

        Raises:
            DataError: says which of the two.
        """
        if atoms is not None and not np.array_equal(atoms.numbers, self.atoms.numbers):
            had, given = (a.get_chemical_formula(mode="hill") for a in (self.atoms, atoms))
            raise DataError(
                f"{path}: is of {had}, the structure given is {given} (or its atoms are in another order); "
                "leave it out"
            )
        if self.step > steps:
            raise DataError(
                f"{path}: that run has done {self.step} steps, more than the {steps} wanted; ask for more"
            )


def _names(model: Any) -> str:
    return _short(", ".join(map(str, model)) if isinstance(model, list | tuple) else model)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(value: Any) -> Any:
    """Turn numpy's scalars and arrays, which a generator's state may hold, into JSON's types."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept in a restart file")
