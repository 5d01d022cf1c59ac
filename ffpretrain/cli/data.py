"""``ffpretrain data``: look at, check, convert, split and download datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ffpretrain.datasets import Dataset

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Inspect, check, convert, split and download datasets.",
)

BAD_LABELS = 1
_PROGRESS_FROM = 2000

Source = Annotated[str, typer.Argument(help="A file, a bundled dataset, or a format such as rmd17.")]
Item = Annotated[str | None, typer.Argument(help="After a format: its molecule or file.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="key=value for the reader: split=1, units.energy=ev."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command("list")
def list_datasets(json_output: Json = False) -> None:
    """List known datasets and formats."""
    from ffpretrain.datasets.cache import cache_folder
    from ffpretrain.datasets.catalog import CATALOG
    from ffpretrain.datasets.registry import BUNDLED, known_formats

    formats = known_formats()
    if json_output:
        downloads = {
            name: {"summary": d.summary, "licence": d.licence, "files": [f.name for f in d.files]}
            for name, d in CATALOG.items()
        }
        summaries = {name: known.summary for name, known in formats.items()}
        _print_json(
            "ffpretrain-data-list",
            bundled=sorted(BUNDLED),
            downloads=downloads,
            formats=summaries,
            cache=str(cache_folder()),
        )
        return
    typer.echo("bundled:    " + ", ".join(BUNDLED))
    typer.echo(f"downloads, kept in {cache_folder()}:")
    for name, known in CATALOG.items():
        typer.echo(f"  {name:26} {known.summary}")
    typer.echo("formats:")
    for name, form in formats.items():
        typer.echo(f"  {name:26} {form.summary} {' '.join(form.suffixes)}".rstrip())


@app.command()
def info(source: Source, item: Item = None, option: Options = None, json_output: Json = False) -> None:
    """Print what a dataset holds.

    Frames, elements, energies, forces, level of theory, units, checksums.
    """
    from ffpretrain.datasets.summary import describe

    dataset = _open(source, item, option)
    with _progress("reading", len(dataset)) as advance:
        summary = describe(dataset, advance)
    if json_output:
        typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    for line in _lines(summary):
        typer.echo(line)


@app.command()
def check(
    source: Source,
    item: Item = None,
    option: Options = None,
    pairs: Annotated[int, typer.Option(help="Pairs of near frames to compare.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the sample of frames.")] = 0,
    json_output: Json = False,
) -> None:
    """Check that energies and forces agree.

    The exit code is 1 if units or signs are wrong, or the labels do not belong together.
    """
    from ffpretrain.datasets.consistency import check_labels

    report = check_labels(_open(source, item, option), pairs, seed)
    if json_output:
        finite = {"slope": report.slope, "correlation": report.correlation, "distance": report.distance}
        _print_json(
            "ffpretrain-data-check",
            ok=report.ok,
            verdict=report.verdict,
            message=report.message,
            pairs=report.n_pairs,
            units={"slope": "1", "correlation": "1", "distance": "Å"},
            **{name: None if value != value else value for name, value in finite.items()},
        )
    else:
        typer.echo(f"{report.verdict}: {report.message}")
    if not report.ok:
        raise typer.Exit(BAD_LABELS)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="File to read, or a bundled dataset.")],
    out: Annotated[Path, typer.Argument(help="File to write: .h5 or .extxyz.")],
    format_name: Annotated[str | None, typer.Option("--format", help="Format of the input.")] = None,
    option: Options = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write a dataset as .h5 or .extxyz."""
    from ffpretrain.datasets.convert import write_dataset

    dataset = _open(format_name, source, option) if format_name else _open(source, None, option)
    with _progress("writing", len(dataset)) as advance:
        path = write_dataset(dataset, out, overwrite, advance)
    typer.echo(f"{path}: {len(dataset)} frames of {dataset.metadata.name}")


