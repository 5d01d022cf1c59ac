"""The plots of the report, on one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ffpretrain.md.validation.result import Check
from ffpretrain.plots import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(checks: Mapping[str, Check]) -> Figure | None:
    """Return the plots of every check that has curves; None where none has."""
    chosen = [(plot, checks[name]) for name, plot in _PLOTS.items() if _has_curve(checks.get(name))]
    if not chosen:
        return None
    n_rows = (len(chosen) + 1) // 2
    figure = new_figure(9.0, 2.9 * n_rows)
    axes = figure.subplots(n_rows, 2, squeeze=False).ravel()
    for axis, (plot, check) in zip(axes, chosen, strict=False):
        plot(axis, check)
    for axis in axes[len(chosen) :]:
        axis.axis("off")
    return figure


def embedded(figure: Figure) -> str:
    """Return a figure as the text of an ``<img>`` source: a PNG in base 64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _has_curve(check: Check | None) -> bool:
    return check is not None and bool(check.series or check.measured.get("wavenumbers"))


def _energy(axis: Any, check: Check) -> None:
    s = check.series
    axis.plot(s["time"], s["kinetic"], color=COLOURS[5], lw=0.8, label="kinetic, mean removed")
    axis.plot(s["time"], s["total"], color=COLOURS[1], lw=1.4, label="total, change from start")
    axis.set(xlabel="time (ps)", ylabel="energy (meV/atom)", title="constant energy")
    axis.legend(frameon=False, fontsize="small")


def _distances(axis: Any, check: Check) -> None:
    s = check.series
    axis.plot(s["distance"], s["data"], color="0.4", lw=1.6, label="training data")
    axis.plot(s["distance"], s["model"], color=COLOURS[0], lw=1.0, label="dynamics")
    kelvin = check.measured["temperature"]
    axis.set(xlabel="distance (Å)", ylabel="h(r) (1/Å)", title=f"interatomic distances, {kelvin:g} K")
    axis.legend(frameon=False, fontsize="small")


def _stretch(axis: Any, check: Check) -> None:
    axis.plot(check.series["length"], check.series["energy"], color=COLOURS[2], lw=1.2)
    axis.set(xlabel="bond length (Å)", ylabel="energy (eV)", title=f"{check.measured['bond_name']} stretched")


def _wavenumbers(axis: Any, check: Check) -> None:
    numbers = check.measured["wavenumbers"]
    colours = [COLOURS[1] if number < 0 else COLOURS[0] for number in numbers]
    axis.vlines(numbers, 0, 1, color=colours, lw=1)
    axis.set(xlabel="wavenumber (1/cm), imaginary ones negative", yticks=[], title="vibrations")


def _own_frames(axis: Any, check: Check) -> None:
    reference, model = check.series["reference"], check.series["model"]
    limit = 1.05 * max(abs(value) for value in (*reference, *model))
    axis.plot([-limit, limit], [-limit, limit], color="0.6", lw=1, zorder=0)
    axis.plot(reference, model, ".", ms=2, color=COLOURS[3])
    axis.set(
        xlabel="reference force (eV/Å)", ylabel="model's force (eV/Å)", title="frames of its own trajectory"
    )


_PLOTS: dict[str, Callable[[Any, Check], None]] = {
    "nve": _energy,
    "distances": _distances,
    "stretch": _stretch,
    "vibrations": _wavenumbers,
    "own-frames": _own_frames,
}
