"""Plots of training, parity and energy conservation. Figures are built without pyplot: no global state."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import DataError, MissingDependencyError
from ffpretrain.units import KCAL_PER_MOL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, told apart with every kind of colour blindness
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def require_matplotlib() -> None:
    """Make sure that figures can be drawn, before what they are to show is computed.

    Raises:
        MissingDependencyError: matplotlib cannot be loaded.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"figures need matplotlib, which cannot be loaded ({error}); install it anew: pip install "
            "--force-reinstall matplotlib"
        ) from error


def new_figure(width: float = 6.4, height: float = 4.2) -> Figure:
    """Return an empty figure, size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def read_columns(path: Path, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Read columns of a CSV log; rows where one is empty are left out.

    Args:
        path: a log with a header.
        names: columns wanted.

    Raises:
        DataError: the file or a column is missing.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such log")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in names if rows and name not in rows[0]]
    if missing or not rows:
        raise DataError(f"{path}: has no column {missing[0] if missing else names[0]!r}")
    kept = [row for row in rows if all(row[name] not in ("", None) for name in names)]
    return {name: np.array([float(row[name]) for row in kept]) for name in names}


def plot_loss(logs: dict[str, tuple[Path, str]]) -> Figure:
    """Plot a logged quantity of several runs over their steps, on a logarithmic axis.

    Args:
        logs: (CSV file, column) by label.
    """
    figure = new_figure(3.2 * len(logs) + 1.6)
    axes = figure.subplots(1, len(logs), squeeze=False)[0]
    for axis, colour, (name, (path, column)) in zip(axes, COLOURS, logs.items(), strict=False):
        data = read_columns(path, ["step", column])
        axis.plot(data["step"], data[column], color=colour)
        axis.set(xlabel="step", ylabel=column, title=name, yscale="log")
    return figure


def plot_force_parity(
    predicted: NDArray[np.float64], label: NDArray[np.float64], numbers: NDArray[np.int64], title: str
) -> Figure:
    """Plot predicted against reference force components, by element.

    Args:
        predicted: eV/Å ``[A, 3]``.
        label: eV/Å ``[A, 3]``.
        numbers: atomic numbers ``[A]``.
        title: of the figure.
    """
    from ase.data import chemical_symbols

    figure = new_figure(4.8, 4.6)
    axis = figure.subplots()
    limit = 1.05 * float(max(np.abs(label).max(), np.abs(predicted).max()))
    axis.plot([-limit, limit], [-limit, limit], color="0.6", lw=1, zorder=0)
    for colour, number in zip(COLOURS, sorted(set(numbers.tolist())), strict=False):
        own = numbers == number
        symbol = chemical_symbols[number]
        axis.plot(
            label[own].ravel(), predicted[own].ravel(), ".", ms=2, color=colour, label=symbol, rasterized=True
        )
    mae = float(np.abs(predicted - label).mean())
    axis.set(
        xlim=(-limit, limit),
        ylim=(-limit, limit),
        xlabel="reference force (eV/Å)",
        ylabel="predicted force (eV/Å)",
        title=f"{title}\nMAE {mae:.4f} eV/Å = {mae / KCAL_PER_MOL:.3f} kcal/mol/Å",
        aspect="equal",
    )
    axis.legend(markerscale=5, frameon=False)
    return figure


def plot_conservation(logs: dict[str, Path]) -> Figure:
    """Plot what should be conserved in NVE runs, beside the kinetic energy that is exchanged.

    Args:
        logs: CSV logs of :func:`ffpretrain.md.simulate` by label.
    """
    figure = new_figure(6.8, 2.6 * len(logs) + 0.4)
    axes = figure.subplots(len(logs), 1, squeeze=False)[:, 0]
    for axis, (name, path) in zip(axes, logs.items(), strict=True):
        data = read_columns(path, ["time_ps", "total_eV", "kinetic_eV"])
        kinetic = data["kinetic_eV"] - data["kinetic_eV"].mean()
        axis.plot(data["time_ps"], kinetic, color=COLOURS[5], lw=0.8, label="kinetic, mean removed")
        total = data["total_eV"] - data["total_eV"][0]
        axis.plot(data["time_ps"], total, color=COLOURS[1], lw=1.4, label="total, change from start")
        axis.set(xlabel="time (ps)", ylabel="energy (eV)", title=name)
        axis.legend(frameon=False, loc="upper right", fontsize="small")
    return figure
