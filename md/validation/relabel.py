"""How large is the error on frames of the model's own trajectory, against a reference calculator?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.datasets._io import read_npz
from ffpretrain.datasets.engines import Engine, one_thread, open_engine
from ffpretrain.datasets.sampling import EngineFailure, engine_errors
from ffpretrain.datasets.structures import charge_and_spin
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.validation.progress import progress_bar
from ffpretrain.md.validation.result import Check
from ffpretrain.md.validation.state import write_arrays
from ffpretrain.units import KCAL_PER_MOL, force_unit

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.md.validation.subject import Subject

#: engines whose name says their level of theory; of any other the user's word is taken
KNOWN = ("gfn2", "gfn1", "emt", "lj")

Array = NDArray[np.float64]


def open_reference(name: str, subject: Subject) -> Engine:
    """Return the reference calculator, as ``ffpretrain label`` resolves its name.

    Raises:
        ConfigError: no such engine, or its level of theory is known and not that of the model.
        MissingDependencyError: its package is not installed.
    """
    charge, spin = charge_and_spin(subject.atoms, None, None)
    engine = open_engine(name, charge=charge, spin=spin)
    level = subject.card.level_of_theory if subject.card is not None else None
    if engine.name in KNOWN and level is not None and level != engine.level_of_theory:
        raise ConfigError(
            f"the model was trained on {level}, {name!r} computes {engine.level_of_theory}: their difference "
            "is no error of the model; give a reference of the same level (or module:Class of a calculator)"
        )
    return engine


def check_own_frames(
    subject: Subject, frames: Sequence[Atoms], reference: str | None, path: Path, progress: bool
) -> Check:
    """Label the frames again and compare; labels are kept at ``path`` as they are computed.

    Args:
        subject: its model in float64 is compared.
        frames: of its own trajectory, with ``info["temperature"]``.
        reference: name of the engine; None leaves the check out.
        path: an ``.npz`` of labels so far.
        progress: show a bar.

    Raises:
        DataError: the reference failed on every frame.
    """
    if reference is None:
        return Check("own-frames", "not run", "give a calculator of the training data's level (--reference)")
    if not frames:
        return Check("own-frames", "not run", "the trajectory is too short to have frames")
    engine = open_reference(reference, subject)
    energy, forces = _labels(engine, frames, path, progress)
    good = np.isfinite(energy)
    if not good.any():
        raise DataError(f"the reference {reference!r} failed on every frame; try it on the structure itself")
    own = [_own(subject, frame) for frame in frames]
    energy_error = np.array([e for e, _ in own])[good] - energy[good]
    force_error = np.array([f for _, f in own])[good] - forces[good]
    kelvin = np.array([frame.info["temperature"] for frame in frames])[good]
    measured: dict[str, Any] = {
        "reference": engine.name,
        "level_of_theory": engine.level_of_theory,
        "level_checked": engine.name in KNOWN,
        "package": engine.package,
        "frames": int(good.sum()),
        "frames_failed": int((~good).sum()),
        **_errors(energy_error, force_error),
        "by_temperature": [
            {"temperature": float(t), **_errors(energy_error[kelvin == t], force_error[kelvin == t])}
            for t in np.unique(kelvin)
        ],
        "held_out": _held_out(subject),
    }
    mae = measured["forces_mae"]
    summary = f"force MAE {1e3 * mae:.1f} meV/Å ({mae / KCAL_PER_MOL:.3f} kcal/mol/Å) on {good.sum()} frames"
    summary += f" against {engine.level_of_theory}"
    if measured["held_out"]:
        summary += f"; on held-out data {1e3 * min(measured['held_out'].values()):.1f} meV/Å"
    flat = forces[good].ravel()
    some = np.linspace(0, len(flat) - 1, min(len(flat), 2000)).round().astype(int)
    series = {
        "reference": flat[some].round(5).tolist(),
        "model": (flat + force_error.ravel())[some].round(5).tolist(),
    }
    return Check("own-frames", "reported", summary, measured, series)


def _labels(engine: Engine, frames: Sequence[Atoms], path: Path, progress: bool) -> tuple[Array, Array]:
    """Return energies ``[F]`` eV and forces ``[F, N, 3]`` eV/Å, NaN where the engine failed."""
    energy = np.full(len(frames), np.nan)
    forces = np.full((len(frames), len(frames[0]), 3), np.nan)
    done = 0
    if path.exists():
        earlier = read_npz(path)
        done = int(earlier["done"])
        energy[:done], forces[:done] = earlier["energy"][:done], earlier["forces"][:done]
    with progress_bar("reference", len(frames), done, progress) as advance, one_thread():
        for place in range(done, len(frames)):
            atoms = frames[place].copy()
            atoms.calc = engine.calculator
            try:
                with engine_errors():
                    label = float(atoms.get_potential_energy()), np.array(atoms.get_forces())
                energy[place], forces[place] = label
            except EngineFailure:
                pass  # counted as a failed frame
            write_arrays(path, done=np.array(place + 1), energy=energy, forces=forces)
            advance(place + 1, "")
    return energy, forces


def _own(subject: Subject, frame: Atoms) -> tuple[float, Array]:
    subject.exact.calculate(frame)
    return subject.exact.results["energy"], subject.exact.results["forces"]


def _errors(energy: Array, forces: Array) -> dict[str, float]:
    """Return errors; energies without their mean, since the zeros of two programs differ."""
    centred = energy - energy.mean()
    return {
        "forces_mae": float(np.abs(forces).mean()),
        "forces_rmse": float(np.sqrt(np.square(forces).mean())),
        "forces_largest": float(np.abs(forces).max()),
        "energy_mae": float(np.abs(centred).mean()),
        "energy_rmse": float(np.sqrt(np.square(centred).mean())),
        "energy_offset": float(energy.mean()),
    }


def _held_out(subject: Subject) -> dict[str, float]:
    """Return the force errors in eV/Å that the card states."""
    if subject.card is None:
        return {}
    found = {}
    for name, errors in subject.card.errors.items():
        quantity = errors.quantities.get("forces_mae")
        if quantity is not None:
            found[name] = quantity.value * force_unit(quantity.unit)
    return found
