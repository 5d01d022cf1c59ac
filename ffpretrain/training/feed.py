"""Batches for the processes of a run."""

from __future__ import annotations

import lightning as L
from torch.utils.data import DataLoader, Subset

from ffpretrain.graphs import Sample
from ffpretrain.training.config import TrainerConfig
from ffpretrain.training.data import SampleDataset, StreamSampler, collate


class FrameData(L.LightningDataModule):
    """Training and validation frames as loaders; every process gets its share of them.

    Args:
        train: samples to train on.
        val: samples to validate on.
        config: batch sizes and the seed.
    """

    def __init__(self, train: SampleDataset, val: SampleDataset, config: TrainerConfig) -> None:
        super().__init__()
        self._train, self._val, self._config = train, val, config

    def train_dataloader(self) -> DataLoader[Sample]:
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
        return DataLoader(self._train, batch_sampler=sampler, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return this process's part of the validation frames; all where they are too few."""
        trainer = self._running()
        world = trainer.world_size if trainer.world_size <= len(self._val) else 1
        part = Subset(self._val, range(trainer.global_rank % world, len(self._val), world))
        return DataLoader(part, batch_size=self._config.val_batch_size, collate_fn=collate)

    def _running(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("loaders are asked for outside of a run")
        return self.trainer
