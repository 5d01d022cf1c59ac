"""Landscapes as figures: maps and curves, readable in grey and to the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ffpretrain.md.landscapes.page import UNITS
from ffpretrain.md.landscapes.surface import Array, Landscape
from ffpretrain.plots import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

_STYLES = ("--", ":", "-.")


def draw(landscapes: Sequence[Landscape], unit: str = "kcal/mol", path: Array | None = None) -> Figure:
    """Return a figure of one or more landscapes on the same grid, with one scale for all.

    Args:
        landscapes: one for each model; with two coordinates side by side as maps, with one as curves.
        unit: ``eV`` or ``kcal/mol``.
        path: points ``[T, 2]`` in the plane, such as a trajectory, drawn on every map.
    """
    if len(landscapes[0].axes) == 1:
        return _curves(landscapes, unit)
    figure = new_figure(4.6 * len(landscapes) + 0.8, 4.2)
    every = figure.subplots(1, len(landscapes), squeeze=False, sharey=True)[0]
    top = max(float(np.nanmax(one.relative())) for one in landscapes) / UNITS[unit]
    for axis, landscape in zip(every, landscapes, strict=True):
        mesh = _map(axis, landscape, unit, top)
        if path is not None:
            axis.plot(path[:, 0], path[:, 1], color="white", lw=1.6)
            axis.plot(path[:, 0], path[:, 1], color="black", lw=0.6)
    figure.colorbar(mesh, ax=list(every), label=f"energy ({unit})")
    return figure


def _map(axis: Axes, landscape: Landscape, unit: str, top: float) -> QuadMesh:
    x, y = landscape.axes
    energies = landscape.relative() / UNITS[unit]
    mesh = axis.pcolormesh(
        x.values, y.values, energies.T, cmap="viridis", vmin=0, vmax=top, shading="nearest"
    )
    if np.isfinite(energies).all() and energies.max() > energies.min():
        axis.contour(x.values, y.values, energies.T, levels=10, colors="white", linewidths=0.5)
    place = np.unravel_index(np.nanargmin(energies), energies.shape)
    axis.plot(x.values[place[0]], y.values[place[1]], "+", color="white", ms=10, mew=1.6)
    axis.set(xlabel=f"{x.name} ({x.unit})", ylabel=f"{y.name} ({y.unit})", title=landscape.label)
    return mesh


def _curves(landscapes: Sequence[Landscape], unit: str) -> Figure:
    figure = new_figure(6.4, 4.0)
    axis = figure.subplots()
    x = landscapes[0].axes[0]
    for colour, landscape in zip(COLOURS, landscapes, strict=False):
        axis.plot(x.values, landscape.relative() / UNITS[unit], "-", color=colour, label=landscape.label)
    for style, (name, values) in zip(_STYLES, landscapes[0].references.items(), strict=False):
        axis.plot(x.values, (values - np.nanmin(values)) / UNITS[unit], style, color="0.2", label=name)
    axis.set(xlabel=f"{x.name} ({x.unit})", ylabel=f"energy ({unit})", ylim=(0, None))
    axis.legend(frameon=False)
    return figure
