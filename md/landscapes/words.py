"""The numbers of landscapes with their units, for tables and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ffpretrain.md.landscapes.surface import UNITS, Array, Landscape

#: how often its grid's own error a ``force_consistency`` must be to say anything of the forces
_CLEAR = 3.0
#: how often the same error on the grid without every second point must be to trust the estimate of it
_SETTLED = 3.0
#: how often both must be outdone where it is not to be trusted
_BEYOND_DOUBT = 10.0


class Number(NamedTuple):
    """One number of a landscape.

    Attributes:
        name: as in :mod:`ffpretrain.md.landscapes.roughness`.
        value: in ``unit``; None where it was not computed.
        unit: empty where there is none.
        remark: what to keep in mind, or empty.
    """

    name: str
    value: float | None
    unit: str
    remark: str = ""

    def __str__(self) -> str:
        """Return it in words."""
        if self.value is None:
            return f"{self.name} not computed"
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.name} {self.value:.4g}{' ' if self.unit else ''}{self.unit}{remark}"


def roughness_numbers(landscape: Landscape, unit: str) -> list[Number]:
    """Return the roughness of a landscape; what needs forces is not computed where there are none.

    Args:
        landscape: with its roughness, or none.
        unit: of energies, a key of :data:`~ffpretrain.md.landscapes.surface.UNITS`.
    """
    rough = landscape.roughness
    if not rough:
        return []
    units = {axis.unit for axis in landscape.axes}
    axis = next(iter(units)) if len(units) == 1 else "unit of the axes"
    square = f"({axis})²" if " " in axis else f"{axis}²"
    scale = 1 / UNITS[unit]
    numbers = [
        Number("tortuosity", rough["tortuosity"], ""),
        Number("energy_jump", rough["energy_jump"] * scale, unit),
        Number("force_flips", rough["force_flips"], "per line"),
        Number("minimum_offset", rough["minimum_offset"], axis if axis in units else "units of the axes"),
        Number("curvature", rough["curvature"] * scale, f"{unit} per {square}"),
    ]
    if "force_consistency" not in rough:
        return [*numbers, Number("force_consistency", None, f"{unit} per {axis}")]
    value, own = rough["force_consistency"] * scale, rough.get("difference_error")
    numbers.append(Number("force_consistency", value, f"{unit} per {axis}", _remark(rough, scale)))
    if own is not None:
        numbers.append(Number("difference_error", own * scale, f"{unit} per {axis}"))
    return numbers


def _remark(rough: Mapping[str, float], scale: float) -> str:
    """Return what a ``force_consistency`` says of the forces; ``scale`` turns eV into the unit shown."""
    value, own = rough["force_consistency"], rough.get("difference_error")
    if own is None:
        return "not to be judged: fewer than 5 points in a line"
    coarse = rough.get("difference_error_coarse")
    settled = coarse is not None and coarse >= _SETTLED * own
    if value <= _CLEAR * own:
        return f"mostly the grid's spacing, about {own * scale:.2g}: says nothing against the forces"
    if settled or (coarse is not None and value > _BEYOND_DOUBT * max(own, coarse)):
        return f"the grid's spacing explains about {own * scale:.2g} of it"
    return "the grid is too coarse to tell whether the forces are right: take more points or a smaller range"


def describe(landscapes: Sequence[Landscape], unit: str) -> list[str]:
    """Return what the terminal says of landscapes, a line each, every energy in the figures' unit.

    Args:
        landscapes: on one grid.
        unit: of energies, a key of :data:`~ffpretrain.md.landscapes.surface.UNITS`.
    """
    lines, scale = [], 1 / UNITS[unit]
    for one in landscapes:
        # what the grid's own error is stands beside the number that it belongs to
        numbers = [str(n) for n in roughness_numbers(one, unit) if n.name != "difference_error"]
        said = [f"range {float(np.nanmax(one.relative())) * scale:.4g} {unit}", *numbers]
        lines.append(f"{one.label}: {', '.join(said)}")
        if one.uncertainty is not None:
            lines.append(f"  {_errors(one.uncertainty * scale, unit)}")
        if fit := one.fit:
            lines.append(
                f"  energy head: MAE {fit['energy_mae'] * scale:.4g} {unit} on {fit['frames_held_out']:g} "
                f"frames held out, {fit['energy_mae_fitted'] * scale:.4g} {unit} on "
                f"{fit['frames_fitted']:g} fitted to; without it {fit['energy_spread'] * scale:.4g} {unit}"
            )
        for name, value in one.errors().items():
            lines.append(f"  RMS difference to {name}: {value * scale:.4g} {unit}")
    return lines


def _errors(errors: Array, unit: str) -> str:
    """Return how large standard errors are, that of the bin they are relative to left out."""
    known = errors[errors > 0]
    if len(known) == 0:
        return "standard errors: none is known; the run is too short"
    return (
        f"standard error of a bin {known.min():.2g} to {known.max():.2g} {unit}, half of them below "
        f"{np.median(known):.2g}"
    )
