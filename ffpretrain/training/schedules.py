"""Learning-rate schedules: linear warm-up, then cosine, plateau or constant."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType

from ffpretrain.training.config import ScheduleConfig

#: a value must be smaller than the best by this fraction to count as better
IMPROVEMENT = 1e-4


def warmup_factor(step: int, warmup: int) -> float:
    """Return the factor on the base rate at a step of the linear rise; 1 after it.

    Args:
        step: optimiser steps taken.
        warmup: steps of the rise; the first step has ``1 / warmup``, the last of them 1.
    """
    return min(1.0, (step + 1) / max(1, warmup))


def learning_rate_factor(step: int, warmup: int, max_steps: int, final: float) -> float:
    """Return the factor on the base rate: a linear rise over ``warmup`` steps, then a cosine to ``final``.

    Args:
        step: optimiser steps taken.
        warmup: steps of the rise.
        max_steps: step at which ``final`` is reached; later steps stay there.
        final: last factor.
    """
    if step < warmup:
        return warmup_factor(step, warmup)
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class RateFactor:
    """The factor on the base rate as a function of the step.

    Its attributes are plain numbers: the scheduler saves them in checkpoints and puts them back.

    Args:
        config: which schedule.
        max_steps: length of the run.
        base_rate: largest learning rate, which the smallest one of a plateau schedule is compared with.
    """

    def __init__(self, config: ScheduleConfig, max_steps: int, base_rate: float) -> None:
        self.kind: str = config.name
        self.warmup, self.max_steps, self.final = config.warmup_steps, max_steps, config.final_fraction
        self.drop, self.patience = config.factor, config.patience
        self.floor = min(1.0, config.min_lr / base_rate)
        self.reduced = 1.0
        self.best = math.inf
        self.waited = 0

    def __call__(self, step: int) -> float:
        """Return the factor for the step after ``step`` steps."""
        if self.kind == "cosine":
            return learning_rate_factor(step, self.warmup, self.max_steps, self.final)
        return warmup_factor(step, self.warmup) * self.reduced

    def observe(self, value: float) -> None:
        """Take the watched quantity of a validation; a plateau schedule drops after too many without gain.

        The drop takes effect one step later: the rate of the next step is already set.

        Args:
            value: smaller is better.
        """
        if self.kind != "plateau":
            return
        if value < self.best * (1 - IMPROVEMENT):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.reduced = max(self.reduced * self.drop, self.floor)
            self.waited = 0


def make_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, max_steps: int
) -> tuple[LRSchedulerConfigType, RateFactor]:
    """Return Lightning's ``lr_scheduler`` entry, and the factor in it, which validations report to.

    Args:
        config: which schedule.
        optimizer: whose rate is scheduled.
        max_steps: length of the run.
    """
    factor = RateFactor(config, max_steps, optimizer.param_groups[0]["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"scheduler": scheduler, "interval": "step", "frequency": 1}, factor
