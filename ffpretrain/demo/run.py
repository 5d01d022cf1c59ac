"""The steps of ``ffpretrain demo``."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffpretrain.artifacts import load_potential
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.splits import load_splits
from ffpretrain.errors import DataError
from ffpretrain.evaluation import Predictions, error_table, predict
from ffpretrain.md import simulate
from ffpretrain.plots import plot_conservation, plot_force_parity, plot_loss
from ffpretrain.recipes import load_recipe
from ffpretrain.report import write_report
from ffpretrain.training import train
from ffpretrain.training.run import write_json

#: the named model that runs beside the demo's own
SHIPPED = "ndem-aspirin"
MARKER = "results.json"
Say = Callable[[str], None]


def run_demo(out: Path, say: Say = print, *, progress: bool = True, scale: float = 1.0) -> dict[str, Any]:
    """Pretrain, fine-tune, evaluate and simulate; write everything under ``out``.

    Args:
        out: folder; a finished demo in it is replaced, anything else is refused.
        say: receives one line for each thing done.
        progress: show progress bars.
        scale: multiplies the lengths of trainings and runs; tests use a small one.

    Returns:
        What ``results.json`` holds.

    Raises:
        DataError: ``out`` exists and is not an earlier demo, or cannot be written.
    """
    started = time.perf_counter()
    prepare_folder(out)
    say("1/4  pretraining: a network learns to undo noise on ethanol geometries, no labels")
    pretrained = _train("demo-pretrain", out / "pretrain", scale, progress)
    say("2/4  fine-tuning on 800 labelled frames (GFN2-xTB) with NDeM as auxiliary task")
    model = _train("demo-finetune", out / "finetune", scale, progress, pretrained)
    shutil.copyfile(model, out / "demo-ethanol.safetensors")
    say("3/4  errors on 300 held-out frames")
    predictions = _held_out(out)
    errors = error_table(predictions)
    forces, rms = errors["forces_kcal_mae"].value, errors["forces_label_rms"].value
    rms_kcal = rms * errors["forces_kcal_mae"].value / errors["forces_mae"].value
    say(f"     force MAE {forces:.3f} kcal/mol/Å, where the forces' own RMS is {rms_kcal:.1f} kcal/mol/Å")
    say(f"     energy MAE {errors['energy_kcal_mae'].value:.3f} kcal/mol")
    say(f"4/4  dynamics: the new model and the shipped {SHIPPED}")
    runs = _dynamics(out, scale, progress, say)
    results: dict[str, Any] = {
        "schema": "ffpretrain-demo",
        "version": 1,
        "seconds": time.perf_counter() - started,
        "held_out": {
            "n_frames": len(predictions.n_atoms),
            "errors": {name: quantity.model_dump() for name, quantity in errors.items()},
        },
        "dynamics": runs,
    }
    _figures(out, predictions)
    write_report(out / "finetune", out / "report.html", beside=out)
    write_json(out / MARKER, results)
    _farewell(out, results["seconds"], say)
    return results


def prepare_folder(out: Path) -> None:
    """Make an empty folder, removing an earlier demo.

    Raises:
        DataError: something else is there, or the folder cannot be written.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not (out / MARKER).is_file() and not (out / ".demo").is_file():
            raise DataError(f"{out}: exists and is not an earlier demo; remove it or give --out another name")
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".demo").touch()
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); give --out a folder you own") from None


def _train(name: str, out: Path, scale: float, progress: bool, pretrained: Path | None = None) -> Path:
    changes: dict[str, Any] = {}
    if pretrained is not None:
        changes["model.pretrained"] = str(pretrained)
    recipe = load_recipe(name, changes)
    if scale != 1.0:
        trainer = recipe.trainer
        steps = max(2, round(trainer.max_steps * scale))
        shorter = trainer.model_copy(update={"max_steps": steps, "val_every_steps": max(1, steps // 2)})
        recipe = recipe.model_copy(update={"trainer": shorter})
    return train(recipe, out, progress=progress)


def _held_out(out: Path) -> Predictions:
    frames = open_dataset("ethanol-gfn2")
    test = load_splits(out / "finetune" / "splits.json", frames).apply(frames)["test"]
    return predict(load_potential(str(out / "demo-ethanol.safetensors")), test)


def _dynamics(out: Path, scale: float, progress: bool, say: Say) -> dict[str, Any]:
    own = str(out / "demo-ethanol.safetensors")
    runs: dict[str, Any] = {}
    for label, model, ensemble, steps in (
        ("ethanol-nvt", own, "nvt-langevin", 2000),
        ("ethanol-nve", own, "nve", 2000),
        ("aspirin-nvt", SHIPPED, "nvt-langevin", 400),
        ("aspirin-nve", SHIPPED, "nve", 600),
    ):
        result = simulate(
            None,
            model,
            ensemble=ensemble,  # type: ignore[arg-type]
            temperature=300.0,
            timestep=0.5,
            steps=max(20, round(steps * scale)),
            minimize=True,
            seed=0,
            out=out / label,
            progress=progress,
        )
        runs[label] = result.summary
        say(f"     {label}: {_one_line(result.summary)}")
    return runs


def _one_line(summary: dict[str, Any]) -> str:
    parts = [f"{summary['time']:.2f} ps", f"mean T {summary['temperature']['mean']:.0f} K"]
    conserved = summary["conserved"]
    if conserved is not None and conserved["drift"] is not None:
        parts.append(f"energy drift {conserved['drift']:+.4f} meV/atom/ps")
    parts.append(f"{summary['speed']['ms_per_step']:.1f} ms per step")
    return ", ".join(parts)


def _figures(out: Path, predictions: Predictions) -> None:
    loss = plot_loss(
        {
            "pretraining (denoising)": (out / "pretrain" / "logs" / "metrics.csv", "train/loss"),
            "fine-tuning (NDeM)": (out / "finetune" / "logs" / "metrics.csv", "train/loss"),
        }
    )
    _save(loss, out / "loss.png")
    if predictions.forces is not None and predictions.forces_label is not None:
        parity = plot_force_parity(
            predictions.forces, predictions.forces_label, predictions.numbers, "ethanol, held-out frames"
        )
        _save(parity, out / "force-parity.png")
    logs = {
        "demo-ethanol, NVE": out / "ethanol-nve" / "log.csv",
        f"{SHIPPED}, NVE": out / "aspirin-nve" / "log.csv",
    }
    _save(plot_conservation(logs), out / "energy-conservation.png")


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format=path.suffix[1:])
    os.replace(temporary, path)


def _farewell(out: Path, seconds: float, say: Say) -> None:
    say(f"done in {seconds / 60:.1f} minutes; everything is in {out}/")
    for name, what in (
        ("demo-ethanol.safetensors", "the model"),
        ("ethanol-nvt/, ethanol-nve/, aspirin-nvt/, aspirin-nve/", "trajectories (ase gui) and logs"),
        ("report.html", "all of it on one page, for a browser"),
        ("results.json", "every number, with units"),
        ("loss.png, force-parity.png, energy-conservation.png", "plots"),
    ):
        say(f"  {name}: {what}")
    say("next, try:")
    say(f"  ffpretrain md {SHIPPED} --time 5 --temperature 300 --out aspirin-5ps")
    say(f"  ffpretrain evaluate {out}/demo-ethanol.safetensors ethanol-gfn2 --json")
    say("  ffpretrain label my-molecule.xyz --engine gfn2 --n 200 --out labels.h5  (with the extra [label])")
