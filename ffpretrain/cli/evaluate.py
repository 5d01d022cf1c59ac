"""``ffpretrain evaluate``: errors of a model on labelled frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="named model or model file")],
    data: Annotated[str, typer.Argument(help="labelled file, or a dataset name such as ethanol-gfn2")],
    molecule: Annotated[
        str | None, typer.Option(help="molecule or file, for dataset names that need one")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="key=value for the reader, such as part=test")
    ] = None,
    split: Annotated[Path | None, typer.Option(help="saved split (splits.json of a run)")] = None,
    part: Annotated[str, typer.Option(help="part of the split: train, val or test")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="evaluate the first N frames only")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64")] = "float32",
    record: Annotated[
        str | None, typer.Option(help="write the errors into the model file's card under this name")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Print errors (MAE, RMSE) of MODEL on DATA, with units: energies and forces, or its property."""
    from ffpretrain.artifacts import MeasuredErrors, load_potential
    from ffpretrain.cli.progress import counting
    from ffpretrain.datasets import open_dataset
    from ffpretrain.datasets.splits import load_splits
    from ffpretrain.evaluation import measure, unfamiliar

    potential = load_potential(model, device=device, dtype=dtype)
    frames = open_dataset(data, *([molecule] if molecule else []), **reader_options(option))
    if split is not None:
        frames = load_splits(split, frames).apply(frames)[part]
    if limit is not None:
        frames = frames[: min(limit, len(frames))]
    strange = unfamiliar(potential, frames)
    for line in strange:
        typer.echo(f"warning: {line}; expect larger errors there", err=True)
    with counting("evaluate", len(frames), quiet=as_json) as advance:
        table = measure(potential, frames, advance)
    description = f"{frames.metadata.name}, {_which(option, split, part)}{len(frames)} frames"
    measured = MeasuredErrors(dataset=description, n_frames=len(frames), quantities=table)
    if record is not None:
        _record(potential, model, record, measured)
    card = potential.card
    shared = _files_in_common(card, frames.metadata.sha256)
    result: dict[str, Any] = {
        "schema": "ffpretrain-evaluate",
        "version": 1,
        "model": card.name if card is not None else model,
        "data": frames.metadata.name,
        "n_frames": len(frames),
        "level_of_theory": frames.metadata.level_of_theory,
        "training_files_among_data": shared,
        "unfamiliar": strange,
        "errors": {name: quantity.model_dump() for name, quantity in table.items()},
    }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    _print_table(result)


def reader_options(pairs: list[str] | None) -> dict[str, Any]:
    """Return the reader's options of ``key=value`` words.

    Raises:
        ConfigError: a word without an equals sign.
    """
    import yaml

    from ffpretrain.errors import ConfigError

    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError(f"--option {pair!r} is not of the form key=value")
        options[key] = yaml.safe_load(value)
    return options


def _which(option: list[str] | None, split: Path | None, part: str) -> str:
    chosen = [part] if split is not None else []
    return "".join(f"{word}, " for word in [*(option or []), *chosen] if "/" not in word)


def _record(potential: Any, model: str, name: str, measured: Any) -> None:
    """Write measured errors into a model file's card; the weights stay as they are."""
    import torch

    from ffpretrain.artifacts import save_potential
    from ffpretrain.errors import ArtifactError

    path = Path(model)
    if not path.is_file():
        raise ArtifactError(f"{model}: --record changes a model file; give its path, not a name")
    if potential.dtype != torch.float32:
        raise ArtifactError("--record keeps the weights as stored; evaluate with --dtype float32")
    card = potential.card
    errors = {**card.errors, name: measured}
    save_potential(potential, path, card.model_copy(update={"errors": errors}))


def _files_in_common(card: Any, checksums: Any) -> list[str]:
    if card is None:
        return []
    trained_on = {digest for data in card.training_data for digest in data.sha256.values()}
    return sorted(name for name, digest in dict(checksums).items() if digest in trained_on)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    level = result["level_of_theory"] or "unknown level of theory"
    table = Table(title=f"{result['model']} on {result['n_frames']} frames of {result['data']} ({level})")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for name, entry in result["errors"].items():
        table.add_row(name, f"{entry['value']:.5g}", entry["unit"])
    console = Console()
    console.print(table)
    if result["training_files_among_data"]:
        names = ", ".join(result["training_files_among_data"])
        console.print(
            f"note: the model's training frames were taken from the same file ({names}); unless --split "
            "picks held-out ones, these errors are not those of unseen frames"
        )