@app.command()
def split(
    source: Source,
    out: Annotated[Path, typer.Option(help="File to write: .json or .npz.")],
    train: Annotated[int, typer.Option(help="Frames to train on.")],
    val: Annotated[int, typer.Option(help="Frames to validate on.")],
    item: Item = None,
    test: Annotated[int, typer.Option(help="Frames to test on.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    option: Options = None,
) -> None:
    """Draw a split from a seed and save it."""
    from ffpretrain.datasets.splits import random_split, save_splits

    dataset = _open(source, item, option)
    drawn = random_split(len(dataset), (train, val, test), seed, dataset)
    path = save_splits(out, drawn)
    typer.echo(f"{path}: {train} train, {val} val, {test} test of {len(dataset)} frames, seed {seed}")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="A name of 'ffpretrain data list'.")],
    root: Annotated[Path | None, typer.Option(help="Folder in place of the cache.")] = None,
) -> None:
    """Download a published dataset.

    The same command goes on where an earlier one broke off.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from ffpretrain.datasets.download import download as fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def advance(file: str, done: int, expected: int | None) -> None:
        if not tasks:
            bars.start()
        if file not in tasks:
            tasks[file] = bars.add_task(file, total=expected)
        bars.update(tasks[file], completed=done)

    try:
        files = fetch(name, root, advance)
    finally:
        if tasks:
            bars.stop()
    for file in files:
        state = "downloaded" if file.fetched else "in place"
        resumed = f", resumed after {file.resumed_from:,} bytes" if file.resumed_from else ""
        proof = "checksum verified" if file.verified else "unverified: its publisher gives no checksum"
        typer.echo(f"{file.path}: {state}{resumed}, {proof}, SHA-256 {file.sha256}")


def _open(source: str, item: str | None, option: list[str] | None) -> Dataset:
    from ffpretrain.datasets import open_dataset

    return open_dataset(source, item, **_options(option or []))


def _options(words: list[str]) -> dict[str, Any]:
    """Return reader options from ``key=value``; ``units.energy=ev`` makes an entry of a dictionary."""
    from ffpretrain.errors import ConfigError

    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        outer, dot, inner = key.partition(".")
        if not equals or not outer or (dot and not inner):
            raise ConfigError(f"--option {word!r} is not of the form key=value, such as split=1")
        value: Any = {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(value, str) and text.lstrip("-").isdecimal():
            value = int(text)
        if dot:
            options.setdefault(outer, {})[inner] = value
        else:
            options[outer] = value
    return options


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """Give a function to call with the frames done, behind a bar where there are many frames."""
    if total < _PROGRESS_FROM:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, completed=done) if done % 100 == 0 else None


def _print_json(schema: str, **content: Any) -> None:
    typer.echo(json.dumps({"schema": schema, "version": 1, **content}, indent=1, ensure_ascii=False))


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    """Yield the summary for people to read."""
    atoms, energy, forces = summary["atoms"], summary["energy"], summary["forces"]
    size = str(atoms["smallest"])
    if atoms["largest"] != atoms["smallest"]:
        size += f" to {atoms['largest']}"
    many = f" ({summary['compositions']} compositions)" if summary["compositions"] > 1 else ""
    yield f"dataset          {summary['name']}"
    yield f"frames           {summary['frames']} of {size} atoms, {summary['most_common_composition']}{many}"
    yield f"elements         {' '.join(summary['elements'])}"
    if energy["frames"]:
        yield (
            f"energy           mean {energy['mean (eV)']:.5f} eV = {energy['mean (kcal/mol)']:.3f} kcal/mol, "
            f"std {energy['std (eV)']:.5f} eV = {energy['std (kcal/mol)']:.3f} kcal/mol"
        )
    if forces["frames"]:
        yield (
            f"forces           RMS {forces['component RMS (eV/Å)']:.5f} eV/Å = "
            f"{forces['component RMS (kcal/mol/Å)']:.3f} kcal/mol/Å, "
            f"largest {forces['largest (eV/Å)']:.3f} eV/Å"
        )
    if not energy["frames"] and not forces["frames"]:
        yield "labels           none"
    elif not energy["frames"] == forces["frames"] == summary["frames"]:
        yield f"labelled         {energy['frames']} frames with energy, {forces['frames']} with forces"
    yield from _details(summary)


def _details(summary: dict[str, Any]) -> Iterator[str]:
    for count, name in (
        ("periodic_frames", "periodic"),
        ("frames_with_stress", "with stress"),
        ("frames_with_fixed_atoms", "fixed atoms"),
    ):
        if summary[count]:
            yield f"{name:16} {summary[count]} frames"
    if summary["charges"] != [0] or summary["spins"] != [1]:
        yield f"charge, spin     {summary['charges']}, {summary['spins']}"
    yield f"level of theory  {summary['level_of_theory'] or 'not known'}"
    yield f"energy zero      {summary['energy_zero'] or 'not known'}"
    yield f"licence          {summary['licence'] or 'not known'}"
    units = ", ".join(f"{what} {unit}" for what, unit in summary["units_in_file"].items())
    yield f"units in file    {units or 'not known'}"
    if summary["properties"]:
        yield "properties       " + ", ".join(f"{k} [{v}]" for k, v in summary["properties"].items())
    if summary["splits"]:
        yield "splits           " + ", ".join(f"{k}: {v}" for k, v in summary["splits"].items())
    for file, sha256 in summary["sha256"].items():
        yield f"sha256           {sha256}  {file}"
