"""What a landscape's folder holds: figures, page, numbers; written, and read again for a report."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import DataError
from ffpretrain.md.landscapes.figures import draw
from ffpretrain.md.landscapes.labels import Labels
from ffpretrain.md.landscapes.noise_figure import draw_noise
from ffpretrain.md.landscapes.page import landscape_page
from ffpretrain.md.landscapes.surface import UNITS, Array, Axis, Geometries, Landscape, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
SUMMARY = "landscape.json"
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)


def write(
    landscapes: Sequence[Landscape],
    folder: Path,
    unit: str = "kcal/mol",
    path: Array | None = None,
) -> None:
    """Write figures, page and numbers of landscapes on one grid, in place of those of an earlier one.

    Args:
        landscapes: one for each model.
        folder: is there.
        unit: of energies, ``eV`` or ``kcal/mol``.
        path: points ``[T, 2]`` in the plane, drawn on the map.

    Raises:
        DataError: the folder cannot be written.
    """
    figure = draw(landscapes, unit, path)
    for old in [folder / SUMMARY, *folder.glob("landscape*.npz"), *folder.glob("noise.[ps][nv]g")]:
        old.unlink(missing_ok=True)  # the new one may have fewer files
    _save_figure(figure, folder, "landscape", FORMATS)
    geometries = landscapes[0].geometries
    if geometries.noise is not None:
        _save_figure(draw_noise(geometries.atoms, geometries.noise), folder, "noise", ("png", "svg"))
    page = landscape_page(landscapes, unit, path)
    write_bytes(folder / "landscape.html", page.encode())
    for name, one in zip(npz_names(len(landscapes)), landscapes, strict=True):
        one.write_npz(folder / name, path)
    write_bytes(folder / SUMMARY, (json.dumps(summary(landscapes, unit), indent=1) + "\n").encode())


def _save_figure(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> None:
    for format in formats:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format)
        write_bytes(folder / f"{name}.{format}", buffer.getvalue())


def summary(landscapes: Sequence[Landscape], unit: str) -> dict[str, Any]:
    """Return the numbers of landscapes as JSON types, with units.

    Args:
        landscapes: on one grid.
        unit: of energies in the figures; the numbers here are in eV.
    """
    first = landscapes[0]
    noise = first.geometries.noise
    extra: dict[str, Any] = {}
    if noise is not None:
        extra["noise"] = {"elements": list(first.geometries.atoms.symbols), "sigma": noise.tolist()}
    return {
        **extra,
        "schema": "ffpretrain-landscape",
        "version": 1,
        "units": {"energy": "eV", "length": "Å", "angle": "°"},
        "figure_unit": unit,
        "kind": first.geometries.kind,
        "quantity": first.quantity,
        "note": first.geometries.note,
        "axes": [
            {"name": a.name, "unit": a.unit, "from": a.values[0], "to": a.values[-1], "points": len(a.values)}
            for a in first.axes
        ],
        "models": [
            {
                "label": one.label,
                "range": float(np.nanmax(one.relative())),
                "roughness": _with_what_is_missing(one),
                "rms_difference_to": one.errors(),
                "fitted_head": one.fit,
                "standard_error": _spread(one.uncertainty),
                "energy_response": None if one.response is None else one.response.tolist(),
            }
            for one in landscapes
        ],
    }


def refuse_earlier(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a landscape, unless it may be replaced.

    Raises:
        DataError: it does.
    """
    if not overwrite and (out / SUMMARY).exists():
        raise DataError(
            f"{out / SUMMARY}: an earlier landscape is here; replace it (--overwrite, overwrite=True) or "
            "choose another --out"
        )


