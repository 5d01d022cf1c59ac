"""``ffpretrain landscape``: energies on a grid of geometries, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def landscape(
    models: Annotated[list[str], typer.Argument(help="named models or model files, on the same grid")],
    out: Annotated[Path, typer.Option(help="folder for PNG, SVG, PDF, HTML and npz")],
    structure: Annotated[
        Path | None, typer.Option(help="structure file; else the model's reference geometry")
    ] = None,
    scan: Annotated[
        list[str] | None,
        typer.Option(help="coordinate, such as 'dihedral 0 1 2 3 -180 180 37'; twice for a map"),
    ] = None,
    relaxed: Annotated[bool, typer.Option("--relaxed", help="relax all but the scanned coordinates")] = False,
    points: Annotated[int, typer.Option(help="of a random plane, along each axis")] = 41,
    extent: Annotated[float, typer.Option(help="of a random plane, Å RMS displacement of an atom")] = 0.15,
    seed: Annotated[int, typer.Option(min=0, help="of the random plane")] = 0,
    reference: Annotated[str | None, typer.Option(help="engine drawn on top: gfn2, emt, …")] = None,
    unit: Annotated[str, typer.Option(help="of energies in figures: kcal/mol or eV")] = "kcal/mol",
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Draw the energy of MODELS on a random plane or along bonds, angles and dihedrals.

    A stopped evaluation goes on when the command is given again.
    """
    from ffpretrain.datasets.engines import open_engine
    from ffpretrain.datasets.structures import read_structure
    from ffpretrain.md.landscapes import landscape as draw
    from ffpretrain.md.landscapes.api import summary

    atoms = None if structure is None else read_structure(structure)[0]
    engine = None if reference is None else open_engine(reference)
    found = draw(
        list(models),
        atoms,
        scan=scan or (),
        relaxed=relaxed,
        points=points,
        extent=extent,
        seed=seed,
        reference=None if engine is None else engine.calculator,
        reference_label=None if engine is None else engine.level_of_theory,
        dtype=dtype,
        out=out,
        unit=unit,
        progress=not as_json,
    )
    result = summary(found)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    for one in result["models"]:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in one["roughness"].items())
        typer.echo(f"{one['label']}: range {one['range']:.4f} eV, {numbers}")
        for name, value in one["rms_difference_to"].items():
            typer.echo(f"  RMS difference to {name}: {value:.4f} eV")
    typer.echo(f"written to {out}; open {out / 'landscape.html'} in a browser")
