"""What a simulation writes: a trajectory, a table of energies, and a line that says how it goes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from ffpretrain.datasets._io import write_atomically
from ffpretrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ase import Atoms

COLUMNS = (
    "step",
    "time_ps",
    "temperature_K",
    "potential_eV",
    "kinetic_eV",
    "total_eV",
    "conserved_eV",
)
FORMATS = ("traj", "extxyz")
_SUFFIXES = {".traj": "traj", ".extxyz": "extxyz", ".xyz": "extxyz"}


class Paths(NamedTuple):
    """Where the files of one run lie."""

    trajectory: Path
    log: Path
    restart: Path
    last_frame: Path
    result: Path


def output_paths(out: str | os.PathLike[str], format: str) -> tuple[Paths, str]:
    """Return the files of a run and the trajectory's format.

    Args:
        out: a folder, or a trajectory file (``.traj``, ``.extxyz``, ``.xyz``), which decides the format and
            gives its name to the others.
        format: for a folder.
    """
    path = Path(out).expanduser()
    chosen = _SUFFIXES.get(path.suffix.lower())
    if chosen is None:
        names = (f"trajectory.{format}", "log.csv", "restart.npz", "last_frame.extxyz", "md.json")
        return Paths(*(path / name for name in names)), format
    stem = path.with_suffix("")
    others = (".log.csv", ".restart.npz", ".last_frame.extxyz", ".md.json")
    return Paths(path, *(stem.with_name(stem.name + ending) for ending in others)), chosen


def trajectory_format(out: str | os.PathLike[str] | None, format: str | None) -> str:
    """Return the format that a run's trajectory is written in.

    Args:
        out: as for :func:`output_paths`, or None.
        format: what was asked for, or None.

    Raises:
        ConfigError: the file's ending says another format than the one asked for.
    """
    suffix = "" if out is None else Path(out).suffix.lower()
    of_file = _SUFFIXES.get(suffix)
    if of_file is not None and format is not None and format in FORMATS and format != of_file:
        raise ConfigError(
            f"{out}: a file that ends in {suffix} is written as {of_file}, not {format}; change the ending "
            "or leave out the format"
        )
    return of_file or format or FORMATS[0]


def refuse_input_as_output(paths: Paths, structure: object) -> None:
    """Refuse to write over the file that the structure is read from.

    Args:
        paths: what the run writes.
        structure: as given: a file, ``file@index``, or anything that is none.

    Raises:
        DataError: names the file.
    """
    if not isinstance(structure, str | os.PathLike):
        return
    name, at, index = str(structure).rpartition("@")
    source = Path(name if at and index.lstrip("-").isdigit() else structure).expanduser()
    if any(path.exists() and source.exists() and path.samefile(source) for path in paths):
        raise DataError(
            f"{source}: is the structure to start from, and the run would write over it; choose another --out"
        )


def refuse_earlier_run(paths: Paths) -> None:
    """Refuse to write where files are already.

    Raises:
        DataError: names one of them and what can be done.
    """
    there = [path for path in (paths.restart, paths.result, paths.trajectory) if path.exists()]
    if not there:
        return
    choices = "replace it (--overwrite, overwrite=True) or choose another --out"
    if there == [paths.trajectory]:  # of a run that saved nothing, or no trajectory of ours at all
        raise DataError(
            f"{paths.trajectory}: is here already, without the restart file of a run to go on with; {choices}"
        )
    raise DataError(f"{there[0]}: an earlier run is here; continue it (--resume, resume=True), {choices}")


def make_folder(paths: Paths) -> None:
    """Make the folder of a run and make sure that it can be written.

    Raises:
        DataError: it cannot.
    """
    folder = paths.trajectory.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: may not be written; choose another --out")


def labelled_frame(atoms: Atoms, constraints: list[Any], **info: Any) -> Atoms:
    """Return a copy of the atoms with its energy, forces and stress attached and no calculator of its own.

    The forces are the model's, not those that a constraint has altered.
    """
    from ase.calculators.singlepoint import SinglePointCalculator

    frame = atoms.copy()
    frame.set_constraint(constraints)
    frame.info.update(info)
    # results of other positions would be no labels of these
    fresh = atoms.calc is not None and not atoms.calc.check_state(atoms)
    found = atoms.calc.results if fresh else {}
    labels = {key: found[key] for key in ("energy", "free_energy", "forces", "stress") if key in found}
    frame.calc = SinglePointCalculator(frame, **labels)
    return frame


def write_frame(path: Path, frame: Atoms) -> None:
    """Write one frame as extended xyz, whole or not at all."""
    from ase.io.extxyz import write_extxyz

    write_atomically(path, lambda temporary: write_extxyz(str(temporary), [frame]))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


class TrajectoryWriter:
    """Appends frames to an ASE ``.traj`` or an extended xyz file.

    Args:
        path: the file.
        format: ``traj`` or ``extxyz``.
        keep: how much of an existing file belongs to the run (:meth:`position`); what lies beyond was written
            after the restart file and comes again. 0 starts a new file.

    Raises:
        DataError: the file holds less than ``keep`` or cannot be written.
    """

    def __init__(self, path: Path, format: str, keep: int = 0) -> None:
        self.path, self.format = path, format
        self._text: TextIO | None = None
        self._traj: Any = None
        if format == "extxyz":
            self._text = _open_text(path, keep)
            return
        from ase.io.trajectory import TrajectoryWriter as Writer

        self._frames = keep
        if keep:
            _keep_frames(path, keep)
        self._traj = Writer(str(path), mode="a" if keep else "w")

    def write(self, frame: Atoms) -> None:
        """Append a frame."""
        if self._text is None:
            self._traj.write(frame)
            self._frames += 1
            return
        from ase.io.extxyz import write_extxyz

        write_extxyz(self._text, [frame])

    def position(self) -> int:
        """Return how much has been written: frames of a ``.traj``, bytes of an extended xyz."""
        if self._text is None:
            return self._frames
        self._text.flush()
        return self._text.tell()

    def close(self) -> None:
        """Close the file."""
        (self._traj if self._text is None else self._text).close()


class CsvLog:
    """A table with one line for each logged step.

    Args:
        path: the file.
        keep: bytes of an existing file that belong to the run; 0 starts a new file.

    Raises:
        DataError: as :class:`TrajectoryWriter`.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self._file = _open_text(path, keep)
        if not keep:
            self._file.write(",".join(COLUMNS) + "\n")

    def write(self, step: int, time_ps: float, values: dict[str, float | None]) -> None:
        """Append a line; what is not defined stays empty."""
        cells = [str(step), f"{time_ps:.6f}"]
        for column in COLUMNS[2:]:
            value = values[column]
            cells.append("" if value is None else f"{value:.3f}" if column.endswith("_K") else f"{value:.8f}")
        self._file.write(",".join(cells) + "\n")

    def position(self) -> int:
        """Return the bytes written."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressLine:
    """A progress bar on stderr; a context manager that does nothing where ``shown`` is false."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._progress: Any = None
        if not shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("md"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr),
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=total, completed=done, note="")

    def __enter__(self) -> ProgressLine:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, step: int, temperature: float, drift: float | None, ns_per_day: float) -> None:
        """Show where the run is."""
        if self._progress is None:
            return
        shown = "" if drift is None else f"drift {drift:+.3f} meV/atom/ps  "
        note = f"{temperature:.0f} K  {shown}{ns_per_day:.2f} ns/day"
        self._progress.update(self._task, completed=step, note=note)


