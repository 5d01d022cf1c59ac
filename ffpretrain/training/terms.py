"""The terms of an objective on frames it was not trained on, with noise of their own."""

from __future__ import annotations

import torch

from ffpretrain.errors import DataError
from ffpretrain.graphs import Sample
from ffpretrain.objectives.base import Objective
from ffpretrain.training.data import SampleDataset, collate


def noise_generator(seed: int, step: int, validation: bool = False) -> torch.Generator:
    """Return the source of all noise of a training step, or of a validation; the same on every process.

    Args:
        seed: of the run.
        step: optimiser steps taken; validations all take 0, so that their noise is the same each time.
        validation: a stream apart from that of training.
    """
    return torch.Generator().manual_seed(((seed * 2 + validation) * 1_000_003 + step) % 2**63)


def batch_terms(objective: Objective, batch: Sample, generator: torch.Generator) -> dict[str, float]:
    """Return the terms of one batch; gradients are on inside, since some predictions are gradients."""
    with torch.enable_grad():
        terms = objective(batch, generator)
    return {key: float(value.detach()) for key, value in terms.items()}


def mean_terms(
    objective: Objective, samples: SampleDataset, seed: int, batch_size: int = 50
) -> dict[str, float]:
    """Return the mean terms of an objective over structures, each batch weighted by its structures; a term
    that some batches lack is the mean over the others.

    With the seed of a run this is what its validations measure; another seed draws fresh noise.

    Args:
        objective: taken in eval mode, and put back; its network's device holds the samples too.
        samples: one structure each.
        seed: of the noise, which follows from it and from each sample's ``index``.
        batch_size: structures evaluated together.

    Raises:
        DataError: no samples.
    """
    if len(samples) == 0:
        raise DataError("there are no frames to measure the objective on; give at least one")
    was_training = objective.training
    objective.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for start in range(0, len(samples), batch_size):
        chunk = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        batch = collate(chunk).to(objective.network.known.device)
        for key, value in batch_terms(objective, batch, noise_generator(seed, 0, validation=True)).items():
            sums[key] = sums.get(key, 0.0) + value * len(chunk)
            counts[key] = counts.get(key, 0) + len(chunk)
    objective.train(was_training)
    return {key: value / counts[key] for key, value in sums.items()}
