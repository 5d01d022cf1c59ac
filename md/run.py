"""One run of molecular dynamics: the loop, its files and its account."""

from __future__ import annotations

import json
import os
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from numpy.typing import NDArray

from ffpretrain._version import __version__
from ffpretrain.datasets.sampling import fixed_atoms
from ffpretrain.errors import ConfigError, DataError, NonFiniteError, UserError
from ffpretrain.md import velocities
from ffpretrain.md.calculator import FFCalculator
from ffpretrain.md.committee import SpreadRecord
from ffpretrain.md.compiled import COMPILE_MIN_STEPS
from ffpretrain.md.engines import make_integrator
from ffpretrain.md.native.ready import NATIVE_MIN_STEPS
from ffpretrain.md.output import (
    CsvLog,
    Paths,
    ProgressLine,
    TrajectoryWriter,
    labelled_frame,
    make_folder,
    output_paths,
    refuse_earlier_run,
    write_frame,
    write_text,
)
from ffpretrain.md.restart import Restart
from ffpretrain.md.settings import Settings
from ffpretrain.md.stability import SEARCH_INTERVAL, StabilityCheck
from ffpretrain.md.statistics import RunningMoments

if TYPE_CHECKING:
    from ase import Atoms

SCHEMA, VERSION = "ffpretrain-md", 1
UNITS = {
    "temperature": "K",
    "timestep": "fs",
    "time": "ps",
    "friction": "1/fs",
    "energy": "eV",
    "drift": "meV/atom/ps",
    "spread": "meV/atom",
    "forces_spread": "eV/Å",
    "speed": "ns/day",
}
#: eV/Å, and steps, where a minimisation before the dynamics stops
MINIMIZE_FMAX = 0.02
MINIMIZE_STEPS = 1000


