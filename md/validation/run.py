"""The door to the validation of a model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain.errors import ConfigError
from ffpretrain.md.calculator import Model
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.validation.examination import Validation
from ffpretrain.md.validation.plan import Plan, plan_of
from ffpretrain.md.validation.relabel import open_reference
from ffpretrain.md.validation.result import Check
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.training_data import Source, read_frames

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class ValidationResult:
    """What came of a validation.

    Attributes:
        passed: no check was missed.
        checks: by name.
        summary: what ``validation.json`` holds, with units.
        paths: files written, by what they hold; empty where nothing was.
    """

    passed: bool
    checks: dict[str, Check]
    summary: dict[str, Any]
    paths: dict[str, Path] = field(default_factory=dict)


def validate(
    model: Model,
    structure: Atoms | str | os.PathLike[str] | None = None,
    *,
    level: str | Plan = "quick",
    out: str | os.PathLike[str] | None = None,
    data: Source | Sequence[Source] | None = None,
    data_temperature: float | None = None,
    reference: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    compile: CompileOption = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> ValidationResult:
    """Examine how far a trained potential can be trusted; see ``docs/validation.md``.

    Args:
        model: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`.
        structure: a file or ``ase.Atoms``; None takes the model's own reference geometry.
        level: ``quick`` or ``full``, or a :class:`~ffpretrain.md.validation.Plan` of one's own.
        out: folder for the report and the state; None leaves nothing behind.
        data: training data (a file, or the name of a bundled dataset, or several) to compare distances with.
        data_temperature: K, at which the data were sampled; None measures it from their forces.
        reference: a calculator of the training data's level of theory, by the names of ``ffpretrain label``,
            for the error on the model's own trajectory.
        device: see :class:`~ffpretrain.FFCalculator`.
        dtype: precision of the dynamics.
        compile: likewise.
        seed: of every random draw.
        resume: go on with the validation in ``out``.
        overwrite: replace an earlier one.
        progress: show bars on stderr.
        report: is given one line for each thing worth knowing while it runs.

    Raises:
        ConfigError: an option out of range, or options that exclude each other.
        DataError: structure, data or output folder are missing or unusable, or hold another validation.
        ArtifactError: no such model.
        MissingDependencyError: the reference's package is not installed.
        UnsupportedInputError: the model cannot evaluate the structure.
    """
    _refuse_contradictions(out, resume, overwrite, data_temperature)
    plan = plan_of(level)
    subject = Subject(model, structure, device, dtype, compile, seed)
    if reference is not None:
        open_reference(reference, subject)
    frames = None
    if data is not None:
        sources = [data] if isinstance(data, str | os.PathLike) else list(data)
        frames = read_frames(sources, subject, data_temperature, plan.temperatures)
    temporary = tempfile.mkdtemp(prefix="ffpretrain-validate-") if out is None else None
    folder = Path(temporary if temporary is not None else os.fspath(out or "")).expanduser()
    try:
        validation = Validation(subject, plan, frames, reference, folder, progress, report)
        validation.prepare(resume, overwrite)
        validation.execute()
        summary = validation.write()
        paths = {} if temporary is not None else validation.written()
        return ValidationResult(summary["passed"], validation.ordered(), summary, paths)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _refuse_contradictions(
    out: str | os.PathLike[str] | None, resume: bool, overwrite: bool, kelvin: float | None
) -> None:
    if out is None and (resume or overwrite):
        raise ConfigError("resume and overwrite need the folder of the validation: give out=")
    if resume and overwrite:
        raise ConfigError("resume goes on with a validation, overwrite throws it away; choose one")
    if kelvin is not None and not (np.isfinite(kelvin) and kelvin > 0):
        raise ConfigError(f"data_temperature must be a positive number in K, not {kelvin}")
