"""Molecular dynamics with a trained potential."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ase.calculators.calculator import BaseCalculator

from ffpretrain.errors import ConfigError, DataError
from ffpretrain.md.calculator import FFCalculator, Model
from ffpretrain.md.output import output_paths, refuse_input_as_output, trajectory_format
from ffpretrain.md.run import Run
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.settings import Settings
from ffpretrain.md.stability import LOST_DISTANCE
from ffpretrain.md.unfamiliar import Policy

if TYPE_CHECKING:
    from ase import Atoms

EngineName = Literal["ase", "openmm", "torchmd", "torch-sim"]
Ensemble = Literal["nvt-langevin", "nvt-bussi", "nvt-nose-hoover", "nve"]


@dataclass(frozen=True)
class SimulationResult:
    """What came of a simulation.

    Attributes:
        summary: temperature, drift of the conserved quantity, speed, …; what ``md.json`` holds, with units.
        atoms: the last frame, with momenta and its calculator.
        paths: files written, by what they hold; empty where nothing was.
    """

    summary: dict[str, Any]
    atoms: Atoms
    paths: dict[str, Path] = field(default_factory=dict)


def simulate(
    structure: Atoms | str | os.PathLike[str] | None,
    model: Model | Sequence[Model] | BaseCalculator,
    *,
    ensemble: Ensemble = "nvt-langevin",
    temperature: float | None = 300.0,
    timestep: float = 0.5,
    steps: int | None = None,
    time_ps: float | None = None,
    friction: float = 0.01,
    seed: int = 0,
    engine: EngineName = "ase",
    minimize: bool = False,
    out: str | os.PathLike[str] | None = None,
    format: Literal["traj", "extxyz"] | None = None,
    interval: int = 10,
    log_interval: int = 10,
    restart_interval: int = 1000,
    resume: bool = False,
    overwrite: bool = False,
    lost_distance: float | None = LOST_DISTANCE,
    device: str = "auto",
    dtype: str = "float32",
    compile: CompileOption = "auto",
    on_unfamiliar: Policy = "warn",
    progress: bool = False,
) -> SimulationResult:
    """Run molecular dynamics.

    Same structure, model, settings and seed give the same trajectory, bit for bit, on one CPU and number of
    threads; so does a run that was interrupted and continued with ``resume=True``.

    Args:
        structure: ``ase.Atoms`` (not changed), a structure file, or None for the model's own reference
            geometry. ``FixAtoms`` is obeyed; another constraint is refused.
        model: as for :class:`~ffpretrain.FFCalculator`, or a ready ASE calculator, which makes ``device``,
            ``dtype``, ``compile`` and ``on_unfamiliar`` meaningless.
        ensemble: the thermostat, or ``nve`` for none.
        temperature: K; of the thermostat, and of the velocities drawn at the start. With ``nve`` they are
            scaled to it exactly, and None keeps those of the structure. Total momentum and rotation are
            removed.
        timestep: fs.
        steps: length of the whole run, also when it is continued.
        time_ps: the same in ps; give one of the two.
        friction: 1/fs, the rate of the thermostat: Langevin's friction; for ``nvt-bussi`` and
            ``nvt-nose-hoover`` the inverse of their time constant.
        seed: of velocities and thermostat.
        engine: what moves the atoms, see ``docs/engines.md``. Files, minimisation and what stops a run are
            the same for all. Engines other than ``ase`` run one model of this package and have no
            ``nvt-bussi`` and ``nvt-nose-hoover``.
        minimize: relax the structure first, to 0.02 eV/Å.
        out: folder for trajectory, log, restart file and summary, or a trajectory file (``.traj``,
            ``.extxyz`` or ``.xyz``) beside which they lie; None writes nothing.
        format: of the trajectory; None takes that of the file's ending, and ``traj`` in a folder.
        interval: steps between frames.
        log_interval: steps between lines of the log.
        restart_interval: steps between restart files; one is written at the start and at the end as well.
        resume: go on from the restart file in ``out``.
        overwrite: replace an earlier run in ``out``.
        lost_distance: Å; see :class:`~ffpretrain.md.stability.StabilityCheck`. None lets molecules break.
        device: see :class:`~ffpretrain.FFCalculator`.
        dtype: likewise.
        compile: likewise; where there is no native code, ``auto`` compiles for runs of at least 20,000 steps.
        on_unfamiliar: likewise.
        progress: show a bar on stderr.

    Raises:
        ConfigError: an option out of range, or options that exclude each other.
        DataError: the structure or the output folder is missing or unusable, or holds another run.
        ArtifactError: no such model.
        UnsupportedInputError: the model cannot evaluate the structure, or the engine not move it.
        MissingDependencyError: the engine's package is not installed.
        SimulationError: atoms fly apart; the frame is saved as ``last_frame.extxyz``.
        NonFiniteError: an energy, force or position is not finite; the last finite frame is saved likewise.
    """
    settings = Settings(
        ensemble=ensemble,
        temperature=temperature,
        timestep=timestep,
        steps=_total_steps(steps, time_ps, timestep),
        friction=friction,
        seed=seed,
        minimize=minimize,
        interval=interval,
        log_interval=log_interval,
        restart_interval=restart_interval,
        lost_distance=lost_distance,
        format=trajectory_format(out, format),
        engine=engine,
    )
    if out is None and (resume or overwrite):
        raise ConfigError("resume and overwrite need the folder of the run: give out=")
    if resume and overwrite:
        raise ConfigError("resume goes on with a run, overwrite throws it away; choose one")
    if out is not None and not resume:
        refuse_input_as_output(output_paths(out, settings.format)[0], structure)
    if isinstance(model, BaseCalculator):
        calculator = model
    else:
        calculator = FFCalculator(model, device, dtype, compile, on_unfamiliar)
    atoms = _structure(structure, calculator, optional=resume)
    run = Run(settings, calculator, atoms, out, resume=resume, overwrite=overwrite, progress=progress)
    run.execute()
    return SimulationResult(run.account, run.atoms, run.written())


def _total_steps(steps: int | None, time_ps: float | None, timestep: float) -> int:
    if (steps is None) == (time_ps is None):
        raise ConfigError("give either the number of steps or the time in ps")
    if steps is not None:
        return steps
    if time_ps is None or not timestep > 0 or not 0 <= time_ps < float("inf"):
        raise ConfigError(f"time_ps={time_ps} and timestep={timestep} must be positive numbers")
    return round(1000.0 * time_ps / timestep)


def _structure(
    structure: Atoms | str | os.PathLike[str] | None, calculator: BaseCalculator, optional: bool
) -> Atoms | None:
    """Return a copy of the structure, or the model's own; None for a run that is continued without one."""
    from ffpretrain.datasets.structures import read_structure

    if structure is not None:
        return read_structure(structure)[0]
    if optional:
        return None
    card = getattr(calculator, "card", None)
    if card is None or card.reference_geometry is None:
        raise DataError("the model has no reference geometry of its own; give a structure")
    return card.reference_geometry.to_atoms()
