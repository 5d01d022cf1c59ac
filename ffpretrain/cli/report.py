"""``ffpretrain report``: one HTML page about a model or a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    source: Annotated[str, typer.Argument(help="folder of a run, model file or named model")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    data: Annotated[str | None, typer.Option(help="labelled frames for the parity plots")] = None,
    molecule: Annotated[
        str | None, typer.Option(help="molecule or file, for dataset names that need one")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="key=value for the reader, such as part=test")
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(help="folder with the model's dynamics, validations, landscapes")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="evaluate the first N frames only")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a line")] = False,
) -> None:
    """Write one self-contained HTML page: card, training curves, parity plots, dynamics, validation.

    Of a run's folder it shows all that lies there; of a model alone its card, and its errors on --data.
    """
    from ffpretrain.cli.evaluate import reader_options
    from ffpretrain.datasets import open_dataset
    from ffpretrain.report import write_report

    frames = None
    if data is not None:
        frames = open_dataset(data, *([molecule] if molecule else []), **reader_options(option))
    path = write_report(source, out, frames=frames, limit=limit, beside=beside)
    if as_json:
        typer.echo(json.dumps({"schema": "ffpretrain-report", "version": 1, "report": str(path)}))
    else:
        typer.echo(f"written to {path}; open it in a browser")
