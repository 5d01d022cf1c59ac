"""One training run from recipe to artefact."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.multiprocessing.spawn import ProcessRaisedException

from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.frames import Dataset
from ffpretrain.datasets.splits import Splits, load_splits, random_split, save_splits
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.objectives import Objective, create_objective, objective_class
from ffpretrain.objectives.property import SupervisedProperty
from ffpretrain.potential import Potential
from ffpretrain.training.checkpoints import (
    LAST,
    AtomicCheckpointIO,
    AveragedWeights,
    BestAndLast,
    is_complete,
    read_checkpoint,
)
from ffpretrain.training.config import Recipe, TrainerConfig
from ffpretrain.training.data import SampleDataset
from ffpretrain.training.feed import FrameData
from ffpretrain.training.finish import finish
from ffpretrain.training.folder import SPLITS_FILE, check_folder, check_splits, start_folder
from ffpretrain.training.logs import INTERVAL, MetricLog
from ffpretrain.training.module import ForceFieldModule, Recording
from ffpretrain.training.native import use_plain_messages
from ffpretrain.training.pretrained import (
    Pretrained,
    doubts,
    load_pretrained,
    make_backbone,
    open_pretrained,
)
from ffpretrain.training.process import SpawnedProcesses, borrowed_process, user_error_of
from ffpretrain.training.progress import Progress
from ffpretrain.training.properties import PropertyStatistics, property_statistics
from ffpretrain.training.statistics import LabelStatistics, elements_of, label_statistics


@dataclass
class Run:
    """What a training run is made of, ready to fit.

    Attributes:
        recipe: of the run.
        dataset: all frames.
        splits: which of them train, validate and test.
        statistics: of the training labels; None for an objective without labels.
        module: the objective with its network, as Lightning trains it.
        parent: the model that it starts from, if any.
        notes: what a user should know of the start, one line each.
        block: record whole steps and take so many at a time; None takes them one by one.
    """

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    statistics: LabelStatistics | PropertyStatistics | None
    module: ForceFieldModule
    parent: Pretrained | None = None
    notes: list[str] = field(default_factory=list)
    block: int | None = None


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Run a recipe from the data to the model file ``out/model.safetensors``.

    Args:
        recipe: what to do.
        out: folder of the run.
        resume: go on from the last checkpoint in ``out``; on a run that is complete, only the model file is
            made again.
        overwrite: replace a run in ``out``.
        progress: show progress on standard error.
        say: receives lines about the start, such as weights that a pretrained model does not have.

    Returns:
        Path of the model file.

    Raises:
        UserError: anything in the recipe, the data or the folder that does not fit, or a loss or gradient
            that is not finite.
    """
    check_folder(out, recipe, resume, overwrite)
    run = prepare(recipe)
    if say is not None:
        for line in run.notes:
            say(line)
    if resume:
        check_splits(out, run.splits)
    else:
        start_folder(out, recipe)
    if not resume or not is_complete(read_checkpoint(out / "checkpoints" / LAST), recipe.trainer.max_steps):
        fit(run, out, resume, [Progress()] if progress else None)
    return finish(run, out)


def split_dataset(recipe: Recipe, dataset: Dataset) -> Splits:
    """Return the recipe's split: the saved one it names, or a random one from its seed.

    Raises:
        DataError: too few frames, or a split that overlaps or is out of range.
    """
    data = recipe.data
    if data.split_file is not None:
        return load_splits(data.split_file, dataset)
    n = min(len(dataset), data.max_frames or len(dataset))
    train, val, test = (_frames_of(size, n) for size in (data.train, data.val, data.test or 0))
    if min(train, val) < 1 or n < train + val + test:
        taken = f", of which {n} are taken" if n < len(dataset) else ""
        raise DataError(
            f"{dataset.metadata.name} has {len(dataset)} frames{taken}, too few for train {data.train} + val "
            f"{data.val} + test {data.test or 0}; change data.train, data.val or data.test, or label more"
        )
    sizes = [train, val, n - train - val if data.test is None else test]
    return random_split(len(dataset), sizes, data.split_seed, dataset)


