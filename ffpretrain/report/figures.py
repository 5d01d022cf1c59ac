"""What a report shows of predictions: parity by element and error by the size of the force."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain.evaluation import Predictions
from ffpretrain.plots import COLOURS, new_figure
from ffpretrain.units import KCAL_PER_MOL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ffpretrain.datasets.frames import Dataset

#: points of an interactive plot; more than these are thinned evenly, and the caption says so
MOST_POINTS = 6000
_BINS = 10
#: structures of a trajectory whose distances are counted, spread evenly
MOST_STRUCTURES = 1000


def parity_script() -> str:
    """Return the script that draws every parity plot of a page."""
    return files("ffpretrain.report").joinpath("parity.js").read_text(encoding="utf-8")


def force_parity(predictions: Predictions) -> str:
    """Return an interactive parity plot of force components by element, as HTML.

    Args:
        predictions: with forces and their labels.
    """
    from ase.data import chemical_symbols

    predicted, label = _forces(predictions)
    groups = []
    every = max(1, -(-predicted.size // MOST_POINTS))
    for colour, number in zip(COLOURS, sorted(set(predictions.numbers.tolist())), strict=False):
        own = predictions.numbers == number
        points = slice(None, None, every)
        groups.append(
            {
                "name": chemical_symbols[number],
                "colour": colour,
                "reference": label[own].ravel()[points].round(5).tolist(),
                "predicted": predicted[own].ravel()[points].round(5).tolist(),
            }
        )
    limit = 1.05 * float(max(np.abs(label).max(), np.abs(predicted).max()))
    thinned = f"; every {every}th component is drawn" if every > 1 else ""
    caption = f"Force components, predicted against reference{thinned}. Click a point to read it."
    return _interactive({"unit": "eV/Å", "limit": limit, "groups": groups}, caption)


def energy_parity(predictions: Predictions) -> str:
    """Return an interactive parity plot of energies, each about the mean of the reference, as HTML."""
    if predictions.energy is None or predictions.energy_label is None:
        return ""
    mean = predictions.energy_label.mean()
    reference, predicted = predictions.energy_label - mean, predictions.energy - mean
    group = {
        "name": "energy",
        "colour": COLOURS[0],
        "reference": reference.round(6).tolist(),
        "predicted": predicted.round(6).tolist(),
    }
    limit = 1.05 * float(max(np.abs(reference).max(), np.abs(predicted).max(), 1e-6))
    caption = f"Energies about the mean of the reference, {mean:.4f} eV. Click a point to read it."
    return _interactive({"unit": "eV", "limit": limit, "groups": [group]}, caption)


def error_by_magnitude(predictions: Predictions) -> Figure:
    """Plot the error of an atom's force against the size of the reference force, in bins of equal counts."""
    predicted, label = _forces(predictions)
    size = np.linalg.norm(label, axis=1)
    error = np.linalg.norm(predicted - label, axis=1)
    order = np.argsort(size)
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    x = [float(size[part].mean()) for part in parts]
    figure = new_figure(6.4, 3.6)
    axis = figure.subplots()
    for quantile, style in ((0.5, "o-"), (0.9, "s--")):
        y = [float(np.quantile(error[part], quantile)) / KCAL_PER_MOL for part in parts]
        name = "median" if quantile == 0.5 else "90 % quantile"
        axis.plot(x, y, style, color=COLOURS[0 if quantile == 0.5 else 1], label=name)
    axis.set(xlabel="reference force on an atom (eV/Å)", ylabel="error (kcal/mol/Å)", ylim=(0, None))
    axis.legend(frameon=False)
    return figure


def distances_figure(trajectories: Mapping[str, Path], frames: Dataset | None = None) -> Figure | None:
    """Plot the distribution of interatomic distances h(r) of molecules' trajectories, and of labelled frames.

    Args:
        trajectories: files by label; periodic ones are left out, and None is returned where none is left.
        frames: drawn beside the trajectories that are of their molecule.

    Raises:
        DataError: a file that cannot be read.
    """
    from ffpretrain.datasets import open_dataset
    from ffpretrain.md.validation.distances import centres, density, distances_of

    def curve(some: Dataset) -> NDArray[np.float64]:
        thinned = [some[i].positions for i in range(0, len(some), max(1, len(some) // MOST_STRUCTURES))]
        return density(distances_of(thinned, len(some[0].numbers)).sum(0))

    curves, molecule = {}, None
    for name, path in trajectories.items():
        run = open_dataset(path)
        if len(run) and not any(run[0].pbc):
            curves[name], molecule = curve(run), run[0].numbers.tolist()
    if not curves:
        return None
    if frames is not None and all(one.numbers.tolist() == molecule for one in frames):
        curves[f"labelled frames ({frames.metadata.name})"] = curve(frames)
    figure = new_figure(6.4, 3.6)
    axis = figure.subplots()
    r = centres()
    for (name, values), colour, style in zip(
        curves.items(), cycle(COLOURS), cycle(("-", "--", ":")), strict=False
    ):
        axis.plot(r, values, style, color=colour, lw=1.2, label=name)
    reach = max(float(r[np.flatnonzero(values)[-1]]) for values in curves.values() if values.any())
    axis.set(xlabel="distance (Å)", ylabel="h(r) (1/Å)", xlim=(0.5, reach + 0.2), ylim=(0, None))
    axis.legend(frameon=False)
    return figure


def _forces(predictions: Predictions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if predictions.forces is None or predictions.forces_label is None:
        raise ValueError("predictions without forces")
    return predictions.forces, predictions.forces_label


def _interactive(content: dict[str, Any], caption: str) -> str:
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-name="{group["name"]}">{group["name"]}</button>'
        for group in content["groups"]
    )
    # "</" would end the script element
    values = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<figure class="plot" data-parity>{buttons if len(content["groups"]) > 1 else ""}'
        f'<div><canvas role="img" aria-label="{escape(caption, quote=True)}"></canvas></div>'
        f"<output></output><figcaption>{escape(caption)}</figcaption>"
        f'<script type="application/json">{values}</script></figure>'
    )
