"""``ffpretrain validate``: how far a model can be trusted."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ffpretrain.md.validation import ValidationResult

MISSED = 1


class Level(StrEnum):
    """How much is run."""

    QUICK = "quick"
    FULL = "full"


def validate(
    model: Annotated[str, typer.Argument(help="Name of a model or a model file.")],
    structure: Annotated[
        str | None, typer.Argument(help="File that ASE reads; without it the model's own molecule.")
    ] = None,
    level: Annotated[Level, typer.Option(help="quick: minutes; full: hours.")] = Level.QUICK,
    out: Annotated[Path, typer.Option(help="Folder for report and state.")] = Path("validation"),
    data: Annotated[
        list[str] | None,
        typer.Option(help="Training data to compare distances with; may stand several times."),
    ] = None,
    data_temperature: Annotated[
        float | None, typer.Option(help="K, at which the data were sampled; else measured from their forces.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Calculator for frames of the model's own trajectory.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="At each temperature; else the level's.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the one in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the one in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64, of the dynamics.")] = "float32",
    compile: Annotated[bool | None, typer.Option(help="Else: where it pays.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Examine a model: engines, symmetry, vibrations, conservation, stability.

    Exit code 1 where a threshold is missed; docs/validation.md explains each.
    """
    import json
    import sys
    from dataclasses import replace

    from ffpretrain.errors import ConfigError
    from ffpretrain.md.validation import validate as run
    from ffpretrain.md.validation.plan import plan_of
    from ffpretrain.plots import require_matplotlib

    if data_temperature is not None and not data:
        raise ConfigError("--data-temperature is of the data of --data; give them, or leave it out")
    require_matplotlib()  # the report is drawn at the end, after minutes or hours
    plan = plan_of(level.value)
    try:
        result = run(
            model,
            structure,
            level=plan if replicas is None else replace(plan, replicas=replicas),
            out=out,
            data=data or None,
            data_temperature=data_temperature,
            reference=reference,
            device=device,
            dtype=dtype,
            compile="auto" if compile is None else compile,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            progress=sys.stderr.isatty(),
            report=lambda line: typer.echo(line, err=json_output),
        )
    except KeyboardInterrupt:
        typer.echo("stopped; the same command with --resume goes on from the last state", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps(result.summary) if json_output else _verdict(result))
    if not result.passed:
        raise typer.Exit(MISSED)


def _verdict(result: ValidationResult) -> str:
    """Return the last two lines: the verdict and where the report is."""
    missed = [name for name, check in result.checks.items() if check.status == "missed"]
    undecided = [name for name, check in result.checks.items() if check.status == "undecided"]
    verdict = f"missed: {', '.join(missed)}" if missed else "passed"
    if undecided:
        verdict += f"; undecided: {', '.join(undecided)}"
    return f"{verdict}\nreport      {result.paths['report']}"
