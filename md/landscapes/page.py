"""The interactive page of a landscape: one HTML file that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from ffpretrain.md.landscapes.surface import Landscape
from ffpretrain.molecules import find_bonds
from ffpretrain.report.page import Page, table
from ffpretrain.units import KCAL_PER_MOL

#: energy units a user may ask for, eV in one of each
UNITS = {"eV": 1.0, "kcal/mol": KCAL_PER_MOL}
#: geometries in the page; of larger grids the nearest of a coarser one is shown
MOST_FRAMES = 1700


def landscape_page(landscapes: Sequence[Landscape], unit: str) -> str:
    """Return the page: surfaces to turn, values and the molecule under the pointer, roughness numbers.

    Args:
        landscapes: on the same grid, one for each model.
        unit: of energies, a key of :data:`UNITS`.
    """
    first = landscapes[0]
    page = Page(f"Energy landscape of {first.geometries.atoms.get_chemical_formula()}", first.geometries.note)
    for landscape in landscapes:
        page.add(landscape.label, _viewer(landscape, unit))
    names = sorted({name for one in landscapes for name in one.roughness})
    rows = [[name, *[one.roughness.get(name, "") for one in landscapes]] for name in names]
    rows += [
        [f"RMS difference to {name} ({unit})", *[one.errors()[name] / UNITS[unit] for one in landscapes]]
        for name in first.references
    ]
    page.add("Numbers", table(["", *[one.label for one in landscapes]], rows))
    script = files("ffpretrain.md.landscapes").joinpath("viewer.js").read_text(encoding="utf-8")
    page.use("viewer", script)
    return page.html()


def viewer_data(landscape: Landscape, unit: str) -> dict[str, Any]:
    """Return what the viewer draws: energies above the lowest one, thinned geometries, bonds and colours."""
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors

    g = landscape.geometries
    atoms, shape = g.atoms, g.shape
    energies = landscape.relative() / UNITS[unit]
    stride = max(1, int(np.ceil((energies.size / MOST_FRAMES) ** (1 / len(shape)))))
    kept = [range(0, n, stride) for n in shape]
    coarse = g.positions[np.ix_(*kept)] if len(shape) == 2 else g.positions[list(kept[0])]
    centred = coarse.reshape(-1, len(atoms), 3)
    centred = centred - centred.mean(1, keepdims=True)
    nearest = [np.minimum(np.rint(np.arange(n) / stride), (n - 1) // stride).astype(int) for n in shape]
    place = nearest[0] if len(shape) == 1 else nearest[0][:, None] * len(kept[1]) + nearest[1][None, :]
    elements = sorted(set(atoms.numbers.tolist()))
    bonds = find_bonds(atoms.numbers, atoms.positions)
    return {
        "unit": unit,
        "axes": [{"name": a.name, "unit": a.unit, "values": a.values.round(5).tolist()} for a in g.axes],
        "energies": np.where(np.isfinite(energies), energies, np.nanmax(energies)).ravel().round(6).tolist(),
        "lowest": int(np.nanargmin(landscape.energies)),
        "numbers": atoms.numbers.tolist(),
        "frames": [frame.ravel().round(3).tolist() for frame in centred],
        "frameOf": np.asarray(place).ravel().tolist(),
        "bonds": [[int(i), int(j)] for i, j, *_ in bonds],
        "colours": {z: _hex(jmol_colors[z]) for z in elements},
        "radii": {z: round(0.45 * float(covalent_radii[z]), 3) for z in elements},
        "size": round(140 / max(1.0, float(np.abs(centred).max())), 2),
    }


def _viewer(landscape: Landscape, unit: str) -> str:
    values = json.dumps(viewer_data(landscape, unit), separators=(",", ":")).replace("</", "<\\/")
    what = escape(f"{landscape.label}: energies in {unit}", quote=True)
    return (
        f'<figure class="plot" data-landscape><canvas role="img" aria-label="{what}"></canvas>'
        f'<canvas role="img" aria-label="the molecule under the pointer" style="max-width:20rem"></canvas>'
        f"<output></output><figcaption>{what}, above the lowest. Drag to turn; move over the surface to "
        f"read it and see the molecule.</figcaption>"
        f'<script type="application/json">{values}</script></figure>'
    )


def _hex(rgb: Any) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)
