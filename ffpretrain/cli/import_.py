"""``ffpretrain import``: another program's checkpoint as a model file."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ffpretrain.importing import Imported


class Kind(StrEnum):
    """What to make of the checkpoint."""

    AUTO = "auto"
    POTENTIAL = "potential"
    FIELD = "field"
    PRETRAINED = "pretrained"


def import_(
    file: Annotated[Path, typer.Argument(help="Lightning checkpoint of a TorchMD-Net ET.", metavar="FILE")],
    out: Annotated[Path | None, typer.Option(help="Model file to write [NAME.safetensors].")] = None,
    length_unit: Annotated[str | None, typer.Option(help="Of its data: angstrom, bohr, nm.")] = None,
    energy_unit: Annotated[str | None, typer.Option(help="Of its data: eV, kcal/mol, ...")] = None,
    kind: Annotated[
        Kind, typer.Option(help="potential, field or pretrained; else as trained.", show_choices=False)
    ] = Kind.AUTO,
    elements: Annotated[str | None, typer.Option(help="It was trained on, such as H,C,N,O.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model [that of FILE].")] = None,
    level_of_theory: Annotated[str | None, typer.Option(help="Of its labels.")] = None,
    temperature: Annotated[float | None, typer.Option(help="K, sets the scale of a field [300].")] = None,
    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Drop weights without a place, listing them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model file.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Turn a TorchMD-Net ET checkpoint, as of Coord or Frad, into a model file.

    No code from the file is run. An energy gives a potential, a denoising head a field.
    """
    from ffpretrain.artifacts import save_potential
    from ffpretrain.errors import ArtifactError
    from ffpretrain.importing import import_torchmd_net
    from ffpretrain.lightning_file import read_lightning_checkpoint

    target = out if out is not None else Path(f"{name or file.stem}.safetensors")
    if target.exists() and not overwrite:
        raise ArtifactError(f"{target}: exists; give --out another name, or --overwrite")
    checkpoint = read_lightning_checkpoint(file)
    imported = import_torchmd_net(
        checkpoint,
        length=length_unit,
        energy=energy_unit,
        kind=kind.value,
        elements=None if elements is None else atomic_numbers(elements),
        name=name,
        level_of_theory=level_of_theory,
        temperature=temperature,
        allow_unmatched=allow_unmatched,
    )
    save_potential(imported.model, target, imported.card)
    units = {"length": length_unit, "energy": energy_unit}
    if json_output:
        typer.echo(json.dumps(summarize(imported, target, units), ensure_ascii=False))
        return
    for line in lines(imported, target):
        typer.echo(line)


def atomic_numbers(symbols: str) -> list[int]:
    """Return the atomic numbers of symbols between commas.

    Raises:
        ConfigError: no such element.
    """
    from ase.data import atomic_numbers as known

    from ffpretrain.errors import ConfigError

    found = [symbol.strip() for symbol in symbols.split(",") if symbol.strip()]
    for symbol in found:
        if not known.get(symbol):
            raise ConfigError(
                f"--elements {symbols!r}: {symbol!r} is no element; give symbols such as H,C,N,O"
            )
    if not found:
        raise ConfigError("--elements names none; give symbols such as H,C,N,O")
    return sorted({known[symbol] for symbol in found})


def summarize(imported: Imported, model: Path, units: dict[str, str | None]) -> dict[str, Any]:
    """Return what a script would ask about an import.

    Args:
        imported: what was made.
        model: the file written.
        units: of the source, as given.
    """
    card = imported.card
    return {
        "schema": "ffpretrain-import",
        "version": 1,
        "model": str(model),
        "name": card.name,
        "kind": card.kind,
        "source": {**card.parents[0].model_dump(), "units": units},
        "backbone": card.backbone.model_dump(),
        "cutoff": {"value": card.cutoff, "unit": card.units.length},
        "elements": card.elements,
        "weights": sum(p.numel() for p in imported.model.parameters()),
        "left_out": [{"key": key, "reason": reason} for key, reason in imported.left_out.items()],
        "unmatched": imported.unmatched,
        "notes": imported.notes,
    }


def lines(imported: Imported, model: Path) -> list[str]:
    """Return the result for people to read: every weight that was not taken over is named."""
    card = imported.card
    count = sum(p.numel() for p in imported.model.parameters())
    text = [f"{card.kind} with {count} weights, cutoff {card.cutoff:g} Å"]
    by_reason: dict[str, list[str]] = {}
    for key, reason in imported.left_out.items():
        by_reason.setdefault(reason, []).append(key)
    text += [f"left out ({reason}): {', '.join(sorted(keys))}" for reason, keys in by_reason.items()]
    if imported.unmatched:
        text.append(f"dropped, without a place in the model: {', '.join(imported.unmatched)}")
    text += [f"note: {note}" for note in imported.notes]
    if card.kind != "potential":
        text.append(f"start a training from it with model.pretrained={model}")
    return [*text, str(model)]
