"""Batches for the processes of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ffpretrain.graphs import Sample
from ffpretrain.training.config import TrainerConfig
from ffpretrain.training.data import SampleDataset, StreamSampler, collate
from ffpretrain.training.recorded import StepBlocks


class FrameData(L.LightningDataModule):
    """Training and validation frames as loaders; every process gets its share of them.

    Args:
        train: samples to train on.
        val: samples to validate on.
        config: batch sizes and the seed.
        block: give positions of training frames, this many steps together, for recorded steps; None gives
            the frames themselves.
    """

    def __init__(
        self, train: SampleDataset, val: SampleDataset, config: TrainerConfig, block: int | None = None
    ) -> None:
        super().__init__()
        self._block = block
        self._train, self._val, self._config = train, val, config

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the endless stream of batches, from the step the run stands at."""
        trainer = self._running()
        sampler = StreamSampler(
            len(self._train),
            self._config.batch_size,
            self._config.seed,
            lambda: trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
        )
        if self._block is not None:
            blocks = StepBlocks(sampler, self._block, self._config.max_steps)
            return DataLoader(blocks, batch_size=None)
        return DataLoader(self._train, batch_sampler=sampler, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return this process's part of the validation frames; all where they are too few."""
        trainer = self._running()
        world = trainer.world_size if trainer.world_size <= len(self._val) else 1
        part = Subset(self._val, range(trainer.global_rank % world, len(self._val), world))
        return DataLoader(part, batch_size=self._config.val_batch_size, collate_fn=collate)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave positions of frames on the CPU, where noise is drawn by them; move frames to the device."""
        return batch if isinstance(batch, Tensor) else batch.to(device)

    def _running(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders are asked for outside of a run")
        return self.trainer
