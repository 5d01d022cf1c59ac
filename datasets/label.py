"""Making data where there is none: sample geometries of a structure and label them with an engine.

Finished frames go to a journal beside the target (``labels.h5.part``), one at a time, with the state of the
sampler behind them. When all are there the frame store is written in one go and the journal removed. The same
command repeated continues where the last one stopped, and a larger ``n`` extends a finished store.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain._version import __version__
from ffpretrain.datasets.engines import Engine, create_engine, one_thread, open_engine
from ffpretrain.datasets.frames import DatasetMetadata, Frame
from ffpretrain.datasets.journal import Journal, frame_from_json, frame_to_json
from ffpretrain.datasets.sampling import (
    METHODS,
    EngineFailure,
    Positions,
    Report,
    Sampler,
    Sampling,
    create_sampler,
    engine_errors,
    fixed_atoms,
)
from ffpretrain.datasets.store import FrameStore, StoreWriter
from ffpretrain.datasets.structures import charge_and_spin, read_structure
from ffpretrain.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["METHODS", "Engine", "Sampling", "create_engine", "label_dataset", "open_engine", "read_structure"]

MAX_FAILURES = 10
"""Failures in a row after which labelling gives up."""


def label_dataset(
    structure: str | os.PathLike[str] | Atoms,
    out: str | os.PathLike[str],
    engine: str | Engine = "gfn2",
    n: int = 200,
    method: str = "dynamics",
    temperature: float = 500.0,
    seed: int = 0,
    *,
    charge: int | None = None,
    spin: int | None = None,
    engine_options: Mapping[str, Any] | None = None,
    name: str | None = None,
    licence: str | None = None,
    precision: str = "float32",
    progress: bool = False,
    report: Report = print,
    **settings: float,
) -> FrameStore:
    """Sample geometries of a structure, label them with energies and forces, and keep them in a frame store.

    Positions are rounded to ``precision`` before they are labelled, so a label belongs to exactly the stored
    geometry. A geometry that the engine fails on is reported and replaced by the next one of the sampler.

    Args:
        structure: a file that ASE reads (``file@3`` for the fourth structure of several), or ``ase.Atoms``.
        out: the ``.h5`` file; while labelling goes on, frames are in ``<out>.part``.
        engine: a name for :func:`open_engine`, or an :class:`Engine`.
        n: number of frames in ``out`` at the end.
        method: ``dynamics``, ``normal-modes`` or ``gaussian``; see :class:`Sampling`.
        temperature: K, for dynamics and normal modes.
        seed: of the generator behind every draw.
        charge: total charge in e; None takes the structure's ``info["charge"]``, or 0.
        spin: multiplicity 2S + 1; None takes the structure's ``info["spin"]``, or 1.
        engine_options: handed to the engine.
        name: of the dataset; None makes one from formula and engine.
        licence: of the data.
        precision: ``float32`` or ``float64``, of stored positions and forces; energies are float64.
        progress: show a progress bar on standard error.
        report: called with one line for every replaced frame and for what is resumed.
        **settings: the other fields of :class:`Sampling`, such as ``spacing=40.0`` (fs).

    Returns:
        The finished store.

    Raises:
        DataError: the structure or ``out`` cannot be used, ``out`` was made by another command, or the engine
            fails on the structure or on ten geometries in a row.
        ConfigError: an option is unknown or out of range.
        MissingDependencyError: the engine's package is not installed.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, not {n}")
    if precision not in ("float32", "float64"):
        raise ConfigError(f"precision must be 'float32' or 'float64', not {precision!r}")
    sampling = _sampling(method, temperature, settings)
    atoms, label = read_structure(structure)
    charge, spin = charge_and_spin(atoms, charge, spin)
    if isinstance(engine, str):
        engine = open_engine(engine, charge=charge, spin=spin, **dict(engine_options or {}))
    elif engine_options:
        raise ConfigError("engine_options go with an engine's name; give them to the calculator itself")
    atoms.calc = engine.calculator
    like = _template(atoms, charge, spin)
    recipe = _recipe(like, engine, sampling, seed, precision)
    metadata = DatasetMetadata(
        name=name or f"{atoms.get_chemical_formula()}-{engine.name.rpartition(':')[2].lower()}",
        source=_command(label, Path(out).name, recipe, n, name, licence, engine_options),
        level_of_theory=engine.level_of_theory,
        energy_zero=engine.energy_zero,
        licence=licence,
    )
    run = _Run(Path(out), recipe, metadata, like, report)
    try:
        if run.done < n:
            with one_thread():
                _check_start(atoms, engine)
                sampler = create_sampler(atoms, sampling, np.random.default_rng(seed), report)
                run.label(sampler, atoms, n, _bar(progress, run.done, n))
        return run.finish()
    finally:
        run.leave()


