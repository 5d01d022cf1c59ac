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
from torch.optim.swa_utils import AveragedModel

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


class AveragedWeights(WeightAveraging):
    """Averages weights: ``mean = decay * mean + (1 - decay) * weight``.

    The mean starts as the weights after the first step. Validation, ``best.ckpt`` and the finished model take
    the mean; training goes on with the weights.

    Args:
        decay: per step, between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=partial(_move_towards, rate=1 - decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the mean where the weights are going to be: Lightning moves them only after this."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of the base class."""
        return super().state_key.replace(type(self).__qualname__, WeightAveraging.__qualname__, 1)

    def tensors(self) -> list[Tensor]:
        """Return the mean, in the order of the module's parameters, for recorded steps to move."""
        return [parameter.detach() for parameter in self._model.module.parameters()]

    @property
    def fresh(self) -> bool:
        """Whether no step has been taken yet."""
        return int(self._model.n_averaged) == 0

    def took(self, steps: int, global_step: int) -> None:
        """Note steps in which the mean was moved by a recording.

        Args:
            steps: how many.
            global_step: steps of the run after them.
        """
        self._model.n_averaged += steps
        self._latest_update_step = global_step

    @property
    def _model(self) -> AveragedModel:
        if self._average_model is None:
            raise RuntimeError("the average exists while a run trains")
        return self._average_model


def _move_towards(mean: list[Tensor], current: list[Tensor], n_averaged: Tensor, rate: float) -> None:
    torch._foreach_lerp_(mean, current, rate)


def recount_steps(checkpoint: dict[str, Any], block: int) -> None:
    """Let a checkpoint's loop counters say what they would, had its steps been taken in blocks, or singly.

    Lightning counts batches and steps apart, and steps that it takes itself apart from others. So a run goes
    on from a checkpoint of the other kind.

    Args:
        checkpoint: of a run of this package, changed in place.
        block: steps in a batch; 1 for steps that Lightning takes.
    """
    step = int(checkpoint["global_step"])
    loops = checkpoint["loops"]["fit_loop"]
    batches = -(-step // block)
    for counts in (loops["epoch_loop.batch_progress"][key] for key in ("total", "current")):
        counts.update(dict.fromkeys(counts, batches))
    own = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    others = loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]
    own.update(dict.fromkeys(own, step))
    others.update(dict.fromkeys(others, step))


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