def _frames_of(size: float, n_frames: int) -> int:
    """Return a number of frames that is given as such, or as a fraction below 1."""
    # the small number lets 0.1 of 1000 frames, which no float holds exactly, be 100
    return int(size * n_frames + 1e-6) if size < 1 else int(size)


def prepare(recipe: Recipe) -> Run:
    """Open the data and build the network, its weights drawn from the recipe's seed.

    Raises:
        UserError: anything in the recipe or the data that does not fit.
    """
    config = recipe.trainer
    parent = open_pretrained(recipe.model)
    dataset = open_dataset(
        recipe.data.source, *([recipe.data.molecule] if recipe.data.molecule else []), **recipe.data.options
    )
    splits = split_dataset(recipe, dataset)
    statistics = _statistics(recipe, dataset[splits.train])
    objective, notes = build_objective(recipe, statistics, elements_of(dataset[splits.train]), parent)
    objective.check_frames(dataset[splits.train])
    if parent is not None:
        notes += doubts(recipe.model, parent, dataset, splits)
    problem = objective.not_parallel()
    if config.devices > 1 and problem:
        raise ConfigError(f"trainer.devices={config.devices}: {problem}")
    if config.batch_size % config.devices:
        raise ConfigError(
            f"trainer.batch_size={config.batch_size} does not divide among trainer.devices={config.devices}"
        )
    module = ForceFieldModule(
        objective,
        recipe.optimizer,
        recipe.schedule,
        config.max_steps,
        config.seed,
        config.compile,
        config.threads,
    )
    graphs = config.compile is True and config.devices == 1 and _accelerator(config) == "cuda"
    block = step_block(config) if graphs and objective.recordable else None
    return Run(recipe, dataset, splits, statistics, module, parent, notes, block)


def step_block(config: TrainerConfig) -> int:
    """Return how many steps are taken together where they are recorded: what fits every row of the logs."""
    period = min(config.val_every_steps, config.max_steps)
    return math.gcd(period, min(INTERVAL, period))


def _statistics(recipe: Recipe, frames: Dataset) -> LabelStatistics | PropertyStatistics | None:
    """Return the statistics of the labels that the objective needs."""
    options = recipe.objective.options
    labels = objective_class(recipe.objective.name, options).labels(options)
    if not labels:
        return None
    if labels == ("energy", "forces"):
        return label_statistics(frames)
    return property_statistics(frames, labels[0], options.get("readout", "mean"))


def build_objective(
    recipe: Recipe,
    statistics: LabelStatistics | PropertyStatistics | None,
    elements: list[int],
    parent: Pretrained | None = None,
) -> tuple[Objective, list[str]]:
    """Build potential and objective; torch's global random state is left as it was.

    Args:
        recipe: names network and objective.
        statistics: of the training labels; None for an objective without labels.
        elements: atomic numbers in the training frames.
        parent: gives its weights.

    Returns:
        The objective, and lines about weights of the parent that did not match.

    Raises:
        ConfigError: an unknown name or option, or a parent that does not fit.
    """
    labels = statistics if isinstance(statistics, LabelStatistics) else None
    scale = labels.force_rms if labels else 1.0
    if parent is not None and recipe.model.pretrained_head and isinstance(parent.potential, Potential):
        scale = float(parent.potential.scale)  # the head answers in the unit it was trained in
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.trainer.seed)
        potential = Potential(
            make_backbone(recipe.model, parent),
            scale=scale,
            reference_energies=labels.reference_energies if labels else None,
            elements=elements,
        )
        notes = load_pretrained(potential, parent, recipe.model.pretrained_head) if parent else []
        objective = create_objective(recipe.objective.name, potential=potential, **recipe.objective.options)
    if isinstance(statistics, PropertyStatistics) and isinstance(objective, SupervisedProperty):
        s = statistics
        objective.network.standardise(s.unit, s.scale, s.shift, s.reference)
    return objective.to(getattr(torch, recipe.trainer.precision)), notes


