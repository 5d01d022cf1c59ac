"""The examination of one model: its checks in order, its state on disk, its report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ffpretrain._version import __version__
from ffpretrain.errors import DataError
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.output import labelled_frame, write_text
from ffpretrain.md.replicas import Replicas
from ffpretrain.md.validation import stability
from ffpretrain.md.validation.conservation import check_conservation
from ffpretrain.md.validation.engines import check_engines
from ffpretrain.md.validation.plan import Plan
from ffpretrain.md.validation.relabel import check_own_frames
from ffpretrain.md.validation.replica_run import read_kept
from ffpretrain.md.validation.report import html_report
from ffpretrain.md.validation.result import Check
from ffpretrain.md.validation.state import State
from ffpretrain.md.validation.stretch import check_stretch
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.symmetry import check_symmetry
from ffpretrain.md.validation.thresholds import TABLE
from ffpretrain.md.validation.training_data import TrainingFrames
from ffpretrain.md.validation.vibrations import check_vibrations

if TYPE_CHECKING:
    from ase import Atoms

SCHEMA, VERSION = "ffpretrain-validate", 1
UNITS = {
    "energy": "eV",
    "forces": "eV/angstrom",
    "time": "ps",
    "slope": "meV/atom/ps",
    "drift": "eV",
    "spread": "meV/atom",
    "temperature": "K",
    "measured_temperature": "K",
    "error_of_measured_temperature": "K",
    "wavenumber": "1/cm",
    "distance": "angstrom",
    "seconds": "s",
}
#: in the output folder, by what they hold
FILES = {
    "result": "validation.json",
    "report": "validation.html",
    "state": "state.json",
    "replicas": "replicas.npz",
    "frames": "frames.extxyz",
    "failures": "failures.extxyz",
    "nve": "nve",
}
#: every check, in order
ORDER = ("engines", "symmetry", "stretch", "vibrations", "nve", "stability", "distances", "own-frames")


class Validation:
    """One validation in its folder; arguments as :func:`~ffpretrain.md.validate`, resolved."""

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        data: TrainingFrames | None,
        reference: str | None,
        folder: Path,
        progress: bool,
        report: Callable[[str], None],
    ) -> None:
        self.subject, self.plan, self.data, self.reference = subject, plan, data, reference
        self.progress, self.report = progress, report
        self.paths = {key: folder / name for key, name in FILES.items()}
        wanted = plan.temperatures if data is None else (*plan.temperatures, data.kelvin)
        self.temperatures = tuple(sorted({float(kelvin) for kelvin in wanted}))
        self.state = State(self.paths["state"], self._identity())
        self._begun = time.monotonic()

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Make the folder, or take up what is in it.

        Raises:
            DataError: another validation is there, or none where one was to be gone on with.
        """
        state, folder = self.paths["state"], self.paths["state"].parent
        if resume:
            self.state = State.load(state, self.state.identity)
            self._forget_what_can_be_run_now()
            return
        there = [path for path in self.paths.values() if path.exists()]
        if there and not overwrite:
            raise DataError(
                f"{there[0]}: an earlier validation is here; go on with it (--resume, resume=True), "
                "replace it (--overwrite, overwrite=True) or choose another --out"
            )
        for path in [*there, *folder.glob("labels-*.npz"), self.paths["nve"] / "restart.npz"]:
            if path.is_file():
                path.unlink()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
        self.state.save()

    def execute(self) -> None:
        """Say how long it will take, run every check that is not done, and save after each."""
        replicas: Replicas | Check | None = None
        if not {"nve", "stability", "distances"} <= self.state.checks.keys():
            replicas = self._make_replicas()
        self._estimate(replicas)
        self._do("engines", lambda: check_engines(self.subject))
        self._do("symmetry", lambda: check_symmetry(self.subject))
        self._do("stretch", lambda: check_stretch(self.subject))
        self._do("vibrations", self._vibrations)
        self._do("nve", self._conservation)
        if isinstance(replicas, Check):
            self._finish(replicas)
            self._finish(Check("distances", "not run", "there are no replicas"))
        elif replicas is not None:
            self._run_replicas(replicas)
        self._do("own-frames", self._own_frames)

    def ordered(self) -> dict[str, Check]:
        """Return the checks done, in their order."""
        return {name: self.state.checks[name] for name in ORDER if name in self.state.checks}

    def written(self) -> dict[str, Path]:
        """Return what lies in the folder, by what it holds."""
        return {key: path for key, path in self.paths.items() if path.exists()}

    def write(self) -> dict[str, Any]:
        """Write result and report; return the result."""
        checks = self.ordered()
        subject = self.subject
        level = subject.card.level_of_theory if subject.card is not None else None
        summary = {
            "schema": SCHEMA,
            "version": VERSION,
            "units": UNITS,
            "package_version": __version__,
            "model": {
                "name": subject.name,
                "fingerprint": subject.exact.fingerprint()[0],
                "level_of_theory": level,
            },
            "structure": {
                "formula": subject.atoms.get_chemical_formula(mode="hill"),
                "n_atoms": len(subject.atoms),
                "periodic": subject.periodic,
            },
            "plan": self.plan.as_dict(),
            "device": str(subject.runtime.device),
            "dtype": str(subject.runtime.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "seed": subject.seed,
            "passed": not any(check.status == "missed" for check in checks.values()),
            "thresholds": {name: {"value": value, "unit": unit} for name, (value, unit) in TABLE.items()},
            "checks": {name: check.as_dict() for name, check in checks.items()},
            "seconds": round(self.state.seconds, 1),
        }
        write_text(self.paths["result"], json.dumps(summary, indent=1, allow_nan=False) + "\n")
        write_text(self.paths["report"], html_report(summary, checks))
        return summary

    def _identity(self) -> dict[str, Any]:
        subject, data = self.subject, self.data
        atoms = subject.atoms
        return {
            "model": subject.exact.fingerprint()[0],
            "structure": [atoms.numbers.tolist(), atoms.positions.tolist(), np.array(atoms.cell).tolist()],
            "level": self.plan.as_dict(),
            "temperatures": list(self.temperatures),
            "data": None if data is None else [data.name, len(data.positions), data.kelvin],
            "dtype": str(subject.runtime.dtype),
            "device": str(subject.runtime.device),
            "compile": subject.runtime.compile,
            "seed": subject.seed,
        }

    def _forget_what_can_be_run_now(self) -> None:
        """A check on own frames that had no reference, or another one, is done again."""
        if self.state.reference != self.reference:
            self.state.checks.pop("own-frames", None)

    def _do(self, name: str, check: Callable[[], Check]) -> None:
        if name not in self.state.checks:
            self._finish(check())

    def _finish(self, check: Check) -> None:
        self.state.checks[check.name] = check
        self.state.reference = self.reference
        now = time.monotonic()
        self.state.seconds += now - self._begun
        self._begun = now
        self.state.save()
        self.report(f"{check.name:<11} {check.status:<9} {check.summary}")

    def _vibrations(self) -> Check:
        check, minimum = check_vibrations(self.subject)
        self.state.minimum = minimum.positions.tolist()
        return check

    def _make_replicas(self) -> Replicas | Check:
        """Return the evaluation of all replicas, or the miss that there is none."""
        try:
            return stability.make_replicas(self.subject, self.plan, self.temperatures)
        except AgreementError as error:
            return Check("stability", "missed", str(error))

    def _conservation(self) -> Check:
        minimum = self.subject.atoms.copy()
        minimum.positions = np.array(self.state.minimum)
        return check_conservation(self.subject, minimum, self.plan, self.paths["nve"], self.progress)

    def _run_replicas(self, replicas: Replicas) -> None:
        subject, kelvin = self.subject, self.temperatures
        run = stability.run_replicas(
            subject, replicas, self.plan, kelvin, self.data, self.paths["replicas"], self.progress
        )
        if run.failures:
            _write_frames(self.paths["failures"], stability.failed_frames(subject.atoms, run.failures))
        self._do("stability", lambda: stability.check_stability(run, kelvin, replicas.backend))
        self._do("distances", lambda: stability.check_distances(run, kelvin, self.data))

    def _estimate(self, replicas: Replicas | Check | None) -> None:
        """Say how long what is left will take, from a second of each kind of evaluation.

        Labels by a reference are not in it: nothing is known of its speed.
        """
        subject, plan, done = self.subject, self.plan, self.state.checks
        atoms, total = subject.atoms, 0.0
        cell, pbc = np.array(atoms.cell.array), atoms.pbc.tolist()
        if "vibrations" not in done:
            # finite differences 12N, second derivatives 3N of twice the work, the stretch, the relaxation
            exact = subject.exact.runtimes[0]
            once = _seconds(lambda: exact.evaluate(atoms.numbers, atoms.positions, cell, pbc))
            total += (18 * len(atoms) + 300) * once
        if "nve" not in done:
            subject.working.expect(plan.nve_steps)
            with suppress(AgreementError):  # which is the check's to report
                runtime = subject.runtime
                once = _seconds(lambda: runtime.evaluate(atoms.numbers, atoms.positions, cell, pbc))
                total += plan.nve_steps * once
        if isinstance(replicas, Replicas) and "stability" not in done:
            copies = torch.tensor(atoms.positions, device=replicas.device).expand(replicas.count, -1, -1)
            total += plan.stability_steps * _seconds(lambda: replicas(copies))
        # integrators, checks of every step and files, as measured on molecules of 9 and 21 atoms
        self.report(f"level {plan.name}: about {_duration(1.15 * total)} on this machine")

    def _own_frames(self) -> Check:
        """Write the frames kept of the trajectory, and compare them with the reference."""
        frames = []
        path = self.paths["replicas"]
        for kept in read_kept(path) if path.exists() else []:
            frame = self.subject.atoms.copy()
            frame.positions = kept.positions
            frame.calc = self.subject.exact
            frame.get_potential_energy()
            kelvin = self.temperatures[kept.replica % len(self.temperatures)]
            ps = kept.step * 1e-3 * self.plan.timestep
            about = {"replica": kept.replica, "step": kept.step, "time_ps": ps, "temperature": kelvin}
            frames.append(labelled_frame(frame, [], **about))
        if frames:
            _write_frames(self.paths["frames"], frames)
        slug = re.sub(r"[^0-9A-Za-z]+", "-", self.reference or "none")
        labels = path.with_name(f"labels-{slug}.npz")
        return check_own_frames(self.subject, frames, self.reference, labels, self.progress)


def _write_frames(path: Path, frames: list[Atoms]) -> None:
    from ase.io.extxyz import write_extxyz

    from ffpretrain.datasets._io import write_atomically

    write_atomically(path, lambda temporary: write_extxyz(str(temporary), frames))


def _seconds(function: Callable[[], object], least: float = 1.0) -> float:
    """Return the time of one call, after one to warm up, over at least so many seconds of calls."""
    function()
    calls, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < least:
        function()
        calls += 1
    return spent / calls


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