class _Run:
    """What is done and what is left of one labelling command."""

    def __init__(
        self, out: Path, recipe: dict[str, Any], metadata: DatasetMetadata, like: Frame, report: Report
    ) -> None:
        self.out, self.recipe, self.metadata, self.like, self.report = out, recipe, metadata, like, report
        self.store = _open_finished(out, recipe)
        self.finished = 0 if self.store is None else len(self.store)
        header = {"recipe": recipe, "base": self.finished}
        self.journal = Journal(out.with_name(out.name + ".part"), header)
        try:
            _check_recipe(self.journal.path, self.journal.header["recipe"], recipe)
            base, more = self.journal.header["base"], len(self.journal.entries)
            if base != self.finished:
                # stopped after the store was put in place and before the journal was removed
                if self.finished != base + more:
                    raise DataError(f"{self.journal.path}: does not continue {out}; delete it to begin anew")
                self.journal.restart(header)
        except BaseException:
            self.journal.close()
            raise
        if self.done:
            report(f"{out}: {self.done} frames are there already")

    @property
    def done(self) -> int:
        """Number of frames labelled so far."""
        return self.finished + len(self.journal.entries)

    def state(self) -> dict[str, Any] | None:
        """State of the sampler behind the last frame."""
        if self.journal.entries:
            return dict(self.journal.entries[-1]["state"])
        return None if self.store is None else dict(self.store.notes["label"]["state"])

    def label(self, sampler: Sampler, atoms: Atoms, n: int, bar: Callable[[], Any]) -> None:
        """Label frames until there are ``n``."""
        state = self.state()
        if state is not None:
            sampler.restore(state)
        work = atoms.copy()
        work.calc = atoms.calc
        failures: list[str] = []
        with bar() as advance:
            while self.done < n:
                try:
                    frame = _label(work, sampler.next(), self.like, self.recipe["precision"])
                except EngineFailure as error:
                    failures.append(str(error))
                    self.report(f"frame {self.done}: the engine failed ({error}); sampling another geometry")
                    if len(failures) >= MAX_FAILURES:
                        raise DataError(
                            f"the engine failed {MAX_FAILURES} times in a row, last: {error}; try a lower "
                            "temperature, std or timestep"
                        ) from error
                    continue
                entry = {"frame": frame_to_json(frame), "state": sampler.state(), "replaced": failures}
                self.journal.append(entry)
                self.journal.entries.append(entry)
                failures = []
                advance()

    def leave(self) -> None:
        """Let go of the journal; one without a frame is deleted."""
        if self.journal.entries:
            self.journal.close()
        else:
            self.journal.remove()

    def finish(self) -> FrameStore:
        """Write the store from what was there and the journal, and remove the journal."""
        state = self.state()
        if self.journal.entries:
            replaced = list(self.store.notes["label"]["replaced"]) if self.store else []
            for index, entry in enumerate(self.journal.entries, start=self.finished):
                replaced += [{"frame": index, "reason": reason} for reason in entry["replaced"]]
            notes = {"recipe": self.recipe, "state": state, "replaced": replaced, "versions": _versions()}
            precision = self.recipe["precision"]
            with StoreWriter(
                self.out, self.metadata, positions=precision, forces=precision, notes={"label": notes}
            ) as writer:
                for index in range(self.finished):
                    writer.append(self.store[index])  # type: ignore[index]
                for entry in self.journal.entries:
                    writer.append(frame_from_json(entry["frame"], self.like))
        self.journal.remove()
        return FrameStore(self.out)


def _sampling(method: str, temperature: float, settings: Mapping[str, float]) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"unknown sampling setting {setting!r}{nearest(setting, known)}")
    return Sampling(method=method, temperature=temperature, **settings)


def _template(atoms: Atoms, charge: int, spin: int) -> Frame:
    fixed = np.zeros(len(atoms), bool)
    fixed[fixed_atoms(atoms)] = True
    return Frame(
        numbers=atoms.numbers.astype(np.int64),
        positions=atoms.positions.copy(),
        cell=np.array(atoms.cell) if atoms.pbc.any() else None,
        pbc=(bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2])),
        charge=charge,
        spin=spin,
        fixed=fixed if fixed.any() else None,
    )