@contextmanager
def output_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Make the folder of the output; what was made goes again where nothing is in it at the end.

    Args:
        out: the folder.
        overwrite: let it hold another landscape, which :func:`write` replaces.

    Raises:
        DataError: it holds one and that may not be replaced, or it cannot be made.
    """
    refuse_earlier(out, overwrite)
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); give another --out") from None
    try:
        yield out
    finally:
        with contextlib.suppress(OSError):  # what is not empty stays
            for place in made:
                place.rmdir()


def _with_what_is_missing(one: Landscape) -> dict[str, float | None]:
    """Return roughness with null for what needs forces, where there are none."""
    missing = {"force_consistency": None} if one.roughness and one.forces is None else {}
    return {**one.roughness, **missing}


def _spread(errors: Array | None) -> dict[str, float] | None:
    """Return the smallest above zero, median and largest of errors, eV; None where there are none."""
    if errors is None or not (errors > 0).any():
        return None
    known = errors[errors > 0]
    return {"least": float(known.min()), "median": float(np.median(known)), "most": float(known.max())}


class Drawn(NamedTuple):
    """What was drawn in a folder.

    Attributes:
        landscapes: one for each model.
        unit: of energies in the figures.
        path: points ``[T, 2]`` in the plane, or None.
    """

    landscapes: list[Landscape]
    unit: str
    path: Array | None


def read_folder(folder: Path) -> Drawn:
    """Return what :func:`write` wrote.

    Args:
        folder: holds ``landscape.json`` and the npz files.

    Raises:
        DataError: a file is missing, damaged or of another program.
    """
    about = _summary(folder / SUMMARY)
    found, content = [], dict[str, NDArray[Any]]()
    for name, model in zip(npz_names(len(about["models"])), about["models"], strict=True):
        try:
            with np.load(folder / name, allow_pickle=False) as archive:
                content = {key: archive[key] for key in archive.files}
            found.append(_landscape(content, model))
        except _DAMAGED as error:
            raise DataError(f"{folder / name}: cannot be read ({error}); draw the landscape again") from None
    return Drawn(found, about["figure_unit"], content.get("path"))


def _summary(file: Path) -> dict[str, Any]:
    """Return the summary of a folder.

    Raises:
        DataError: it is missing, damaged or of another version.
    """
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = about["schema"] == "ffpretrain-landscape" and about["version"] == 1
        complete = known and about["figure_unit"] in UNITS and len(about["models"]) > 0
    except _DAMAGED as error:
        raise DataError(f"{file}: cannot be read ({error}); draw the landscape again") from None
    if not complete:
        raise DataError(f"{file}: is no summary that this version writes; draw the landscape again")
    return about


def npz_names(count: int) -> list[str]:
    """Return the names of the files that hold the numbers of ``count`` landscapes."""
    return ["landscape.npz"] if count == 1 else [f"landscape-{i}.npz" for i in range(count)]


def _landscape(content: dict[str, NDArray[Any]], model: dict[str, Any]) -> Landscape:
    """Return one landscape from its numbers and its part of the summary."""
    from ase import Atoms

    axes = []
    for key in ("axis0", "axis1"):
        if key in content:
            name, _, unit = str(content[f"{key}_name"]).removesuffix(")").rpartition(" (")
            axes.append(Axis(name, unit, content[key]))
    atoms = Atoms(
        content["numbers"], content["base_angstrom"], cell=content["cell_angstrom"], pbc=content["pbc"]
    )
    grid = Geometries(
        atoms,
        tuple(axes),
        content["positions_angstrom"],
        str(content["kind"]),
        str(content["note"]),
        content.get("noise_angstrom"),
    )
    references = {
        key.removeprefix("reference_").removesuffix("_eV"): values
        for key, values in content.items()
        if key.startswith("reference_")
    }
    labels = None
    if "label_points" in content:
        labels = Labels(
            str(content["label_name"]),
            content["label_points"],
            content["label_energies_eV"],
            content["label_predicted_eV"],
        )
    response = model.get("energy_response")
    return Landscape(
        grid,
        str(content["label"]),
        content["energies_eV"],
        content.get("forces_eV_per_angstrom"),
        references,
        {name: value for name, value in model["roughness"].items() if value is not None},
        labels,
        model.get("fitted_head") or {},
        None if response is None else np.array(response),
        content.get("standard_errors_eV"),
    )
