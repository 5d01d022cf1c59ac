"""Does the total energy stay what it is in dynamics without a thermostat?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain import units
from ffpretrain.errors import NonFiniteError
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.output import rows
from ffpretrain.md.simulation import simulate
from ffpretrain.md.stability import SimulationError
from ffpretrain.md.validation.plan import Plan
from ffpretrain.md.validation.result import Check, verdict
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.thresholds import NVE_DRIFT, NVE_SLOPE

if TYPE_CHECKING:
    from ase import Atoms

#: lines of the log, and points of the curve in the report
LINES = 2000
POINTS = 200


def check_conservation(subject: Subject, minimum: Atoms, plan: Plan, folder: Path, progress: bool) -> Check:
    """Run at constant energy from a minimum; go on with the run in the folder, if there is one.

    The slope is that of the least-squares line through the total energy at every step. The drift is the slope
    times the length of the run, over the standard deviation of the kinetic energy.

    Args:
        subject: as simulations use it.
        minimum: where the run starts.
        plan: its length.
        folder: of the run.
        progress: show a bar.
    """
    steps = plan.nve_steps
    begun = (folder / "restart.npz").exists()
    try:
        result = simulate(
            minimum,
            subject.working,
            ensemble="nve",
            temperature=plan.nve_temperature,
            timestep=plan.timestep,
            steps=steps,
            seed=subject.seed,
            minimize=True,
            out=folder,
            interval=max(1, steps // POINTS),
            log_interval=max(1, steps // LINES),
            resume=begun,
            overwrite=not begun,
            progress=progress,
        )
    except (SimulationError, NonFiniteError, AgreementError) as error:
        return Check("nve", "missed", f"stopped: {error}", {"time": None, "slope": None})
    summary = result.summary
    n_atoms = len(minimum)
    kinetic = 0.5 * summary["degrees_of_freedom"] * units.KB * summary["temperature"]["std"]
    slope = summary["conserved"]["drift"]
    drift = abs(slope) * 1e-3 * n_atoms * summary["time"]
    ratio = drift / kinetic if kinetic > 0 else float("inf")
    ok = abs(slope) <= NVE_SLOPE and ratio < NVE_DRIFT
    text = (
        f"{summary['time']:g} ps: slope {slope:+.5f} meV/atom/ps, drift {ratio:.4f} of the kinetic energy's "
        "standard deviation"
    )
    measured: dict[str, Any] = {
        "time": summary["time"],
        "slope": slope,
        "drift": drift,
        "kinetic_std": kinetic,
        "drift_over_kinetic_std": ratio,
        "spread": summary["conserved"]["spread"],
        "temperature": summary["temperature"],
        "ms_per_step": summary["speed"]["ms_per_step"],
        "backend": summary["backend"],
    }
    return Check("nve", verdict(ok), text, measured, _series(folder / "log.csv", n_atoms))


def _series(log: Path, n_atoms: int) -> dict[str, list[float]]:
    """Return time in ps, and the changes of total and kinetic energy in meV/atom."""
    table = rows(log)
    chosen = np.unique(np.linspace(0, len(table["step"]) - 1, POINTS).round().astype(int))
    per_atom = 1e3 / n_atoms
    total, kinetic = table["total_eV"][chosen], table["kinetic_eV"][chosen]
    return {
        "time": table["time_ps"][chosen].tolist(),
        "total": ((total - total[0]) * per_atom).tolist(),
        "kinetic": ((kinetic - kinetic.mean()) * per_atom).tolist(),
    }
