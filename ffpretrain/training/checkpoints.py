"""Checkpoints: written in one step, read without unpickling, the best and the last of a run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import Tensor

from ffpretrain.errors import DataError

BEST, LAST = "best.ckpt", "last.ckpt"
#: key in a checkpoint under which the package keeps its own numbers
RECORD = "ffpretrain"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: a reader sees the old file or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what :func:`torch.save` takes.
            path: of the file.
            storage_options: must be None; there is only the file system.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt`` by a monitored error and ``last.ckpt``; both are written after validations only.

    Lightning's own ``save_last`` follows the best: without an improvement the last state would be lost.

    Args:
        folder: of the two files.
        monitor: quantity whose smallest value is the best.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(
            folder,
            filename=Path(BEST).stem,
            monitor=monitor,
            save_last=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of the base class."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best where this is it, and the last always."""
        if trainer.sanity_checking:
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Save nothing between validations."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: an epoch means nothing in an endless stream of batches."""


def weight_average(decay: float) -> WeightAveraging:
    """Return the callback that averages weights: ``mean = decay * mean + (1 - decay) * weight``.

    The mean starts as the weights after the first step. Validation, ``best.ckpt`` and the finished model take
    the mean; training goes on with the weights.

    Args:
        decay: per step, between 0 and 1.
    """
    return WeightAveraging(use_buffers=False, multi_avg_fn=partial(_move_towards, rate=1 - decay))


def _move_towards(mean: list[Tensor], current: list[Tensor], n_averaged: Tensor, rate: float) -> None:
    torch._foreach_lerp_(mean, current, rate)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU; nothing is unpickled.

    Raises:
        DataError: the file is missing or damaged.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such checkpoint; one is written at each validation: train to the first one"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage by half a dozen types, some of them its own
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}); it is damaged or no checkpoint: "
            "take another run folder or train again with --overwrite"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "global_step"} <= content.keys():
        raise DataError(f"{path}: is no checkpoint of a training run; take another run folder")
    return content


def is_complete(checkpoint: dict[str, Any], max_steps: int) -> bool:
    """Whether a run's last checkpoint is its end: all steps taken, or stopped early.

    Args:
        checkpoint: the last one.
        max_steps: of the recipe.
    """
    if int(checkpoint["global_step"]) >= max_steps:
        return True
    return any(
        state["wait_count"] >= state["patience"]
        for key, state in checkpoint["callbacks"].items()
        if key.startswith(EarlyStopping.__qualname__)
    )
