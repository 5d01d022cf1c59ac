"""Logs of a run: ``logs/metrics.csv``, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ffpretrain.training.module import ForceFieldModule

#: most steps between two rows; the terms in a row are means over the steps since the last one
INTERVAL = 50


class MetricLog(Callback):
    """Writes the loss terms every few steps and the errors of each validation.

    Rows stand at fixed steps and hold no times, so that a resumed run writes what an uninterrupted one does;
    rows after the checkpoint that a run is resumed from are dropped.

    Args:
        folder: for ``metrics.csv`` and the TensorBoard files.
        val_every_steps: steps between validations; no mean reaches across one.
    """

    def __init__(self, folder: Path, val_every_steps: int) -> None:
        self._folder = folder
        self._period = val_every_steps
        self._interval = min(INTERVAL, val_every_steps)
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._rate = 0.0
        self._table: Table | None = None
        self._board: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the files; drop what lies after the step the run stands at."""
        self._sums, self._counts = {}, {}
        if not trainer.is_global_zero:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._table = Table(self._folder / "metrics.csv", trainer.global_step)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder), purge_step=trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the terms of a step; write their means where a row is due."""
        if not isinstance(pl_module, ForceFieldModule):
            return
        for name, value in pl_module.terms.items():
            steps = pl_module.term_counts[name]
            self._sums[name] = self._sums.get(name, 0.0) + value * steps
            self._counts[name] = self._counts.get(name, 0) + steps
        self._rate = pl_module.rate
        step = trainer.global_step
        if step % self._period % self._interval == 0 or step >= trainer.max_steps:
            self._write_means(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the errors."""
        if isinstance(pl_module, ForceFieldModule) and self._table is not None:
            self._write(trainer.global_step, pl_module.errors)

    def _write_means(self, trainer: Trainer) -> None:
        names = list(self._sums)
        means = torch.stack([self._sums[name].double() / self._counts[name] for name in names])
        if trainer.world_size > 1:
            means = trainer.strategy.reduce(means, reduce_op="mean")
        self._sums, self._counts = {}, {}
        if self._table is not None:
            values = {f"train/{name}": value for name, value in zip(names, means.tolist(), strict=True)}
            self._write(trainer.global_step, {"lr": self._rate, **values})

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._table is not None:
            self._table.add(step, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the files."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the files."""
        self._close()

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()
        self._table = self._board = None


class Table:
    """A CSV file with a column ``step`` that rows are added to, and columns as they appear.

    Args:
        path: of the file.
        last_step: rows of an existing file after this step are dropped.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self._columns = ["step"]
        self._rows: list[dict[str, str]] = []
        if last_step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or self._columns)
                self._rows = [row for row in reader if (row["step"] or "").isdecimal()]
            self._rows = [row for row in self._rows if int(row["step"]) <= last_step]
        self._rewrite()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add a row; a new column makes the file be written anew, in one step."""
        row = {"step": str(step), **{name: repr(value) for name, value in values.items()}}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite()
            return
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        temporary = self._path.with_name(self._path.name + ".part")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(temporary, self._path)
