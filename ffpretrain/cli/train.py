"""``ffpretrain train``: from a recipe to a model file, by noise or by labels, from scratch or further."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, a YAML file, or the folder of a run.")],
    changes: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as trainer.max_steps=1000.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run [runs/NAME].")] = None,
    data: Annotated[str | None, typer.Option(help="File or dataset in place of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model from a recipe; the result is OUT/model.safetensors.

    Shipped recipes: demo-pretrain, demo-finetune, finetune-own, harden, supervised-md17, ndem-aspirin,
    ndem-ethanol, and pretrain-OBJECTIVE: coord, frad, slide, georecon, denoisevae, 3d-emgp, se3-ddm, ndem,
    dens.
    """
    import json
    import os

    from ffpretrain.artifacts import read_card
    from ffpretrain.recipes import load_recipe

    resolved = load_recipe(recipe, changes or [], data)
    folder = out if out is not None else Path("runs") / resolved.name

    from ffpretrain.training.run import train as run

    def say(line: str) -> None:
        typer.echo(line, err=True)

    try:
        model = run(resolved, folder, resume=resume, overwrite=overwrite, say=say)
    except KeyboardInterrupt:
        kept = (folder / "checkpoints" / "last.ckpt").is_file()
        mend = "--resume goes on from the last validation" if kept else "--overwrite starts again"
        typer.echo(f"stopped; the same command with {mend} in {folder}", err=True)
        raise typer.Exit(130) from None
    card = read_card(os.fspath(model))
    summary = summarize(card, model)
    if json_output:
        typer.echo(json.dumps(summary, ensure_ascii=False))
        return
    for line in lines(summary):
        typer.echo(line)


def summarize(card: Any, model: Path) -> dict[str, Any]:
    """Return what a script would ask about a finished run, units included.

    Args:
        card: of the model.
        model: its file.
    """
    validation = card.errors.get("validation")
    errors = {} if validation is None else validation.quantities
    return {
        "schema": "ffpretrain-train",
        "version": 1,
        "model": str(model),
        "name": card.name,
        "kind": card.kind,
        "steps": card.training.steps,
        "selected_step": card.training.selected_step,
        "wall": {"value": card.training.wall_seconds, "unit": "s"},
        "validation": {name: quantity.model_dump() for name, quantity in errors.items()},
        "validation_frames": None if validation is None else validation.n_frames,
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the summary for people to read."""
    seconds = summary["wall"]["value"]
    spent = "" if seconds is None else f" in {seconds / 60:.1f} minutes"
    text = [f"{summary['steps']} steps{spent}; weights of step {summary['selected_step']}"]
    errors = summary["validation"]
    if "forces_mae" in errors:
        forces, kcal, energy = (errors[k]["value"] for k in ("forces_mae", "forces_kcal_mae", "energy_mae"))
        text.append(
            f"validation: force MAE {kcal:.3f} kcal/mol/Å ({1000 * forces:.1f} meV/Å), energy MAE "
            f"{1000 * energy:.1f} meV on {summary['validation_frames']} frames"
        )
    if summary["kind"] == "property":
        name = next(key for key in errors if key.endswith("_mae"))
        mae, unit = errors[name]["value"], errors[name]["unit"]
        said = f"{name.removesuffix('_mae')} MAE {mae:.5g} {unit}"
        text.append(f"validation: {said} on {summary['validation_frames']} frames")
    if "loss" in errors:
        from ffpretrain.objectives.floors import describe

        said = describe({name: quantity["value"] for name, quantity in errors.items()})
        text.append(f"validation: {said} on {summary['validation_frames']} frames")
    if summary["kind"] == "field":
        text.append("a force field without an energy, learned without labels: FFCalculator gives its forces")
    if summary["kind"] in ("field", "pretrained"):
        text.append(f"start a training from it with model.pretrained={summary['model']}")
    return [*text, str(summary["model"])]