def fit(run: Run, out: Path, resume: bool = False, callbacks: list[Callback] | None = None) -> L.Trainer:
    """Train, writing checkpoints and logs under ``out``.

    While it trains, the number of CPU threads the recipe asks for and, on a CPU, torch's deterministic
    algorithms hold for the whole process; both are put back at the end.

    Args:
        run: from :func:`prepare`.
        out: folder of the run.
        resume: continue from ``out/checkpoints/last.ckpt``; a CPU run continues bit for bit.
        callbacks: more callbacks, such as a progress bar.

    Raises:
        DataError: ``resume`` without a checkpoint, or a folder that cannot be written.
        NonFiniteError: a loss, gradient or validation error is NaN or infinite.
        KeyboardInterrupt: Ctrl-C; the last checkpoint stays.
    """
    last = out / "checkpoints" / LAST
    if resume and not last.is_file():
        raise DataError(f"{last}: no checkpoint to resume from; run without --resume")
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        save_splits(out / SPLITS_FILE, run.splits)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); give another folder"
        ) from error
    feed = _feed(run)
    with borrowed_process(run.recipe.trainer.threads):
        trainer = _trainer(run, out, callbacks or [])
        try:
            trainer.fit(run.module, datamodule=feed, ckpt_path=last if resume else None, weights_only=True)
        except ProcessRaisedException as error:
            raise user_error_of(error) from error
        except SystemExit:
            # Lightning answers Ctrl-C by leaving the process; that is for the caller to decide
            raise KeyboardInterrupt from None
        finally:
            # what is measured of the trained model must not depend on how it was trained
            use_plain_messages(run.module.objective)
    return trainer


def _trainer(run: Run, out: Path, callbacks: list[Callback]) -> L.Trainer:
    config = run.recipe.trainer
    return L.Trainer(
        accelerator=_accelerator(config),
        devices=config.devices,
        strategy="auto" if config.devices == 1 else SpawnedProcesses(),
        plugins=[AtomicCheckpointIO()],
        max_steps=config.max_steps,
        max_epochs=-1,
        val_check_interval=min(config.val_every_steps, config.max_steps) // (run.block or 1),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=None if run.block else config.gradient_clip,
        inference_mode=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        callbacks=[*_callbacks(run, out), *callbacks],
        # on a GPU these algorithms are slow ones, and no run there is promised bit for bit
        deterministic=_accelerator(config) == "cpu",
    )


def _accelerator(config: TrainerConfig) -> str:
    """Return cpu or cuda; energies need float64, which other accelerators lack.

    Raises:
        ConfigError: a GPU, or more GPUs, are asked for than there are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = config.accelerator if config.accelerator != "auto" else "cuda" if count else "cpu"
    if chosen == "cuda" and config.devices > count:
        raise ConfigError(
            f"trainer.devices={config.devices} with accelerator cuda: torch finds {count} GPUs; "
            "lower trainer.devices or set trainer.accelerator: cpu"
        )
    return chosen


def _feed(run: Run) -> FrameData:
    cutoff = run.module.objective.network.cutoff
    needs = run.module.objective.labels(run.recipe.objective.options)
    train, val = (
        SampleDataset(run.dataset[part], cutoff, needs, part) for part in (run.splits.train, run.splits.val)
    )
    config = run.recipe.trainer
    if run.block is not None:
        run.module.record_steps(Recording(train, run.block, config.gradient_clip, config.ema_decay))
    return FrameData(train, val, config, run.block)


def _callbacks(run: Run, out: Path) -> list[Callback]:
    config = run.recipe.trainer
    monitor = run.module.monitor
    callbacks: list[Callback] = []
    if config.ema_decay is not None:
        callbacks.append(AveragedWeights(config.ema_decay))
    callbacks.append(MetricLog(out / "logs", min(config.val_every_steps, config.max_steps)))
    callbacks.append(BestAndLast(out / "checkpoints", monitor))
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping(monitor, patience=config.early_stopping))
    return callbacks


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
