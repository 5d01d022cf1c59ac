"""``ffpretrain label``: make a dataset from one structure and an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def label(
    structure: Annotated[str, typer.Argument(help="File that ASE reads; FILE@2 for its third structure.")],
    out: Annotated[Path, typer.Option(help="Store to make or continue")] = Path("labels.h5"),
    engine: Annotated[str, typer.Option(help="See above")] = "gfn2",
    n: Annotated[int, typer.Option(help="Frames in the store at the end")] = 200,
    method: Annotated[str, typer.Option(help="Or normal-modes, gaussian")] = "dynamics",
    temperature: Annotated[float, typer.Option(help="K; not for gaussian")] = 500.0,
    seed: Annotated[int, typer.Option(help="Of every random draw")] = 0,
    spacing: Annotated[float, typer.Option(help="fs between frames of dynamics")] = 40.0,
    equilibration: Annotated[float, typer.Option(help="fs before the first frame")] = 2000.0,
    timestep: Annotated[float, typer.Option(help="fs, of dynamics")] = 0.5,
    friction: Annotated[float, typer.Option(help="1/fs, of the thermostat")] = 0.01,
    std: Annotated[float, typer.Option(help="Å, of gaussian displacements")] = 0.05,
    lowest_mode: Annotated[float, typer.Option(help="1/cm; softer modes left out")] = 50.0,
    charge: Annotated[int | None, typer.Option(help="In e [the file's, or 0]")] = None,
    spin: Annotated[int | None, typer.Option(help="2S + 1 [the file's, or 1]")] = None,
    engine_option: Annotated[list[str] | None, typer.Option(help="key=value for the engine")] = None,
    precision: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    name: Annotated[str | None, typer.Option(help="Name of the dataset")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON")] = False,
) -> None:
    """Sample geometries of a structure and label them; the same command again continues or extends.

    An engine is gfn2, gfn1, emt, lj, a name that ASE knows, or module:Class.
    """
    import json
    import time

    from ffpretrain.datasets.label import label_dataset

    begun = time.monotonic()
    try:
        store = label_dataset(
            structure,
            out,
            engine,
            n,
            method,
            temperature,
            seed,
            charge=charge,
            spin=spin,
            engine_options=_options(engine_option or []),
            name=name,
            licence=licence,
            precision=precision,
            progress=True,
            report=lambda line: typer.echo(line, err=True),
            spacing=spacing,
            equilibration=equilibration,
            timestep=timestep,
            friction=friction,
            std=std,
            lowest_mode=lowest_mode,
        )
    except KeyboardInterrupt:
        kept = f"; the frames so far are in {out}.part" if Path(f"{out}.part").exists() else ""
        typer.echo(f"stopped{kept}; the same command continues", err=True)
        raise typer.Exit(130) from None
    result = _summary(store, out, time.monotonic() - begun)
    if json_output:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{out}: {result['frames']} frames of {result['atoms']} atoms, {result['level_of_theory']}; "
        f"energies spread by {result['energy_std']:.3f} eV, force RMS {result['force_rms']:.3f} eV/Å"
    )


def _options(pairs: list[str]) -> dict[str, object]:
    """Read ``key=value``; a value is JSON where it can be (numbers, true, lists), else text."""
    import json

    from ffpretrain.errors import ConfigError

    options: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"engine option {pair!r} is not of the form key=value")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _summary(store: object, out: Path, seconds: float) -> dict[str, object]:
    """Return what a script would ask about the store."""
    import numpy as np

    from ffpretrain.datasets.store import FrameStore

    if not isinstance(store, FrameStore):
        raise TypeError("a FrameStore is expected")
    energies = np.array([frame.energy for frame in store], np.float64)
    squares = np.concatenate([np.ravel(frame.forces) ** 2 for frame in store if frame.forces is not None])
    notes = store.notes["label"]
    return {
        "schema": "ffpretrain-label",
        "version": 1,
        "path": str(out),
        "frames": len(store),
        "atoms": int(store.n_atoms[0]),
        "level_of_theory": store.metadata.level_of_theory,
        "energy_zero": store.metadata.energy_zero,
        "units": {"energy": "eV", "forces": "eV/angstrom", "positions": "angstrom"},
        "energy_mean": float(energies.mean()),
        "energy_std": float(energies.std()),
        "force_rms": float(np.sqrt(squares.mean())),
        "replaced": len(notes["replaced"]),
        "command": store.metadata.source,
        "seconds": round(seconds, 2),
    }
