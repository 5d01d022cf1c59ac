"""From a run whose training has ended to its artefact: the best weights, and a card that says everything."""

from __future__ import annotations

import inspect
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ffpretrain.artifacts import (
    Component,
    MeasuredErrors,
    ModelCard,
    Parent,
    Quantity,
    ReferenceGeometry,
    TrainingData,
    TrainingRun,
    make_card,
    save_potential,
)
from ffpretrain.artifacts.networks import can_be_saved
from ffpretrain.errors import DataError
from ffpretrain.evaluation import measure
from ffpretrain.objectives import objective_class
from ffpretrain.objectives.floors import is_reference
from ffpretrain.potential import Model
from ffpretrain.training.checkpoints import BEST, LAST, RECORD, read_checkpoint
from ffpretrain.training.data import SampleDataset
from ffpretrain.training.survey import MANY_COMPOSITIONS, Survey, survey_frames
from ffpretrain.training.terms import mean_terms
from ffpretrain.units import KB

if TYPE_CHECKING:
    from ffpretrain.training.run import Run

MODEL_FILE = "model.safetensors"
ARBITRARY_ZERO = "arbitrary: learned without energies"


def finish(run: Run, out: Path, wall_seconds: float | None = None) -> Path:
    """Write ``out/model.safetensors`` from the best checkpoint of a run.

    The weights are those of the validation with the smallest error, averaged where the recipe averages. What
    an objective learned without labels is written as a potential or, where it has no energy, as a field; a
    plug-in's model of a class that no file can hold gives its network alone, of kind ``pretrained``, to start
    other runs from.

    Args:
        run: from :func:`~ffpretrain.training.run.prepare`, with the recipe the run was made with; its module
            takes the weights.
        out: folder of the run.
        wall_seconds: training time, where the checkpoint does not hold it.

    Returns:
        Path of the file.

    Raises:
        DataError: the run has no checkpoint, or one that does not fit the recipe.
        ArtifactError: the file cannot be written.
    """
    best, last = (read_checkpoint(out / "checkpoints" / name) for name in (BEST, LAST))
    load_weights(run, best, out / "checkpoints" / BEST)
    seconds = last.get(RECORD, {}).get("wall_seconds", wall_seconds)
    potential, learned = _learned(run)
    survey = survey_frames(run.dataset[run.splits.train], potential.cutoff)
    card = build_card(run, potential, survey, **learned).model_copy(
        update={
            "training": TrainingRun(
                steps=int(last["global_step"]),
                selected_step=int(best["global_step"]),
                wall_seconds=seconds,
                hardware=describe_hardware(run),
                seed=run.recipe.trainer.seed,
                torch=str(torch.__version__),
                date=datetime.now(UTC).date().isoformat(),
            )
        }
    )
    return save_potential(potential, out / MODEL_FILE, card)


def load_weights(run: Run, checkpoint: dict[str, Any], where: Path) -> None:
    """Put a checkpoint's (averaged) weights into the run's module.

    Raises:
        DataError: the checkpoint is of another network than the recipe's.
    """
    own, stored = run.module.state_dict(), checkpoint["state_dict"]
    differing = sorted(
        key
        for key in own.keys() | stored.keys()
        if key not in own or key not in stored or own[key].shape != stored[key].shape
    )
    if differing:
        raise DataError(
            f"{where}: does not fit the recipe's network ({len(differing)} weights differ, first "
            f"{differing[0]}); give the recipe that the run was started with"
        )
    run.module.load_state_dict(stored)


def _learned(run: Run) -> tuple[Model, dict[str, Any]]:
    """Return what the artefact holds, in eval mode, and the card's fields about how it was learned."""
    objective, kelvin = run.module.objective, run.recipe.data.temperature
    learned = objective.potential(kT=KB * kelvin)
    if not (isinstance(learned, Model) and can_be_saved(learned)):
        return objective.network.eval(), {"kind": "pretrained"}
    return learned.eval(), {} if objective.needs_labels else {"temperature": kelvin}


