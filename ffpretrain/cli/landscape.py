"""``ffpretrain landscape``: energies on a grid of geometries, drawn."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ffpretrain.md.landscapes import Landscape


def landscape(
    out: Annotated[Path, typer.Option(help="folder for PNG, SVG, PDF, HTML, npz")],
    models: Annotated[
        list[str] | None, typer.Argument(help="named models, files or engines (gfn2, mmff), on one grid")
    ] = None,
    structure: Annotated[Path | None, typer.Option(help="file; else the model's own geometry")] = None,
    scan: Annotated[
        list[str] | None, typer.Option(help="'dihedral 0 1 2 3 -180 180 37'; twice for a map")
    ] = None,
    relaxed: Annotated[bool, typer.Option("--relaxed", help="relax all but the scanned coordinates")] = False,
    along: Annotated[
        str | None,
        typer.Option(
            help="'modes 0 1', 'trajectory FILE', 'conformations FILE' or 'band FILE'", metavar="<str>"
        ),
    ] = None,
    directions_from: Annotated[
        str | None, typer.Option(help="DenoiseVAE model: draws of its noise span the plane")
    ] = None,
    free_energy: Annotated[
        Path | None, typer.Option(help="trajectory, over --scan 'bond 0 1' (no range); no MODELS")
    ] = None,
    temperature: Annotated[float, typer.Option(help="K, of that trajectory")] = 300.0,
    points: Annotated[int, typer.Option(help="of a plane along each axis; bins")] = 41,
    extent: Annotated[float, typer.Option(help="Å RMS displacement of an atom")] = 0.15,
    seed: Annotated[int, typer.Option(min=0, help="of directions and heads")] = 0,
    fit_head: Annotated[
        str | None, typer.Option(help="labelled data: fit energy heads, encoders frozen")
    ] = None,
    with_untrained: Annotated[
        bool, typer.Option("--with-untrained", help="and to fresh weights of the network")
    ] = False,
    molecule: Annotated[str | None, typer.Option(help="of the data of --fit-head")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="likewise, key=value")] = None,
    reference: Annotated[str | None, typer.Option(help="engine drawn on top: gfn2, mmff, …")] = None,
    labels: Annotated[Path | None, typer.Option(help="labelled frames drawn on top")] = None,
    unit: Annotated[str, typer.Option(help="of energies: kcal/mol or eV")] = "kcal/mol",
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the one in --out")] = False,
    no_forces: Annotated[bool, typer.Option("--no-forces", help="energies alone: quicker")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Draw the energy of MODELS on a plane or along coordinates, side by side.

    Without --scan, --along or --directions-from the plane is random. Stopped, it goes on when run again.
    """
    from ffpretrain.errors import ConfigError
    from ffpretrain.md.landscapes.files import summary

    if free_energy is not None:
        if models:
            raise ConfigError("--free-energy is read off the trajectory; leave the models out")
        found = [_free_energy(free_energy, scan or [], temperature, points, out, unit, overwrite, as_json)]
    elif not models:
        raise ConfigError("name a model, a model file or an engine")
    else:
        from ffpretrain.datasets.structures import read_structure
        from ffpretrain.md.landscapes import landscape as draw

        found = draw(
            [_model(name) for name in models],
            None if structure is None else read_structure(structure)[0],
            scan=scan or (),
            relaxed=relaxed,
            along=along,
            directions_from=directions_from,
            points=points,
            extent=extent,
            seed=seed,
            fit_head=_data(fit_head, molecule, option),
            with_untrained=with_untrained,
            **_reference(reference),
            labels=None if labels is None else _data(str(labels), None, None),
            dtype=dtype,
            forces=not no_forces,
            out=out,
            unit=unit,
            overwrite=overwrite,
            progress=not as_json,
        )
    if as_json:
        typer.echo(json.dumps(summary(found, unit), indent=2))
    else:
        _print(found, out, unit)


def _model(name: str) -> Any:
    """Return a model's name or file as it is, and the calculator of an engine's name."""
    from ffpretrain import zoo
    from ffpretrain.datasets.engines import built_in_engines, open_engine

    if name.lower() in built_in_engines() and name not in zoo.list_models() and not Path(name).exists():
        return open_engine(name).calculator
    return name


def _reference(name: str | None) -> dict[str, Any]:
    from ffpretrain.datasets.engines import open_engine

    if name is None:
        return {}
    engine = open_engine(name)
    return {"reference": engine.calculator, "reference_label": engine.level_of_theory}


def _data(name: str | None, molecule: str | None, option: list[str] | None) -> Any:
    from ffpretrain.cli.evaluate import reader_options
    from ffpretrain.datasets import open_dataset
    from ffpretrain.errors import ConfigError

    if name is None:
        if molecule is not None or option:
            raise ConfigError("--molecule and --option belong to the data of --fit-head; give it")
        return None
    return open_dataset(name, *([molecule] if molecule else []), **reader_options(option))


def _free_energy(
    trajectory: Path,
    variables: list[str],
    temperature: float,
    bins: int,
    out: Path,
    unit: str,
    overwrite: bool,
    quiet: bool,
) -> Landscape:
    from ffpretrain.cli.progress import counting
    from ffpretrain.errors import ConfigError
    from ffpretrain.md.landscapes.files import output_folder, write
    from ffpretrain.md.landscapes.grids import read_structures
    from ffpretrain.md.landscapes.histograms import free_energy_landscape
    from ffpretrain.md.landscapes.surface import UNITS
    from ffpretrain.plots import require_matplotlib

    require_matplotlib()
    if unit not in UNITS:
        raise ConfigError(f"--unit {unit}: give one of {', '.join(UNITS)}")
    with output_folder(out, overwrite) as folder:
        frames = read_structures(trajectory, functools.partial(counting, quiet=quiet))
        found = free_energy_landscape(frames, variables, temperature, bins)
        write([found], folder, unit)
    return found


def _print(found: list[Landscape], out: Path, unit: str) -> None:
    from ffpretrain.md.landscapes.words import describe

    for line in describe(found, unit):
        typer.echo(line)
    geometries = found[0].geometries
    if (noise := geometries.noise) is not None:
        typer.echo(f"noise of an atom: {noise.min():.4f} to {noise.max():.4f} Å; see {out / 'noise.png'}")
    typer.echo(geometries.note)
    typer.echo(f"written to {out}; open {out / 'landscape.html'} in a browser")
