"""Learning-rate schedules: linear warm-up, then cosine, plateau or constant."""

from __future__ import annotations

import math
from typing import Any

import torch

from ffpretrain.training.config import ScheduleConfig


def learning_rate_factor(step: int, warmup: int, max_steps: int, final: float) -> float:
    """Return the factor on the base rate: a linear rise over ``warmup`` steps, then half a cosine to ``final``.

    Args:
        step: optimiser steps taken.
        warmup: steps of the rise.
        max_steps: step at which ``final`` is reached; later steps stay there.
        final: last factor.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def make_schedule(config: ScheduleConfig, optimizer: torch.optim.Optimizer, max_steps: int) -> dict[str, Any]:
    """Return Lightning's ``lr_scheduler`` entry.

    Args:
        config: which schedule.
        optimizer: whose rate is scheduled.
        max_steps: length of the run.
    """
    warmup = config.warmup_steps
    if config.name == "plateau":
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.factor, patience=config.patience, min_lr=config.min_lr
        )
        return {"scheduler": scheduler, "monitor": config.monitor, "strict": True}

    def factor(step: int) -> float:
        if config.name == "constant":
            return min(1.0, (step + 1) / max(1, warmup))
        return learning_rate_factor(step, warmup, max_steps, config.final_fraction)

    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