def build_card(run: Run, potential: Model, survey: Survey, **learned: Any) -> ModelCard:
    """Return the card of a trained model; no path of this machine stands in it.

    Args:
        run: what it was trained in.
        potential: with its final weights.
        survey: of the training frames.
        **learned: fields of the card about how it was learned.
    """
    recipe, metadata = run.recipe, run.dataset.metadata
    labelled = run.module.objective.needs_labels
    single = len(survey.compositions) == 1
    unlabelled_zero = ARBITRARY_ZERO if potential.conservative else None
    given = {key: _bare(value) for key, value in recipe.objective.options.items()}
    return make_card(
        potential,
        recipe.name,
        description=recipe.description,
        **learned,
        charges=survey.charges,
        spins=survey.spins,
        energy_zero=metadata.energy_zero if labelled and potential.has_energy else unlabelled_zero,
        level_of_theory=metadata.level_of_theory if labelled else None,
        training_data=[_training_data(run)],
        compositions=survey.compositions if len(survey.compositions) <= MANY_COMPOSITIONS else None,
        min_distance=survey.min_distance,
        pair_distances=survey.pair_distances,
        objective=Component(
            name=recipe.objective.name, options={**_default_options(recipe.objective.name, given), **given}
        ),
        recipe=public_recipe(run),
        reference_geometry=_reference_geometry(survey) if single else None,
        errors={"validation": _validation(run, potential)},
        parents=[] if run.parent is None else [Parent(name=run.parent.name, sha256=run.parent.sha256)],
        citation=recipe.citation,
        licence=recipe.licence,
    )


def _validation(run: Run, potential: Model) -> MeasuredErrors:
    """Return what the validation frames say: errors of labels, and terms that are read against a reference.

    The terms are those of a validation with these weights, noise included.
    """
    objective, frames = run.module.objective.cpu(), run.dataset[run.splits.val]
    quantities = {}
    if objective.needs_labels:
        quantities = measure(potential.cpu(), frames)
    needs = objective.labels(run.recipe.objective.options)
    samples = SampleDataset(frames, objective.network.cutoff, needs, run.splits.val)
    terms = mean_terms(objective, samples, run.recipe.trainer.seed, run.recipe.trainer.val_batch_size)
    if not objective.needs_labels or any(map(is_reference, terms)):
        units = {name: objective.unit_of(name) for name in terms}
        quantities |= {name: Quantity(value=value, unit=units[name]) for name, value in terms.items()}
    where = f"{run.dataset.metadata.name}, validation frames (the weights were selected on them)"
    return MeasuredErrors(dataset=where, n_frames=len(frames), quantities=quantities)


def _training_data(run: Run) -> TrainingData:
    recipe, metadata, splits = run.recipe, run.dataset.metadata, run.splits
    sizes = splits.sizes()
    if recipe.data.split_file is not None:
        chosen = f"as in the split file {recipe.data.split_file.name}"
    else:
        chosen = "drawn at random with the seed"
    return TrainingData(
        name=metadata.name,
        sha256=dict(metadata.sha256),
        split=f"{sizes['train']} to train, {sizes['val']} to select, of {len(run.dataset)} frames, {chosen}",
        split_seed=splits.seed,
        n_train=sizes["train"],
        n_val=sizes["val"],
        n_test=sizes["test"],
        level_of_theory=metadata.level_of_theory,
        licence=metadata.licence,
        statistics={} if run.statistics is None else run.statistics.quantities(),
    )


def _reference_geometry(survey: Survey) -> ReferenceGeometry:
    frame = survey.lowest
    cell = None
    if frame.cell is not None and any(frame.pbc):
        a, b, c = ((x, y, z) for x, y, z in frame.cell.tolist())
        cell = (a, b, c)
    return ReferenceGeometry(
        numbers=frame.numbers.tolist(),
        positions=[tuple(row) for row in frame.positions.tolist()],
        cell=cell,
        pbc=frame.pbc,
        name="training frame of lowest energy" if frame.energy is not None else "first training frame",
    )


def public_recipe(run: Run) -> dict[str, Any]:
    """Return the resolved recipe for the card: files by name alone, and no folder of this machine."""
    raw = run.recipe.model_dump(mode="json")
    options = raw["objective"]["options"]
    options.update({key: _bare(value) for key, value in options.items()})
    data = raw["data"]
    data["options"] = {key: _bare(value) for key, value in data["options"].items() if key != "root"}
    for key in ("source", "molecule", "split_file"):
        data[key] = _bare(data[key])
    if run.parent is not None:
        raw["model"]["pretrained"] = run.parent.name
    return raw


def _bare(value: Any) -> Any:
    """Return a path's last part; anything else as it is."""
    return Path(value).name if isinstance(value, str) and (os.sep in value or "/" in value) else value


def _default_options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of an objective's options, so that the card does not depend on later ones."""
    parameters = inspect.signature(objective_class(name, given).__init__).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not p.empty}


def describe_hardware(run: Run) -> str:
    """Return the kind of processor and the number of threads; no name of a host."""
    config = run.recipe.trainer
    if next(run.module.parameters()).is_cuda or (config.accelerator != "cpu" and torch.cuda.is_available()):
        return f"{config.devices} x {torch.cuda.get_device_name(0)}"
    threads = config.threads or torch.get_num_threads()
    each = f"{threads} thread{'s' * (threads > 1)}"
    return f"{_cpu_model()}, {each}" + (f", {config.devices} processes" if config.devices > 1 else "")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()
