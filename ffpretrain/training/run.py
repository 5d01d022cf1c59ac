"""One training run from recipe to artefact."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ffpretrain.backbones import create_backbone
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.frames import Dataset
from ffpretrain.datasets.splits import Splits, load_splits, random_split, save_splits
from ffpretrain.errors import DataError
from ffpretrain.objectives import Objective, create_objective, objective_class
from ffpretrain.potential import Potential
from ffpretrain.training.config import Recipe
from ffpretrain.training.data import SampleDataset, StreamSampler, collate
from ffpretrain.training.module import ForceFieldModule
from ffpretrain.training.statistics import LabelStatistics, label_statistics


@dataclass
class Run:
    """What a training run is made of, ready to fit."""

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    statistics: LabelStatistics | None
    module: ForceFieldModule


def split_dataset(recipe: Recipe, dataset: Dataset) -> Splits:
    """Return the recipe's split: the saved one it names, or a random one from its seed.

    Raises:
        DataError: too few frames, or a split that overlaps or is out of range.
    """
    data = recipe.data
    if data.split_file is not None:
        return load_splits(data.split_file, dataset)
    rest = len(dataset) - data.train - data.val
    if rest < (data.test or 0):
        raise DataError(
            f"{dataset.metadata.name} has {len(dataset)} frames, fewer than train {data.train} + val {data.val}"
            f" + test {data.test or 0}; lower data.train, data.val or data.test"
        )
    return random_split(len(dataset), [data.train, data.val, rest if data.test is None else data.test],
                        data.split_seed, dataset)


def prepare(recipe: Recipe) -> Run:
    """Open the data and build the network, its weights drawn from the recipe's seed.

    Raises:
        UserError: anything in the recipe or the data that does not fit.
    """
    dataset = open_dataset(
        recipe.data.source, *([recipe.data.molecule] if recipe.data.molecule else []), **recipe.data.options
    )
    splits = split_dataset(recipe, dataset)
    labelled = objective_class(recipe.objective.name).needs_labels
    statistics = label_statistics(dataset[splits.train]) if labelled else None
    objective = build_objective(recipe, statistics)
    module = ForceFieldModule(
        objective, recipe.optimizer, recipe.schedule, recipe.trainer.max_steps, recipe.trainer.seed
    )
    return Run(recipe, dataset, splits, statistics, module)


def build_objective(recipe: Recipe, statistics: LabelStatistics | None) -> Objective:
    """Build potential and objective; torch's global random state is left as it was."""
    backbone_config = recipe.model.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.trainer.seed)
        potential = Potential(
            create_backbone(backbone_config.name, **backbone_config.options),
            scale=statistics.force_rms if statistics else 1.0,
            reference_energies=statistics.reference_energies if statistics else None,
        )
        objective = create_objective(recipe.objective.name, potential=potential, **recipe.objective.options)
    return objective.to(getattr(torch, recipe.trainer.precision))


def fit(run: Run, out: Path, resume: bool = False, callbacks: list[Callback] | None = None) -> L.Trainer:
    """Train, writing checkpoints and logs under ``out``.

    Args:
        run: from :func:`prepare`.
        out: folder of the run.
        resume: continue from ``out/checkpoints/last.ckpt``; a CPU run continues bit for bit.
        callbacks: more callbacks, such as a progress bar.

    Raises:
        DataError: ``resume`` without a checkpoint.
        NonFiniteError: a loss or gradient is NaN or infinite.
    """
    config = run.recipe.trainer
    last = out / "checkpoints" / "last.ckpt"
    if resume and not last.is_file():
        raise DataError(f"{last}: no checkpoint to resume from; run without --resume")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_splits(out / "splits.json", run.splits)
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        max_steps=config.max_steps,
        max_epochs=-1,
        val_check_interval=min(config.val_every_steps, config.max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=config.gradient_clip,
        inference_mode=False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=min(50, config.val_every_steps),
        logger=_loggers(out),
        callbacks=[*_callbacks(run, out), *(callbacks or [])],
        deterministic=True,
    )
    loaders = _loaders(run)
    if config.compile:
        run.module.objective.accelerate()
    trainer.fit(run.module, *loaders, ckpt_path=last if resume else None, weights_only=True)
    return trainer


def _loaders(run: Run) -> tuple[DataLoader[Any], DataLoader[Any]]:
    config, cutoff = run.recipe.trainer, run.module.objective.network.cutoff
    needs = ("energy", "forces") if run.module.objective.needs_labels else ()
    train = SampleDataset(run.dataset[run.splits.train], cutoff, needs)
    val = SampleDataset(run.dataset[run.splits.val], cutoff, needs)
    sampler = StreamSampler(len(train), config.batch_size, config.seed, lambda: run.module.global_step)
    return (
        DataLoader(train, batch_sampler=sampler, collate_fn=collate),
        DataLoader(val, batch_size=config.val_batch_size, collate_fn=collate),
    )


def _loggers(out: Path) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(out, name="", version="logs")]
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(out, name="", version="logs"))
    except ModuleNotFoundError:
        pass
    return loggers


def _callbacks(run: Run, out: Path) -> list[Callback]:
    config = run.recipe.trainer
    monitor = "val/forces_mae" if run.module.objective.needs_labels else "val/loss"
    callbacks: list[Callback] = [
        ModelCheckpoint(
            out / "checkpoints", filename="best", monitor=monitor, save_last=True, enable_version_counter=False,
            auto_insert_metric_name=False,
        )
    ]
    if config.ema_decay is not None:
        average = get_ema_multi_avg_fn(config.ema_decay)
        callbacks.insert(0, WeightAveraging(use_buffers=False, multi_avg_fn=average))
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping(monitor, patience=config.early_stopping))
    return callbacks


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
