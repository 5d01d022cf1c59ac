"""``ffpretrain models``: the named models and what their cards say, without loading torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard

SCHEMA = 1
UNITS = {"force_mae": "eV/Å", "energy_mae": "eV", "cutoff": "Å", "size": "B"}


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """List the named models: level of theory, elements, force error on held-out frames, size and licence."""
    listed = collect()
    if as_json:
        answer = {"schema": SCHEMA, "units": UNITS, "models": listed}
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    if not listed:
        typer.echo("This installation has no named models.")
    for model in listed:
        for line in format_model(model):
            typer.echo(line)


def collect() -> list[dict[str, Any]]:
    """Return one dictionary of JSON types for each named model, in the units of ``UNITS``.

    Raises:
        ArtifactError: the registry or a model file is missing or damaged.
    """
    from ffpretrain.zoo import list_models, model_card, model_path

    return [
        {**summarize(model_card(name)), "size": model_path(name).stat().st_size} for name in list_models()
    ]


def summarize(card: ModelCard) -> dict[str, Any]:
    """Return what the list says of a model.

    Errors are mean absolute errors by test set; a set without the quantity is left out.
    """
    from ase.data import chemical_symbols

    from ffpretrain.units import energy_unit, force_unit

    force_mae, energy_mae = {}, {}
    for errors in card.errors.values():
        force, energy = (errors.quantities.get(name) for name in ("forces_mae", "energy_mae"))
        if force is not None:
            force_mae[errors.dataset] = force.value * force_unit(force.unit)
        if energy is not None:
            energy_mae[errors.dataset] = energy.value * energy_unit(energy.unit)
    return {
        "name": card.name,
        "description": card.description,
        "level_of_theory": card.level_of_theory,
        "elements": [chemical_symbols[number] for number in card.elements],
        "compositions": card.compositions,
        "cutoff": card.cutoff,
        "force_mae": force_mae,
        "energy_mae": energy_mae,
        "licence": card.licence,
    }


def format_model(model: dict[str, Any]) -> list[str]:
    """Return the lines of text about one model."""
    from ffpretrain.units import KCAL_PER_MOL

    formulas = f" in {', '.join(model['compositions'])}" if model["compositions"] else ""
    lines = [
        f"{model['name']}  {model['description']}".rstrip(),
        f"  elements   {' '.join(model['elements'])}{formulas}",
        f"  theory     {model['level_of_theory'] or 'not stated'}",
    ]
    lines += [
        f"  force MAE  {1000 * error:.1f} meV/Å = {error / KCAL_PER_MOL:.3f} kcal/mol/Å on {frames}"
        for frames, error in model["force_mae"].items()
    ]
    lines.append(f"  file       {model['size'] / 1e6:.1f} MB, licence {model['licence'] or 'not stated'}")
    return lines