class Run:
    """A simulation from its first step, or its restart file, to its last.

    Args:
        settings: of the run.
        calculator: evaluates the structure.
        atoms: the structure, used in place; may be None when ``resume``.
        out: folder or trajectory file; None writes nothing.
        resume: go on from the restart file.
        overwrite: replace an earlier run.
        progress: show a bar.

    Raises:
        DataError: the folder holds another run, or none where one was to be continued.
    """

    def __init__(
        self,
        settings: Settings,
        calculator: BaseCalculator,
        atoms: Atoms | None,
        out: str | os.PathLike[str] | None,
        *,
        resume: bool,
        overwrite: bool,
        progress: bool,
    ) -> None:
        self.settings, self.calculator, self.progress = settings, calculator, progress
        self.paths: Paths | None = None
        self.format = settings.format
        if out is not None:
            self.paths, self.format = output_paths(out, settings.format)
        self.restart: Restart | None = None
        if resume and self.paths is not None:
            self.restart = self._read_restart(self.paths, atoms)
        elif self.paths is not None and not overwrite:
            refuse_earlier_run(self.paths)
        start = atoms if self.restart is None else self.restart.atoms
        if start is None:
            raise DataError("there is no structure to start from; give one")
        self.atoms: Atoms = start
        self.constraints = list(self.atoms.constraints)
        fixed_atoms(self.atoms)  # refuses every other kind of constraint
        self.rng = np.random.default_rng(settings.seed)
        self.step = 0
        self.kinetic = RunningMoments()
        self.conserved = RunningMoments()
        self.spread = SpreadRecord()
        self.seconds = 0.0
        self.steps_here = 0

    def execute(self) -> None:
        """Prepare, run all steps that are left, and write the account.

        Raises:
            UserError: as :func:`ffpretrain.md.simulate`.
        """
        self._prepare()
        with ExitStack() as stack:
            if self.paths is not None:
                self._open_files(self.paths, stack)
            if self.restart is None:
                self._record()
                self._save()  # a run that is stopped early can go on, too
            self._loop()
            self._save()
        self.atoms.set_constraint(self.constraints)
        self.account = self.summary()
        if self.paths is not None:
            write_frame(self.paths.last_frame, self._frame())
            write_text(self.paths.result, json.dumps(self.account, indent=1) + "\n")
        self.atoms.calc = self.calculator

    def written(self) -> dict[str, Path]:
        """Return the files of the run by what they hold."""
        return {} if self.paths is None else self.paths._asdict()

    def summary(self) -> dict[str, Any]:
        """Return the account of the run; see ``docs/dynamics.md``."""
        s, atoms = self.settings, self.atoms
        ps = 1e-3 * s.timestep
        card = getattr(self.calculator, "card", None)
        speed = self.steps_here / self.seconds if self.seconds else None
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "units": UNITS,
            "package_version": __version__,
            "model": self._model(),
            "level_of_theory": None if card is None else card.level_of_theory,
            "structure": {"formula": atoms.get_chemical_formula(mode="hill"), "n_atoms": len(atoms)},
            "settings": {**s.identity(), "lost_distance": s.lost_distance},
            "steps": self.step,
            "time": self.step * ps,
            "degrees_of_freedom": self.integrator.dof,
            "temperature": {"mean": self.kinetic.mean_y, "std": self.kinetic.std_y},
            "potential_energy": float(atoms.get_potential_energy()),
            "conserved": self._drift(),
            "committee": self.spread.summary(),
            "speed": {
                "ns_per_day": None if speed is None else speed * ps * 86.4,
                "ms_per_step": None if speed is None else 1e3 / speed,
                "steps": self.steps_here,
            },
            "backend": self._backend(),
            "agreement": self.calculator.agreement() if isinstance(self.calculator, FFCalculator) else [],
            "files": {key: path.name for key, path in self.written().items()},
        }

    def _model(self) -> Any:
        return self.calculator.todict().get("model", self.calculator.name)

    def _backend(self) -> str:
        return getattr(self.calculator, "backend", self.calculator.name)

    def _drift(self) -> dict[str, float] | None:
        """Return slope and spread of the conserved quantity; None where the ensemble has none."""
        slope = self.conserved.slope
        if not self.integrator.conserves or slope is None:
            return None
        per_atom = 1e3 / len(self.atoms)
        return {"drift": slope * per_atom, "spread": self.conserved.std_y * per_atom}

    def _prepare(self) -> None:
        """Attach the calculator, relax, draw velocities or take the state of the restart file."""
        s, atoms = self.settings, self.atoms
        atoms.calc = self.calculator
        if isinstance(self.calculator, FFCalculator):
            self.calculator.expect(self._expected_steps())
        try:  # refuse what the model cannot evaluate before any file is made
            atoms.get_potential_energy()
        except PropertyNotImplementedError as error:
            raise ConfigError(
                "the model has no energy, so there are no dynamics with it: forces that are no gradient "
                "conserve nothing (nve) and have no distribution that a thermostat could sample; fine-tune "
                "it with labels, or relax with FIRE(ffpretrain.md.forces_only(atoms))"
            ) from error
        if isinstance(self.calculator, FFCalculator) and not self.calculator.conservative:
            warnings.warn(
                "the model's forces are not the gradient of its energy: the total energy will drift, and a "
                "thermostat samples no known distribution",
                stacklevel=4,
            )
        if self.restart is None:
            if s.minimize:
                self._minimize()
            if s.temperature is None:
                momenta = velocities.at_rest(atoms, atoms.get_momenta())
            else:
                momenta = velocities.draw_momenta(atoms, s.temperature, self.rng)
            atoms.set_momenta(momenta)
        options = (s.timestep, s.temperature or 0.0, s.friction, self.rng)
        self.integrator = make_integrator(s.engine, s.ensemble, atoms, self.calculator, *options)
        if self.restart is None and s.ensemble == "nve" and s.temperature:
            drawn = velocities.temperature(self._kinetic_energy(), self.integrator.dof)
            atoms.set_momenta(atoms.get_momenta() * np.sqrt(s.temperature / drawn))
        self.check = StabilityCheck(atoms, self._cutoff(), s.lost_distance)
        self.integrator.begin()
        if self.restart is not None:
            self._continue(self.restart)

    def _expected_steps(self) -> int:
        """Return the length that decides whether to compile: a run goes on as it began, however long."""
        if self.settings.engine != "ase":  # of the calculator's code the engine shares the native one alone
            return min(self.settings.steps, NATIVE_MIN_STEPS)
        if self.restart is None:
            return self.settings.steps
        had = self.restart.settings["backend"]
        return COMPILE_MIN_STEPS if "compiled" in had else NATIVE_MIN_STEPS if "native" in had else 0

    def _continue(self, restart: Restart) -> None:
        self.step = restart.step
        self.rng.bit_generator.state = restart.rng
        self.integrator.restore(restart.integrator)
        self.kinetic = RunningMoments(**restart.statistics["temperature"])
        self.conserved = RunningMoments(**restart.statistics["conserved"])
        self.spread = SpreadRecord(**restart.statistics.get("spread", {}))
        if self._backend() != restart.settings["backend"]:
            had, now = restart.settings["backend"], self._backend()
            mend = "set compile, dtype and device as they were"
            raise DataError(f"that run was evaluated by {had!r}, now it would be by {now!r}; {mend}")

    def _minimize(self) -> None:
        from ase.optimize import BFGS, LBFGS

        method: Any = BFGS if len(self.atoms) <= 200 else LBFGS
        optimizer = method(self.atoms, logfile=None)
        if not optimizer.run(fmax=MINIMIZE_FMAX, steps=MINIMIZE_STEPS):
            largest = float(np.linalg.norm(self.atoms.get_forces(), axis=1).max())
            warnings.warn(
                f"the minimisation stopped after {MINIMIZE_STEPS} steps with a largest force of "
                f"{largest:.3g} eV/Å (wanted {MINIMIZE_FMAX}); the dynamics start from there",
                stacklevel=2,
            )

    def _loop(self) -> None:
        s = self.settings
        shown = time.monotonic()
        with ProgressLine(s.steps, self.step, self.progress) as line:
            while self.step < s.steps:
                begun = time.perf_counter()
                self._advance()
                self.seconds += time.perf_counter() - begun
                if time.monotonic() - shown > 0.25 or self.step == s.steps:
                    shown = time.monotonic()
                    drift = self._drift()
                    line.update(
                        self.step,
                        self.kinetic.mean_y,
                        None if drift is None else drift["drift"],
                        self.steps_here / max(self.seconds, 1e-9) * s.timestep * 0.0864,
                    )

    def _advance(self) -> None:
        """Do one step, look at it, and write what is due."""
        s = self.settings
        before = (self.step, self.atoms.positions.copy(), self.atoms.get_momenta())
        try:
            self.integrator.step()
            self.step += 1
            self.steps_here += 1
            self.check.check_step(self.atoms, self.step)
            if self.step % SEARCH_INTERVAL == 0:
                self.check.search(self.atoms, self.step)
        except UserError as error:
            raise self._stopped(error, *before) from error
        self._record()
        if self.step % s.restart_interval == 0 and self.step < s.steps:
            self._save()

    def _stopped(
        self, error: UserError, step: int, positions: NDArray[np.float64], momenta: NDArray[np.float64]
    ) -> UserError:
        """Save the frame of a run that went wrong; return the error with where it is.

        Args:
            error: what happened.
            step: the last good one.
            positions: of that step.
            momenta: of that step.
        """
        broken = isinstance(error, NonFiniteError) or not np.isfinite(self.atoms.positions).all()
        if broken:
            self.step = step
            self.atoms.set_positions(positions, apply_constraint=False)
            self.atoms.set_momenta(momenta, apply_constraint=False)
        message = f"{error} (after {step} good steps)"
        if self.paths is not None:
            write_frame(self.paths.last_frame, self._frame())
            which = "the last good frame" if broken else "the frame"
            message += f"; {which} is in {self.paths.last_frame}"
        return type(error)(message)

    def _record(self) -> None:
        """Account for the present step; write a frame and a line of the log where they are due."""
        s = self.settings
        kinetic = self._kinetic_energy()
        potential = float(self.atoms.get_potential_energy())
        now = self.step * 1e-3 * s.timestep
        kelvin = velocities.temperature(kinetic, self.integrator.dof)
        conserved: float | None = None
        if self.integrator.conserves:
            conserved = potential + kinetic + self.integrator.bath_energy()
            self.conserved.add(now, conserved)
        self.kinetic.add(now, kelvin)
        self.spread.add(self.calculator.results)
        if self.paths is None:
            return
        if self.step % s.interval == 0:
            self.trajectory.write(self._frame())
        if self.step % s.log_interval == 0:
            values = {
                "temperature_K": kelvin,
                "potential_eV": potential,
                "kinetic_eV": kinetic,
                "total_eV": potential + kinetic,
                "conserved_eV": conserved,
            }
            self.log.write(self.step, now, values)

    def _frame(self) -> Atoms:
        time_ps = self.step * 1e-3 * self.settings.timestep
        return labelled_frame(self.atoms, self.constraints, step=self.step, time_ps=time_ps)

    def _kinetic_energy(self) -> float:
        return velocities.kinetic_energy(self.atoms.get_momenta(), self.atoms.get_masses())

    def _cutoff(self) -> float | None:
        runtimes = getattr(self.calculator, "runtimes", None)
        return None if not runtimes else min(runtime.cutoff for runtime in runtimes)

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same when the run is continued, as JSON gives it back."""
        prints = self.calculator.fingerprint() if isinstance(self.calculator, FFCalculator) else None
        calculator = {"calculator": self.calculator.name, "weights": prints}
        return json.loads(json.dumps({**self.settings.identity(), "format": self.format, **calculator}))

    def _save(self) -> None:
        """Write the restart file, after everything it speaks of."""
        if self.paths is None:
            return
        sums: dict[str, RunningMoments | SpreadRecord]
        sums = {"temperature": self.kinetic, "conserved": self.conserved, "spread": self.spread}
        Restart(
            atoms=self._frame(),
            step=self.step,
            settings={**self._identity(), "backend": self._backend(), "model": self._model()},
            integrator=self.integrator.state(),
            rng=self.rng.bit_generator.state,
            statistics={key: value.state() for key, value in sums.items()},
            files={"trajectory": self.trajectory.position(), "log": self.log.position()},
        ).save(self.paths.restart)

    def _open_files(self, paths: Paths, stack: ExitStack) -> None:
        make_folder(paths)
        keep = {"trajectory": 0, "log": 0} if self.restart is None else self.restart.files
        if self.restart is None:
            for path in paths:
                path.unlink(missing_ok=True)
        self.trajectory = TrajectoryWriter(paths.trajectory, self.format, keep["trajectory"])
        stack.callback(self.trajectory.close)
        self.log = CsvLog(paths.log, keep["log"])
        stack.callback(self.log.close)

    def _read_restart(self, paths: Paths, atoms: Atoms | None) -> Restart:
        if not paths.restart.exists():
            mend = "run without --resume"
            if paths.trajectory.exists():
                mend = "nothing of that run was saved; start again (--overwrite, overwrite=True)"
            raise DataError(f"{paths.restart}: no restart file to go on from; {mend}")
        restart = Restart.load(paths.restart)
        restart.check_settings(self._identity(), paths.restart, self._model())
        restart.check_continues(atoms, self.settings.steps, paths.restart)
        return restart
