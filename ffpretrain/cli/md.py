"""``ffpretrain md``: molecular dynamics with a trained model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

#: ps, where neither --steps nor --time is given
DEFAULT_TIME = 5.0


class Ensemble(StrEnum):
    """What holds the temperature, if anything."""

    LANGEVIN = "nvt-langevin"
    BUSSI = "nvt-bussi"
    NOSE_HOOVER = "nvt-nose-hoover"
    NVE = "nve"


class Engine(StrEnum):
    """What moves the atoms."""

    ASE = "ase"
    OPENMM = "openmm"
    TORCHMD = "torchmd"
    TORCH_SIM = "torch-sim"


class Policy(StrEnum):
    """What to do with input the model was not trained on."""

    WARN = "warn"
    RAISE = "raise"
    IGNORE = "ignore"


class Format(StrEnum):
    """Of the trajectory."""

    TRAJ = "traj"
    EXTXYZ = "extxyz"


def md(
    model: Annotated[str, typer.Argument(help="Name of a model or a model file.")],
    structure: Annotated[
        str | None, typer.Argument(help="File that ASE reads; without it the model's own molecule.")
    ] = None,
    ensemble: Annotated[
        Ensemble, typer.Option(help="Thermostat, or none.", show_choices=False)
    ] = Ensemble.LANGEVIN,
    temperature: Annotated[float, typer.Option(help="K.")] = 300.0,
    timestep: Annotated[float, typer.Option(help="fs.")] = 0.5,
    steps: Annotated[int | None, typer.Option(help="Length of the whole run.")] = None,
    time: Annotated[float | None, typer.Option(help="The same in ps; 5 if none is given.")] = None,
    minimize: Annotated[bool, typer.Option("--minimize", help="Relax the structure first.")] = False,
    friction: Annotated[float, typer.Option(help="1/fs, rate of the thermostat.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder, or .traj, .extxyz or .xyz file.")] = Path("md-run"),
    format: Annotated[
        Format | None, typer.Option(help="traj or extxyz; else by --out.", show_choices=False)
    ] = None,
    interval: Annotated[int, typer.Option(help="Steps between frames and log lines.")] = 10,
    restart_interval: Annotated[int, typer.Option(help="Steps between restart files.")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    compile: Annotated[bool | None, typer.Option(help="Else: where it pays.")] = None,
    on_unfamiliar: Annotated[
        Policy, typer.Option(help="warn, raise or ignore.", show_choices=False)
    ] = Policy.WARN,
    engine: Annotated[
        Engine, typer.Option(help="ase, openmm, torchmd or torch-sim.", show_choices=False)
    ] = Engine.ASE,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run molecular dynamics; ensembles: nvt-langevin, nvt-bussi, nvt-nose-hoover, nve."""
    import json
    import sys

    from ffpretrain.md.output import output_paths
    from ffpretrain.md.simulation import simulate

    if steps is None and time is None:
        time = DEFAULT_TIME
    restart = output_paths(out, Format.TRAJ.value)[0].restart
    before = _mark(restart)
    try:
        result = simulate(
            structure,
            model,
            ensemble=ensemble.value,
            temperature=temperature,
            timestep=timestep,
            steps=steps,
            time_ps=time,
            friction=friction,
            seed=seed,
            engine=engine.value,
            minimize=minimize,
            out=out,
            format=None if format is None else format.value,
            interval=interval,
            log_interval=interval,
            restart_interval=restart_interval,
            resume=resume,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            compile="auto" if compile is None else compile,
            on_unfamiliar=on_unfamiliar.value,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        saved = restart.exists() and (resume or _mark(restart) != before)
        typer.echo(f"stopped; {_how_to_go_on(saved, resume, overwrite)}", err=True)
        raise typer.Exit(130) from None
    if json_output:
        typer.echo(json.dumps(result.summary))
        return
    for name, value in table(result.summary):
        typer.echo(f"{name:<18}{value}")
    for what, path in result.paths.items():
        typer.echo(f"{what.replace('_', ' '):<18}{path}")


def _mark(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written anew; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _how_to_go_on(saved: bool, resume: bool, overwrite: bool) -> str:
    """Return what a user can do after Ctrl-C.

    Args:
        saved: whether there is a restart file of this run.
        resume: given with the command.
        overwrite: likewise.
    """
    if not saved:
        return "nothing was saved, the run had not begun; the same command starts again"
    if resume:
        return "the same command goes on from the last restart file"
    place = " in place of --overwrite" if overwrite else ""
    return f"the same command with --resume{place} goes on from the last restart file"


def table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader wants to know of a run, as lines of two columns."""
    settings, kelvin, speed = summary["settings"], summary["temperature"], summary["speed"]
    model = summary["model"]
    lines = [
        ("model", ", ".join(model) if isinstance(model, list) else str(model)),
        ("structure", f"{summary['structure']['formula']}, {summary['structure']['n_atoms']} atoms"),
        ("ensemble", f"{settings['ensemble']}, {settings['timestep']:g} fs a step, by {settings['engine']}"),
        ("length", f"{summary['steps']} steps, {summary['time']:g} ps"),
        ("temperature", f"{kelvin['mean']:.1f} ± {kelvin['std']:.1f} K"),
    ]
    conserved = summary["conserved"]
    if conserved is not None:
        lines.append(
            (
                "energy drift",
                f"{conserved['drift']:+.4f} meV/atom/ps, spread {conserved['spread']:.4f} meV/atom",
            )
        )
    if speed["ms_per_step"] is not None:
        lines.append(("speed", f"{speed['ms_per_step']:.2f} ms a step, {speed['ns_per_day']:.3f} ns/day"))
    lines.append(("evaluated by", summary["backend"]))
    return lines