def _open_text(path: Path, keep: int) -> TextIO:
    """Open a text file for appending after its first ``keep`` bytes."""
    try:
        if keep:
            if not path.is_file() or path.stat().st_size < keep:
                raise DataError(
                    f"{path}: is missing or shorter than the restart file says; start the run anew"
                )
            os.truncate(path, keep)
        return path.open("a" if keep else "w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def _keep_frames(path: Path, keep: int) -> None:
    """Cut a ``.traj`` after its first frames. Its index lies in its head, so it is written anew."""
    from ase.io.trajectory import TrajectoryReader
    from ase.io.trajectory import TrajectoryWriter as Writer

    try:
        with TrajectoryReader(str(path)) as reader:
            found = len(reader)
            if found < keep:
                raise DataError(
                    f"{path}: holds {found} frames, the restart file says {keep}; start the run anew"
                )
            if found == keep:
                return

            def copy(temporary: Path) -> None:
                with Writer(str(temporary), mode="w") as writer:
                    for index in range(keep):
                        writer.write(reader[index])

            write_atomically(path, copy)
    except DataError:
        raise
    except Exception as error:  # ASE's reader raises anything at all on a damaged file
        raise DataError(f"{path}: cannot be continued ({error}); start the run anew") from error


def rows(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return a run's log as one array for each column; what is empty is NaN."""
    table = np.genfromtxt(path, delimiter=",", skip_header=1, ndmin=2)
    return {name: table[:, i] for i, name in enumerate(COLUMNS)}
