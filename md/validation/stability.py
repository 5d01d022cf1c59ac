"""Do replicas at several temperatures survive, and do they look like the training data?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ffpretrain.md.replicas import Replicas
from ffpretrain.md.validation import distances
from ffpretrain.md.validation.bonds import Limits
from ffpretrain.md.validation.plan import Plan
from ffpretrain.md.validation.progress import progress_bar
from ffpretrain.md.validation.replica_run import ReplicaRun
from ffpretrain.md.validation.result import Check, verdict
from ffpretrain.md.validation.thresholds import HR_MAE

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.md.validation.subject import Subject
    from ffpretrain.md.validation.training_data import TrainingFrames

Array = NDArray[np.float64]


def make_replicas(subject: Subject, plan: Plan, temperatures: tuple[float, ...]) -> Replicas:
    """Return the evaluation of all replicas as one batch, compared with the plain one.

    Raises:
        AgreementError: it gives other numbers.
    """
    atoms = subject.atoms
    count = plan.replicas * len(temperatures)
    cell = np.array(atoms.cell.array)
    return Replicas(
        subject.runtime, atoms.numbers, atoms.positions, count, cell, atoms.pbc.tolist(), plan.stability_steps
    )


def run_replicas(
    subject: Subject,
    replicas: Replicas,
    plan: Plan,
    temperatures: tuple[float, ...],
    data: TrainingFrames | None,
    path: Path,
    progress: bool,
) -> ReplicaRun:
    """Move all replicas, or go on with the state at ``path``.

    They start from frames of the data, drawn by the seed, where there are some with atoms in the structure's
    order, else from the structure; temperatures alternate.
    """
    kelvin = np.tile(np.array(temperatures), plan.replicas)
    starts = np.repeat(subject.atoms.positions[None], len(kelvin), axis=0)
    if data is not None and data.ordered:
        generator = torch.Generator().manual_seed(subject.seed)
        drawn = torch.randperm(len(data.positions), generator=generator).numpy()
        starts = data.positions[np.resize(drawn, len(kelvin))]
    longest = data.longest if data is not None else None
    limits = Limits(subject.atoms, longest, subject.card, replicas.device)
    run = ReplicaRun(
        replicas, subject.atoms, starts, kelvin, limits, plan, subject.seed, path, counting=data is not None
    )
    with progress_bar("replicas", plan.stability_steps, run.step, progress) as advance:
        run.run(advance)
    return run


def check_stability(run: ReplicaRun, temperatures: tuple[float, ...], backend: str) -> Check:
    """Judge whether every replica reached the end."""
    plan, failures = run.plan, run.failures
    means = run.mean_temperatures()
    by_temperature = []
    for place, kelvin in enumerate(temperatures):
        own = means[place :: len(temperatures)]
        own = own[np.isfinite(own)]
        failed = sum(failure["temperature"] == kelvin for failure in failures)
        by_temperature.append(
            {
                "temperature": kelvin,
                "replicas": plan.replicas,
                "failed": failed,
                "mean_kinetic_temperature": float(own.mean()) if len(own) else None,
            }
        )
    shown = [{key: value for key, value in f.items() if key != "positions"} for f in failures]
    first = min(shown, key=lambda failure: failure["step"], default=None)
    where = " and ".join(f"{kelvin:g} K" for kelvin in temperatures)
    total = len(run.temperatures)
    if first is None:
        summary = f"{total} replicas at {where} stable for {plan.stability_ps:g} ps"
    else:
        summary = (
            f"{len(failures)} of {total} replicas at {where} failed; the first at {first['time']:.3f} ps "
            f"({first['temperature']:g} K): {first['cause']}"
        )
    measured: dict[str, Any] = {
        "time": plan.stability_ps,
        "replicas": total,
        "by_temperature": by_temperature,
        "first_failure": first,
        "failures": shown,
        "bond_lengths_from": run.limits.source,
        "backend": backend,
    }
    return Check("stability", verdict(not failures), summary, measured)


def check_distances(run: ReplicaRun, temperatures: tuple[float, ...], data: TrainingFrames | None) -> Check:
    """Compare the distribution of interatomic distances at the data's temperature with that of the data."""
    if data is None:
        return Check("distances", "not run", "give training data to compare distances with (--data)")
    kelvin = data.kelvin
    groups = torch.arange(len(run.temperatures)) % len(temperatures) == temperatures.index(kelvin)
    counts = run.distances.counts.cpu()[groups].numpy()
    if not counts.sum():
        return Check("distances", "missed", f"no replica at {kelvin:g} K lived long enough")
    own, as_sampled = distances.density(counts.sum(0)), distances.density(data.counts.sum(0))
    theirs = as_sampled if data.ensemble is None else distances.density(data.ensemble.counts)
    halves = data.counts if data.ensemble is None else data.ensemble.halves
    error = distances.mean_absolute_error(own, theirs)
    sampling, of_data = distances.sampling_error(counts), distances.sampling_error(halves)
    summary = f"h(r) MAE {error:.4f} against {data.name} at {kelvin:g} K"
    if data.measured is not None:
        summary += f" (measured from its forces: {data.measured.kelvin:.0f} K)"
    measured: dict[str, Any] = {
        "hr_mae": error,
        "sampling_error": sampling,
        "sampling_error_of_data": of_data,
        "temperature": kelvin,
        "measured_temperature": None if data.measured is None else data.measured.kelvin,
        "error_of_measured_temperature": None if data.measured is None else data.measured.error,
        "data": data.name,
        "frames": len(data.positions),
        "bin": distances.BIN,
        "reweighted": data.ensemble is not None,
    }
    if data.ensemble is not None:
        measured["effective_frames"] = data.ensemble.effective
        measured["hr_mae_as_sampled"] = distances.mean_absolute_error(own, as_sampled)
        summary += (
            f", its {len(data.positions)} frames reweighted to the ensemble of their labels (as sampled: "
            f"{measured['hr_mae_as_sampled']:.4f})"
        )
    status = verdict(error <= HR_MAE)
    if sampling is not None and of_data is not None:
        # independent errors of about the same shape add in squares
        perfect = float(np.hypot(sampling, of_data))
        measured["of_a_perfect_model"] = perfect
        summary += f"; with this little sampling a perfect model has about {perfect:.3f}"
        if status == "missed" and too_little_sampling(error, perfect):
            status = "undecided"
            summary += ": sample more (--level full, --replicas, more --data) to decide"
    last = int(np.flatnonzero(own + theirs).max()) + 2
    series = {
        "distance": distances.centres()[:last].tolist(),
        "model": own[:last].tolist(),
        "data": theirs[:last].tolist(),
    }
    return Check("distances", status, summary, measured, series)


def too_little_sampling(error: float, perfect: float) -> bool:
    """Say whether an h(r) above the threshold says nothing about the model.

    So it is where a perfect model would be above it as well, and what sampling leaves unexplained is below:
    the two add in squares.

    Args:
        error: measured.
        perfect: what a perfect model would show with the same sampling.
    """
    return perfect > HR_MAE and error**2 - perfect**2 <= HR_MAE**2


def failed_frames(atoms: Atoms, failures: list[dict[str, Any]]) -> list[Atoms]:
    """Return the structures at which replicas stopped, with what happened in ``info``."""
    frames = []
    for failure in failures:
        frame = atoms.copy()
        frame.positions = np.array(failure["positions"])
        frame.info = {key: value for key, value in failure.items() if key != "positions"}
        frames.append(frame)
    return frames
