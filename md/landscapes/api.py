"""The public function: from a model and a wish to landscapes on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain.errors import ConfigError, DataError, UnsupportedInputError
from ffpretrain.md.landscapes.evaluate import Evaluator, evaluate, evaluator
from ffpretrain.md.landscapes.figures import draw
from ffpretrain.md.landscapes.page import UNITS, landscape_page
from ffpretrain.md.landscapes.planes import random_plane
from ffpretrain.md.landscapes.roughness import roughness
from ffpretrain.md.landscapes.scans import Coordinate, parse_coordinate, relaxed_scan, rigid_scan
from ffpretrain.md.landscapes.surface import Array, Geometries, Landscape, write_bytes

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

FORMATS = ("png", "svg", "pdf")
FILES = ("landscape.npz", "landscape.html", "landscape.json")


def landscape(
    model: Any,
    atoms: Atoms | None = None,
    *,
    scan: Sequence[str | Coordinate] = (),
    relaxed: bool = False,
    geometries: Geometries | None = None,
    points: int = 41,
    extent: float = 0.15,
    seed: int = 0,
    reference: Any = None,
    reference_label: str | None = None,
    dtype: str = "float32",
    out: str | Path | None = None,
    unit: str = "kcal/mol",
    path: Array | None = None,
    progress: bool = False,
) -> list[Landscape]:
    """Evaluate one or more models on a grid of geometries; write figures, an interactive page and numbers.

    Args:
        model: a named model, a model file, a potential, an ASE calculator, or a list of them, compared on the
            same grid and scale.
        atoms: the structure; None takes the reference geometry of the (first) model.
        scan: one or two coordinates, such as ``"dihedral 0 1 2 3 -180 180 37"``; none draws a random plane.
        relaxed: relax everything but the scanned coordinates, with the first model.
        geometries: a grid of one's own, from :mod:`ffpretrain.md.landscapes`; replaces the choices above.
        points: along each axis of a random plane.
        extent: Å, largest RMS displacement of an atom in a random plane.
        seed: of the random plane.
        reference: a further calculator or model whose energies are drawn on top and compared with.
        reference_label: names it; None takes the calculator's own name.
        dtype: of the networks.
        out: folder for ``landscape.png|svg|pdf|html|npz|json``; None writes nothing. A stopped evaluation
            goes on in the same folder.
        unit: of energies in figures and page: ``eV`` or ``kcal/mol``.
        path: points ``[T, 2]`` in the plane, drawn on the map.
        progress: show a bar on stderr.

    Returns:
        One landscape for each model.

    Raises:
        ConfigError: an option out of range.
        UnsupportedInputError: a structure that the grid or a model cannot take.
        DataError: ``out`` cannot be written.
    """
    if unit not in UNITS:
        raise ConfigError(f"unit={unit!r}: give one of {', '.join(UNITS)}")
    models = [evaluator(one, dtype) for one in (model if isinstance(model, list | tuple) else [model])]
    if geometries is None:
        base = _structure(model, atoms)
        geometries = _grid(model, base, scan, relaxed, points, extent, seed, progress)
    folder = None if out is None else _folder(Path(out))
    others = [] if reference is None else [evaluator(reference, dtype)]
    others = [one._replace(label=reference_label or one.label) for one in others]
    found = [_run(geometries, one, folder, i, progress) for i, one in enumerate([*models, *others])]
    compared = {one.label: one.energies for one in found[len(models) :]}
    result = [replace(one, references=compared, roughness=roughness(one)) for one in found[: len(models)]]
    if folder is not None:
        write(result, folder, unit, path)
    return result


def write(
    landscapes: Sequence[Landscape], folder: Path, unit: str = "kcal/mol", path: Array | None = None
) -> None:
    """Write figures, page and numbers of landscapes on one grid.

    Raises:
        DataError: the folder cannot be written.
    """
    figure = draw(landscapes, unit, path)
    for format in FORMATS:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format)
        write_bytes(folder / f"landscape.{format}", buffer.getvalue())
    write_bytes(folder / "landscape.html", landscape_page(landscapes, unit).encode())
    for i, one in enumerate(landscapes):
        one.write_npz(folder / ("landscape.npz" if len(landscapes) == 1 else f"landscape-{i}.npz"))
    write_bytes(folder / "landscape.json", (json.dumps(summary(landscapes), indent=1) + "\n").encode())


def summary(landscapes: Sequence[Landscape]) -> dict[str, Any]:
    """Return the numbers of landscapes as JSON types, with units."""
    first = landscapes[0]
    return {
        "schema": "ffpretrain-landscape",
        "version": 1,
        "units": {"energy": "eV", "length": "Å", "angle": "°"},
        "kind": first.geometries.kind,
        "note": first.geometries.note,
        "axes": [
            {"name": a.name, "unit": a.unit, "from": a.values[0], "to": a.values[-1], "points": len(a.values)}
            for a in first.axes
        ],
        "models": [
            {
                "label": one.label,
                "range": float(np.nanmax(one.relative())),
                "roughness": one.roughness,
                "rms_difference_to": one.errors(),
            }
            for one in landscapes
        ],
    }


def _structure(model: Any, atoms: Atoms | None) -> Atoms:
    from ffpretrain.artifacts import read_card

    if atoms is not None:
        return atoms
    first = model[0] if isinstance(model, list | tuple) else model
    card = read_card(first) if isinstance(first, str | Path) else getattr(first, "card", None)
    if card is None or card.reference_geometry is None:
        raise UnsupportedInputError("the model is not for one molecule; give a structure")
    return card.reference_geometry.to_atoms()


def _grid(
    model: Any,
    atoms: Atoms,
    scan: Sequence[str | Coordinate],
    relaxed: bool,
    points: int,
    extent: float,
    seed: int,
    progress: bool,
) -> Geometries:
    coordinates = [parse_coordinate(one) if isinstance(one, str) else one for one in scan]
    if not coordinates:
        if relaxed:
            raise ConfigError("relaxed=True needs coordinates to hold; give scan")
        return random_plane(atoms, points, extent, seed)
    if not relaxed:
        return rigid_scan(atoms, coordinates)
    total = int(np.prod([len(c.values) for c in coordinates]))
    with _bar("relax", total, progress) as advance:
        grid, unfinished = relaxed_scan(atoms, coordinates, _calculator(model), progress=advance)
    note = f"{grid.note}; {unfinished} of {total} points not converged" if unfinished else grid.note
    return replace(grid, note=note)


def _calculator(model: Any) -> Calculator:
    from torch import nn

    from ffpretrain.md.calculator import FFCalculator

    first = model[0] if isinstance(model, list | tuple) else model
    return FFCalculator(first) if isinstance(first, str | Path | nn.Module) else first


def _run(geometries: Geometries, one: Evaluator, folder: Path | None, i: int, progress: bool) -> Landscape:
    state = None if folder is None else folder / f".landscape-{i}.part.npz"
    with _bar(one.label, int(np.prod(geometries.shape)), progress) as advance:
        return evaluate(geometries, one, state, advance)


def _bar(title: str, total: int, progress: bool) -> Any:
    from ffpretrain.cli.progress import counting

    return counting(title, total, quiet=not progress)


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); give another --out") from None
    return out
