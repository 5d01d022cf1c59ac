"""The sections of a report, each from one thing that may be there: a card, a run, predictions, dynamics."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffpretrain.artifacts import ModelCard
from ffpretrain.artifacts.card import Component
from ffpretrain.errors import DataError
from ffpretrain.evaluation import Predictions, error_table
from ffpretrain.plots import COLOURS, new_figure, plot_conservation, read_columns
from ffpretrain.report.figures import distances_figure, energy_parity, error_by_magnitude, force_parity
from ffpretrain.report.page import drawing, pairs, table

if TYPE_CHECKING:
    from ffpretrain.datasets.frames import Dataset


def card_section(card: ModelCard) -> list[str]:
    """Return what the model says of itself, and its measured errors."""
    from ase.data import chemical_symbols

    run = card.training
    about = pairs(
        {
            "description": card.description,
            "kind": card.kind,
            "level of theory": card.level_of_theory,
            "elements": ", ".join(chemical_symbols[number] for number in card.elements),
            "molecules": ", ".join(card.compositions or []),
            "network": _component(card.backbone),
            "cutoff (Å)": card.cutoff,
            "energy zero": card.energy_zero,
            "objective": _component(card.objective) if card.objective else None,
            "training steps": run.steps,
            "training time (min)": round(run.wall_seconds / 60, 1) if run.wall_seconds else None,
            "hardware": run.hardware,
            "seed": run.seed,
            "licence of the weights": card.licence,
            "package version": card.package_version,
        }
    )
    data = table(
        ["training data", "split", "train", "validation", "licence"],
        [[d.name, d.split, d.n_train or "", d.n_val or "", d.licence or ""] for d in card.training_data],
    )
    parts = [about, data if card.training_data else ""]
    for name, measured in card.errors.items():
        rows = [[key, q.value, q.unit] for key, q in measured.quantities.items()]
        parts.append(f"<p>{escape(name)}: {escape(measured.dataset)}, {measured.n_frames} frames</p>")
        parts.append(table(["error", "value", "unit"], rows))
    if card.citation:
        parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in card.citation) + "</ul>")
    return parts


def training_section(log: Path) -> list[str]:
    """Return the curves of a training log.

    Args:
        log: ``logs/metrics.csv`` of a run.

    Raises:
        DataError: no such log, or an empty one.
    """
    with log.open(newline="") as file:
        columns = next(csv.reader(file), [])
    if "step" not in columns:
        raise DataError(f"{log}: is no training log")
    wanted = {
        "loss": ["train/loss", "val/loss"],
        "force MAE (eV/Å)": ["val/forces_mae"],
        "energy MAE (eV)": ["val/energy_mae"],
    }
    present = {label: [name for name in names if name in columns] for label, names in wanted.items()}
    groups = [(label, names) for label, names in present.items() if names]
    figure = new_figure(3.4 * max(len(groups), 1) + 0.6, 3.2)
    axes = figure.subplots(1, max(len(groups), 1), squeeze=False)[0]
    for axis, (label, names) in zip(axes, groups, strict=False):
        for colour, name in zip(COLOURS, names, strict=False):
            data = read_columns(log, ["step", name])
            axis.plot(data["step"], data[name], color=colour, lw=1.2, label=name)
        axis.set(xlabel="step", ylabel=label, yscale="log")
        axis.legend(frameon=False, fontsize="small")
    return [drawing(figure, "Training: losses and validation errors over the steps")]


def errors_section(predictions: Predictions, what: str) -> list[str]:
    """Return parity plots and errors of predictions.

    Args:
        predictions: from :func:`ffpretrain.evaluation.predict`.
        what: names the frames.
    """
    rows = [[name, q.value, q.unit] for name, q in error_table(predictions).items()]
    parts = [f"<p>{escape(what)}, {len(predictions.n_atoms)} frames</p>"]
    if predictions.forces is not None:
        parts.append(force_parity(predictions))
        parts.append(drawing(error_by_magnitude(predictions), "Error of the force on an atom by its size"))
    parts += [energy_parity(predictions), table(["error", "value", "unit"], rows)]
    return [part for part in parts if part]


def dynamics_section(folders: Mapping[str, Path], frames: Dataset | None = None) -> list[str]:
    """Return what runs of dynamics conserved, their summaries and their interatomic distances h(r).

    Args:
        folders: output folders of ``ffpretrain md`` or :func:`ffpretrain.md.simulate`, by label.
        frames: whose distances are drawn beside, where they are of the same molecule.
    """
    logs = {name: folder / "log.csv" for name, folder in folders.items() if (folder / "log.csv").is_file()}
    rows = []
    for name, folder in folders.items():
        summary = read_json(folder / "md.json")
        if not summary:
            continue
        conserved = summary.get("conserved") or {}
        rows.append(
            [
                name,
                summary.get("ensemble", ""),
                summary.get("time", ""),
                (summary.get("temperature") or {}).get("mean", ""),
                conserved.get("drift", "") if conserved.get("drift") is not None else "",
                (summary.get("speed") or {}).get("ms_per_step", ""),
                summary.get("backend", ""),
            ]
        )
    head = ["run", "ensemble", "time (ps)", "mean T (K)", "drift (meV/atom/ps)", "ms per step", "path"]
    parts = [table(head, rows)] if rows else []
    if logs:
        caption = "Energies over the runs: what is exchanged, what is kept"
        parts.append(drawing(plot_conservation(logs), caption))
    runs = {name: folder / "trajectory.traj" for name, folder in folders.items()}
    figure = distances_figure({name: path for name, path in runs.items() if path.is_file()}, frames)
    if figure is not None:
        parts.append(drawing(figure, "Distances of all pairs of atoms, h(r)"))
    return parts


def validation_section(path: Path) -> list[str]:
    """Return the checks of ``ffpretrain validate``.

    Args:
        path: ``validation.json``.
    """
    checks = read_json(path).get("checks") or {}
    rows = [[name, check["status"], check["summary"]] for name, check in checks.items()]
    return [table(["check", "verdict", "result"], rows)] if rows else []


def pictures_section(folder: Path, without: Collection[str] = ()) -> list[str]:
    """Return the PNG pictures of a folder, such as that of a landscape, inside the page.

    Args:
        folder: of the pictures.
        without: names, without their endings, of those left out.
    """
    import base64

    parts = []
    for path in sorted(path for path in folder.glob("*.png") if path.stem not in without):
        content = base64.b64encode(path.read_bytes()).decode()
        label = escape(path.stem.replace("-", " ").replace("_", " "), quote=True)
        image = f'<img alt="{label}" src="data:image/png;base64,{content}" style="max-width:100%">'
        parts.append(f"<figure>{image}<figcaption>{label}</figcaption></figure>")
    return parts


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one where the file is missing.

    Raises:
        DataError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error}); write it anew") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object")
    return content


def _component(component: Component) -> str:
    options = ", ".join(f"{key} {value}" for key, value in component.options.items())
    return f"{component.name} ({options})" if options else component.name
