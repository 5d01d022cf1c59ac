"""The interactive page of a landscape: one HTML file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from ffpretrain.md.landscapes.noise_figure import draw_noise, noise_colours
from ffpretrain.md.landscapes.surface import UNITS, Array, Geometries, Landscape
from ffpretrain.md.landscapes.words import roughness_numbers
from ffpretrain.molecules import find_bonds
from ffpretrain.report.page import Page, drawing, table

#: geometries in the page; of larger grids the nearest of a coarser one is shown
MOST_FRAMES = 1700
#: energies in the page; of larger grids every second, third … point is shown
MOST_POINTS = 20_000

_FIT_ROWS = {
    "energy_mae": "fitted head: MAE on frames held out",
    "energy_mae_fitted": "fitted head: MAE on frames fitted to",
    "energy_spread": "mean absolute deviation of their energies",
}


def landscape_page(landscapes: Sequence[Landscape], unit: str, path: Array | None = None) -> str:
    """Return the page: surfaces to turn, values and the molecule under the pointer, roughness numbers.

    Args:
        landscapes: on the same grid, one for each model; all are drawn on one scale.
        unit: of energies, a key of :data:`~ffpretrain.md.landscapes.surface.UNITS`.
        path: points ``[T, 2]`` in the plane, drawn on the surfaces.
    """
    first = landscapes[0]
    formula = first.geometries.atoms.get_chemical_formula()
    page = Page(f"{first.quantity.capitalize()} landscape of {formula}", first.geometries.note)
    for landscape, figure in zip(landscapes, viewers(landscapes, unit, path), strict=True):
        page.add(landscape.label, figure)
    if first.geometries.noise is not None:
        page.add("Noise of each atom", *noise_section(landscapes, unit))
    if any(one.roughness or one.errors() for one in landscapes):
        page.add("Numbers", numbers_table(landscapes, unit))
    page.use("viewer", viewer_script())
    return page.html()


def viewers(
    landscapes: Sequence[Landscape],
    unit: str,
    path: Array | None = None,
    most_points: int = MOST_POINTS,
    most_frames: int = MOST_FRAMES,
) -> list[str]:
    """Return an interactive figure for each landscape, as HTML; the page must :func:`use <viewer_script>` it.

    Args:
        landscapes: on the same grid; all are drawn on one scale.
        unit: of energies, a key of :data:`~ffpretrain.md.landscapes.surface.UNITS`.
        path: points ``[T, 2]`` in the plane, drawn on the surfaces.
        most_points: energies of each; larger grids are thinned, and the page says so.
        most_frames: geometries of each.
    """
    top = max(float(np.nanmax(one.relative())) for one in landscapes)
    return [
        _viewer(viewer_data(one, unit, path, top, most_points, most_frames), one, unit) for one in landscapes
    ]


def viewer_script() -> str:
    """Return the script that draws every landscape of a page."""
    return files("ffpretrain.md.landscapes").joinpath("viewer.js").read_text(encoding="utf-8")


def numbers_table(landscapes: Sequence[Landscape], unit: str) -> str:
    """Return roughness, differences to references and errors of fitted heads as an HTML table, with units."""
    rough = [{n.name: n for n in roughness_numbers(one, unit)} for one in landscapes]
    rows: list[list[Any]] = []
    for name, number in {name: n for one in reversed(rough) for name, n in one.items()}.items():
        head = f"{name} ({number.unit})" if number.unit else name
        rows.append([head, *[_or_word(one[name].value) if name in one else "" for one in rough]])
        if any(name in one and one[name].remark for one in rough):
            rows.append(["", *[one[name].remark if name in one else "" for one in rough]])
    different = dict.fromkeys(name for one in landscapes for name in one.errors())
    for name in different:
        values = [one.errors().get(name) for one in landscapes]
        shown = ["" if value is None else value / UNITS[unit] for value in values]
        rows.append([f"RMS difference to {name} ({unit})", *shown])
    for name, said in _FIT_ROWS.items():
        if any(name in one.fit for one in landscapes):
            rows.append([f"{said} ({unit})", *[one.fit[name] / UNITS[unit] for one in landscapes]])
    return table(["", *[one.label for one in landscapes]], rows)


def _or_word(value: float | None) -> float | str:
    return "not computed" if value is None else value


def noise_section(landscapes: Sequence[Landscape], unit: str, place: str = "") -> list[str]:
    """Return the picture of the noise of each atom, and a table beside what displacing each atom costs.

    Args:
        landscapes: on the same grid.
        unit: of energies.
        place: tells the picture from those of other landscapes in the page.
    """
    g = landscapes[0].geometries
    if g.noise is None:
        return []
    head = ["atom", "element", "noise (Å)"]
    columns: list[Sequence[Any]] = [
        [str(i) for i in range(len(g.atoms))],
        list(g.atoms.symbols),
        [float(value) for value in g.noise],
    ]
    for one in landscapes:
        if one.response is not None:
            head.append(f"{one.label}, this atom alone {g.noise.mean():.3f} Å away ({unit})")
            columns.append([float(value) / UNITS[unit] for value in one.response])
    caption = "Atoms by the standard deviation of their learned noise, numbered from 0"
    rows = [list(row) for row in zip(*columns, strict=True)]
    return [drawing(draw_noise(g.atoms, g.noise), caption, place), table(head, rows)]


def viewer_data(
    landscape: Landscape,
    unit: str,
    path: Array | None = None,
    top: float | None = None,
    most_points: int = MOST_POINTS,
    most_frames: int = MOST_FRAMES,
) -> dict[str, Any]:
    """Return what the viewer draws: energies above the lowest one, thinned geometries, bonds and colours.

    Args:
        landscape: large ones are thinned evenly, and the page says so.
        unit: of energies.
        path: points ``[T, 2]`` in the plane.
        top: eV, end of the scale; None takes the landscape's own highest energy.
        most_points: energies kept.
        most_frames: geometries kept.
    """
    g = landscape.geometries
    every = max(1, int(np.ceil((landscape.energies.size / most_points) ** (1 / len(g.shape)))))
    kept = np.ix_(*[range(0, n, every) for n in g.shape])
    energies = landscape.relative()[kept] / UNITS[unit]
    axes = [replace(axis, values=axis.values[::every]) for axis in g.axes]
    data: dict[str, Any] = {
        "unit": unit,
        "quantity": landscape.quantity,
        "axes": [{"name": a.name, "unit": a.unit, "values": a.values.round(5).tolist()} for a in axes],
        # NaN has no place in JSON: null, which the viewer leaves empty
        "energies": _finite(energies),
        "errors": None
        if landscape.uncertainty is None
        else _finite(landscape.uncertainty[kept] / UNITS[unit]),
        "top": round((float(np.nanmax(landscape.relative())) if top is None else top) / UNITS[unit], 6),
        "lowest": int(np.nanargmin(energies)),
        "thinned": every,
        "curves": [
            {"name": name, "values": ((v[kept] - np.nanmin(v)) / UNITS[unit]).ravel().round(6).tolist()}
            for name, v in landscape.references.items()
        ],
        "path": None if path is None or len(g.shape) == 1 else np.asarray(path).round(5).tolist(),
        **_molecule_data(g, every, most_frames),
    }
    if g.noise is not None:
        data["noise"] = g.noise.round(5).tolist()
        data["noiseColours"] = noise_colours(g.noise)
    return data


def _finite(values: Array) -> list[float | None]:
    return [round(float(value), 6) if np.isfinite(value) else None for value in values.ravel()]


def _molecule_data(g: Geometries, every: int, most_frames: int) -> dict[str, Any]:
    """Return the geometries under the pointer, thinned where there are many, and how to draw them."""
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors

    atoms, shape = g.atoms, tuple(-(-n // every) for n in g.shape)
    stride = max(1, int(np.ceil((np.prod(shape) / most_frames) ** (1 / len(shape)))))
    kept = [range(0, n, stride) for n in shape]
    coarse = g.positions[np.ix_(*[[every * i for i in k] for k in kept])]
    centred = coarse.reshape(-1, len(atoms), 3)
    centred = centred - centred.mean(1, keepdims=True)
    nearest = [np.minimum(np.rint(np.arange(n) / stride), (n - 1) // stride).astype(int) for n in shape]
    place = nearest[0] if len(shape) == 1 else nearest[0][:, None] * len(kept[1]) + nearest[1][None, :]
    elements = sorted(set(atoms.numbers.tolist()))
    return {
        "numbers": atoms.numbers.tolist(),
        "symbols": list(atoms.symbols),
        "frames": [frame.ravel().round(3).tolist() for frame in centred],
        "frameOf": np.asarray(place).ravel().tolist(),
        "bonds": [[int(i), int(j)] for i, j, *_ in find_bonds(atoms.numbers, atoms.positions)],
        "colours": {z: _hex(jmol_colors[z]) for z in elements},
        "radii": {z: round(0.45 * float(covalent_radii[z]), 3) for z in elements},
        "size": round(140 / max(1.0, float(np.abs(centred).max())), 2),
    }


def _viewer(data: dict[str, Any], landscape: Landscape, unit: str) -> str:
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    name = "" if landscape.label.startswith(landscape.quantity) else f"{landscape.quantity} "
    what = escape(f"{landscape.label}: {name}in {unit}", quote=True)
    if landscape.uncertainty is not None:
        what += ", with one standard error"
    thinned = f" Every {data['thinned']}th point of the grid is shown." if data["thinned"] > 1 else ""
    button = (
        '<button type="button" aria-pressed="true" data-noise>colour atoms by their noise</button>'
        if "noise" in data
        else ""
    )
    return (
        f'<figure class="plot" data-landscape>{button}<div><canvas role="img" aria-label="{what}"></canvas>'
        f'<canvas role="img" aria-label="the molecule under the pointer" style="max-width:20rem"></canvas>'
        f"</div>"
        f"<output></output><figcaption>{what}, above the lowest.{thinned} "
        '<span class="hint">Drag to turn; move over the surface to read it and see the molecule; click an '
        "atom to name it.</span></figcaption>"
        f'<script type="application/json">{values}</script></figure>'
    )


def _hex(rgb: Any) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb[:3])
