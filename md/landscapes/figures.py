"""Landscapes as figures: maps and curves, readable in grey and to the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.md.landscapes.surface import UNITS, Array, Axis, Landscape
from ffpretrain.plots import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

_STYLES = ("--", ":", "-.")
#: maps in one row
_ACROSS = 4


def draw(landscapes: Sequence[Landscape], unit: str = "kcal/mol", path: Array | None = None) -> Figure:
    """Return a figure of one or more landscapes on the same grid, with one scale for all.

    With two coordinates every model is a map, side by side, and the references are maps beside them; with one
    all are curves in one plot. Labelled frames are points. Standard errors are bars on a curve, and a map of
    their own beside maps.

    Args:
        landscapes: one for each model.
        unit: ``eV`` or ``kcal/mol``.
        path: points ``[T, 2]`` in the plane, such as a trajectory, drawn on every map.
    """
    if len(landscapes[0].axes) == 1:
        return _curves(landscapes, unit)
    references = landscapes[0].references
    maps: list[tuple[str, Array, Landscape | None]]
    maps = [(one.label, one.relative(), one) for one in landscapes]
    maps += [(name, values - np.nanmin(values), None) for name, values in references.items()]
    uncertain = [one for one in landscapes if one.uncertainty is not None]
    across = min(len(maps) + len(uncertain), _ACROSS)
    rows = -(-(len(maps) + len(uncertain)) // across)
    figure = new_figure(4.6 * across + 0.8, 4.2 * rows)
    grid = figure.subplots(rows, across, squeeze=False, sharey=True)
    every = list(grid.ravel())
    top = max(float(np.nanmax(energies)) for _, energies, _ in maps) / UNITS[unit]
    for axis, (title, energies, landscape) in zip(every, maps, strict=False):
        mesh = _map(axis, landscapes[0].axes, energies / UNITS[unit], top)
        axis.set_title(title)
        if path is not None:
            axis.plot(path[:, 0], path[:, 1], color="white", lw=1.6)
            axis.plot(path[:, 0], path[:, 1], color="black", lw=0.6)
        if landscape is not None and landscape.labels is not None:
            _points(axis, landscape, unit, top)
    figure.colorbar(mesh, ax=every[: len(maps)], label=f"{landscapes[0].quantity} ({unit})")
    for axis, one in zip(every[len(maps) :], uncertain, strict=False):
        _uncertainty(figure, axis, one, unit)
    for axis in every[len(maps) + len(uncertain) :]:
        axis.set_axis_off()
    return figure


def _uncertainty(figure: Figure, axis: Axes, landscape: Landscape, unit: str) -> None:
    """Draw the standard error of each point, with a scale of its own."""
    x, y = landscape.axes
    values = np.asarray(landscape.uncertainty) / UNITS[unit]
    mesh = axis.pcolormesh(x.values, y.values, values.T, cmap="cividis", vmin=0, shading="nearest")
    axis.set(title="standard error", xlabel=f"{x.name} ({x.unit})", ylabel=f"{y.name} ({y.unit})")
    figure.colorbar(mesh, ax=axis, label=f"standard error of the {landscape.quantity} ({unit})")


def _map(axis: Axes, axes: tuple[Axis, ...], energies: Array, top: float) -> QuadMesh:
    x, y = axes
    mesh = axis.pcolormesh(
        x.values, y.values, energies.T, cmap="viridis", vmin=0, vmax=top or 1.0, shading="nearest"
    )
    levels = np.linspace(0, top, 12)[1:-1]  # the same on every map
    if np.isfinite(energies).all() and energies.max() > energies.min():
        axis.contour(x.values, y.values, energies.T, levels=levels, colors="white", linewidths=0.5)
    place = np.unravel_index(np.nanargmin(energies), energies.shape)
    axis.plot(x.values[place[0]], y.values[place[1]], "+", color="white", ms=10, mew=1.6)
    axis.set(xlabel=f"{x.name} ({x.unit})", ylabel=f"{y.name} ({y.unit})")
    return mesh


def _points(axis: Axes, landscape: Landscape, unit: str, top: float) -> None:
    """Draw labelled frames in the map's own colours, counted from where the model agrees with the lowest."""
    x, y = landscape.labels.points.T  # type: ignore[union-attr]
    colours = label_heights(landscape) / UNITS[unit]
    axis.scatter(x, y, c=colours, cmap="viridis", vmin=0, vmax=top or 1.0, s=22, edgecolors="white", lw=0.8)


def label_heights(landscape: Landscape) -> Array:
    """Return labels in eV above the landscape's lowest point, shifted to the model at the lowest label.

    Args:
        landscape: with labelled frames.
    """
    labels = landscape.labels
    if labels is None:
        return np.zeros(0)
    k = int(np.argmin(labels.reference))
    return labels.reference - labels.reference[k] + labels.predicted[k] - float(np.nanmin(landscape.energies))


def _curves(landscapes: Sequence[Landscape], unit: str) -> Figure:
    figure = new_figure(6.4, 4.0)
    axis = figure.subplots()
    x = landscapes[0].axes[0]
    colours, styles = cycle(COLOURS), cycle(_STYLES)
    for landscape in landscapes:
        colour = next(colours)
        heights = landscape.relative() / UNITS[unit]
        axis.plot(x.values, heights, "-", color=colour, label=landscape.label)
        if landscape.uncertainty is not None:
            bars = landscape.uncertainty / UNITS[unit]
            axis.errorbar(
                x.values, heights, bars, fmt="none", ecolor=colour, capsize=2, label="one standard error"
            )
        if landscape.labels is not None:
            name = landscape.labels.name if len(landscapes) == 1 else f"labels, as {landscape.label} has them"
            heights = label_heights(landscape) / UNITS[unit]
            axis.plot(landscape.labels.points[:, 0], heights, "o", mfc="none", color=colour, label=name)
    for name, values in landscapes[0].references.items():
        heights = (values - np.nanmin(values)) / UNITS[unit]
        axis.plot(x.values, heights, next(styles), color="0.2", label=name)
    axis.set(xlabel=f"{x.name} ({x.unit})", ylabel=f"{landscapes[0].quantity} ({unit})")
    if landscapes[0].uncertainty is None:
        axis.set_ylim(0, None)
    axis.legend(frameon=False)
    return figure
