"""What a run shows while it goes on: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ffpretrain.objectives.floors import describe, is_reference
from ffpretrain.training.module import ForceFieldModule
from ffpretrain.units import KCAL_PER_MOL

#: seconds between updates of the bar, and between lines where there is no terminal
REFRESH = 0.5
LINE_EVERY = 15.0


class Progress(Callback):
    """Shows step, loss terms, speed, time to go and the validation error, now and at its best.

    Args:
        line_every: seconds between lines where standard error is no terminal.
    """

    def __init__(self, line_every: float = LINE_EVERY) -> None:
        self._line_every = line_every
        self._bar: Any = None
        self._task: Any = None
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._first = 0
        self._begun = self._shown = 0.0
        self._validation = ""
        self._best: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar."""
        self._first, self._begun = trainer.global_step, 0.0
        self._shown = time.monotonic()
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(20), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=self._first)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the state where enough time has passed."""
        if not trainer.is_global_zero or not isinstance(pl_module, ForceFieldModule):
            return
        if not self._begun:  # the first step may compile for minutes: the speed is that of the others
            self._first, self._begun = trainer.global_step, time.monotonic()
        for name, value in pl_module.terms.items():
            steps = pl_module.term_counts[name]
            self._sums[name] = self._sums.get(name, 0.0) + value * steps
            self._counts[name] = self._counts.get(name, 0) + steps
        wait = REFRESH if self._bar is not None else self._line_every
        if time.monotonic() - self._shown >= wait or trainer.global_step == trainer.max_steps:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        self._shown = time.monotonic()
        step = trainer.global_step
        rate = (step - self._first) / max(self._shown - self._begun, 1e-9)
        left = timedelta(seconds=round((trainer.max_steps - step) / rate)) if rate > 0 else "?"
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        loss = f"loss {means.pop('loss'):.4g}" if "loss" in means else ""
        terms = " ".join(f"{name} {value:.3g}" for name, value in means.items() if not is_reference(name))
        beside = f" ({terms})" if terms else ""
        text = f"step {step}/{trainer.max_steps}  {loss}{beside}  {rate:.2f} steps/s  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"{text}  {self._validation}")
        else:
            print(text, file=sys.stderr, flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation error."""
        if not trainer.is_global_zero or not isinstance(pl_module, ForceFieldModule):
            return
        value = pl_module.errors[pl_module.monitor]
        self._best = value if self._best is None else min(value, self._best)
        if pl_module.monitor == "val/forces_mae":
            self._validation = f"val force MAE {_force(value)}, best {_force(self._best)}"
        elif pl_module.objective.needs_labels:
            name = pl_module.objective.monitor
            unit = pl_module.objective.unit_of(name)
            self._validation = f"val {name.replace('_mae', ' MAE')} {value:.4g} {unit}, best {self._best:.4g}"
        else:
            terms = {key.removeprefix("val/"): error for key, error in pl_module.errors.items()}
            self._validation = f"val {describe(terms)}, best {self._best:.4g}"
        if self._bar is None:
            print(
                f"step {trainer.global_step}/{trainer.max_steps}  {self._validation}",
                file=sys.stderr,
                flush=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best error so far."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best error so far."""
        self._best = state_dict["best"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the bar."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the bar."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


def _force(value: float) -> str:
    """Return a force in eV/Å in the two units people compare."""
    return f"{value / KCAL_PER_MOL:.3f} kcal/mol/Å ({1000 * value:.1f} meV/Å)"