def _check_start(atoms: Atoms, engine: Engine) -> None:
    """Refuse a structure that the engine cannot compute, whatever it raises for it, before any sampling."""
    try:
        with engine_errors():
            atoms.get_forces()
    except (EngineFailure, NotImplementedError, RuntimeError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"engine {engine.name!r} fails on the structure given: {lines[0]}") from error


def _label(atoms: Atoms, positions: Positions, like: Frame, precision: str) -> Frame:
    """Return the labelled frame at ``positions`` rounded to ``precision``."""
    from dataclasses import replace

    from ase.calculators.calculator import PropertyNotImplementedError

    rounded = positions.astype(precision).astype(np.float64)
    atoms.set_positions(rounded, apply_constraint=False)
    with engine_errors():
        try:  # the energy that the forces are the derivative of, where an engine tells the two apart
            energy = float(atoms.get_potential_energy(force_consistent=True))
        except PropertyNotImplementedError:
            energy = float(atoms.get_potential_energy())
        forces = np.array(atoms.get_forces(apply_constraint=False), np.float64)
        stress = None
        if atoms.pbc.all() and "stress" in atoms.calc.implemented_properties:
            stress = np.array(atoms.get_stress(voigt=False), np.float64)
    if not np.isfinite(energy) or not np.all(np.isfinite(forces)):
        raise EngineFailure("energy or forces are not finite")
    return replace(like, positions=rounded, energy=energy, forces=forces, stress=stress)


def _recipe(like: Frame, engine: Engine, sampling: Sampling, seed: int, precision: str) -> dict[str, Any]:
    """Return everything that determines the frames, as JSON gives it back."""
    recipe = {
        "structure": {
            "numbers": like.numbers.tolist(),
            "positions": like.positions.tolist(),
            "cell": None if like.cell is None else like.cell.tolist(),
            "pbc": like.pbc,
            "fixed": None if like.fixed is None else np.flatnonzero(like.fixed).tolist(),
        },
        "engine": engine.name,
        "level_of_theory": engine.level_of_theory,
        "package": engine.package,
        "options": dict(engine.options),
        "charge": like.charge,
        "spin": like.spin,
        **sampling.used(),
        "seed": seed,
        "precision": precision,
    }
    try:
        plain: dict[str, Any] = json.loads(json.dumps(recipe))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"engine options must be numbers, texts or lists, to be kept with the data: {error}"
        ) from error
    return plain


def _check_recipe(file: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if theirs == ours:
        return
    key = next(key for key in (*ours, *theirs) if theirs.get(key) != ours.get(key))
    was = "another structure" if key == "structure" else f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}"
    raise DataError(f"{file}: was begun with {was}; repeat that command or choose another output file")


def _open_finished(out: Path, recipe: Mapping[str, Any]) -> FrameStore | None:
    if not out.exists():
        return None
    store = FrameStore(out)
    if "label" not in store.notes:
        raise DataError(f"{out}: holds frames that were not made by labelling; choose another output file")
    _check_recipe(out, store.notes["label"]["recipe"], recipe)
    return store


def _command(
    structure: str,
    out: str,
    recipe: Mapping[str, Any],
    n: int,
    name: str | None,
    licence: str | None,
    engine_options: Mapping[str, Any] | None,
) -> str:
    """Return the command line that makes the same frames."""
    words = ["ffpretrain", "label", structure, "--engine", str(recipe["engine"]), "--n", str(n)]
    for key, value in (engine_options or {}).items():
        words += ["--engine-option", f"{key}={value}"]
    known = [field.name for field in fields(Sampling)]
    options = {key: recipe[key] for key in ("charge", "spin", "seed", "precision")}
    for key, value in {**{key: recipe[key] for key in known if key in recipe}, **options}.items():
        words += [f"--{key.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    for key, text in (("name", name), ("licence", licence)):
        if text is not None:
            words += [f"--{key}", text]
    return shlex.join([*words, "--out", out])


def _versions() -> dict[str, str]:
    return {"ffpretrain": __version__, **{p: importlib.metadata.version(p) for p in ("ase", "numpy")}}


def _bar(shown: bool, done: int, n: int) -> Callable[[], Any]:
    """Return a context manager that gives a function to call after each frame."""

    @contextmanager
    def hidden() -> Iterator[Callable[[], None]]:
        yield lambda: None

    @contextmanager
    def visible() -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("labelling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=n, completed=done)
            yield lambda: bar.advance(task)

    return visible if shown else hidden
