"""A small energy head on a frozen encoder: what pretraining papers draw energy landscapes of.

3D-EMGP (Jiao et al. 2023, section 4.4) fixes the pretrained network, puts a small network on top of its
features and fits that to energies, "in order to project the pretrained representations onto the energy
surface". What it leaves open, and what is chosen here: the head is the package's
:class:`~ffpretrain.heads.EnergyHead` on the features of each atom; reference energies are least squares on
the frames fitted to, and the head learns the rest in units of its spread; AdamW with a cosine schedule, a
seeded order and no selection, so that the error on the frames held out is an honest one. Forces are not
fitted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ffpretrain.artifacts import Quantity, load_potential, make_card
from ffpretrain.backbones import Features, create_backbone
from ffpretrain.datasets.frames import Dataset
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import batch_graphs
from ffpretrain.heads import EnergyHead
from ffpretrain.potential import Model, Potential
from ffpretrain.training.data import sample_from_frame
from ffpretrain.training.statistics import reference_energies

#: fewest frames that can be parted into some to fit and some to tell the error
_FEWEST = 10
_HELD_OUT = 0.2
#: of a fit, unless asked otherwise
STEPS = 600
_FRAMES_PER_STEP = 16
_WEIGHT_DECAY = 1e-4


class FittedHead(NamedTuple):
    """A potential with a fitted head.

    Attributes:
        potential: the encoder as it was, with the new head; in eval mode, with a card.
        errors: ``energy_mae`` on the frames held out, ``energy_mae_fitted`` on those fitted to, and
            ``energy_spread``, the mean absolute deviation that reference energies alone leave on the former.
        n_fitted: number of frames fitted to.
        n_held_out: number of frames held out.
    """

    potential: Potential
    errors: dict[str, Quantity]
    n_fitted: int
    n_held_out: int


class _Cached(NamedTuple):
    """Features of frames, computed once: scalars, vectors and numbers of atoms of each, and what to fit."""

    features: list[Features]
    target: Tensor
    scale: float


def fit_energy_head(
    model: Any,
    frames: Dataset,
    *,
    limit: int = 300,
    steps: int = STEPS,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> FittedHead:
    """Fit an energy head on the features of a model whose weights stay as they are.

    Args:
        model: a named model, a file of any kind, or a model; only its backbone is used.
        frames: with energies.
        limit: largest number of frames used, drawn with the seed; a fifth of them is held out.
        steps: of the optimiser, each on 16 frames.
        lr: its learning rate at the start; it falls to zero as a cosine.
        seed: of the frames, of the head's first weights and of the order.
        progress: called with the number of steps done.

    Returns:
        The potential and its errors.

    Raises:
        ArtifactError: no such model.
        ConfigError: steps, rate or limit out of range.
        DataError: fewer than 10 frames, or frames without energies.
        UnsupportedInputError: an element the encoder never saw.
    """
    if steps < 1 or not 0 < lr < math.inf or limit < _FEWEST:
        raise ConfigError(f"steps={steps}, lr={lr}, limit={limit}: give at least 1, above 0 and {_FEWEST}")
    encoder = load_potential(model, trainable=True)
    stream = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(frames), generator=stream)[:limit].tolist()
    parts = _parts(frames, chosen)
    references, spread = reference_energies(parts[0])
    scale = spread if spread > 0 else 1.0
    fitted, held_out = (_cache(encoder, part, references, scale) for part in parts)
    head = _fit(encoder, fitted, steps, lr, seed, progress)
    errors = {
        "energy_mae": _mae(head, held_out),
        "energy_mae_fitted": _mae(head, fitted),
        "energy_spread": float(held_out.target.abs().mean()) * scale,
    }
    quantities = {name: Quantity(value=value, unit="eV") for name, value in errors.items()}
    potential = _potential(encoder, head, references, scale, frames)
    return FittedHead(potential, quantities, len(parts[0]), len(parts[1]))


def untrained(model: Any, seed: int = 0) -> Potential:
    """Return a network like a model's with fresh weights: the ``Base`` that pretraining is compared with.

    Args:
        model: a named model, a file of any kind, or a model.
        seed: of the weights.

    Raises:
        ArtifactError: no such model.
    """
    trained = load_potential(model, trainable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = create_backbone(trained.backbone.name, **trained.backbone.config)
        fresh = Potential(backbone, elements=trained.elements).eval()
    fresh.card = make_card(fresh, f"{backbone.name}, untrained", kind="pretrained")
    return fresh


def _parts(frames: Dataset, chosen: Sequence[int]) -> tuple[Dataset, Dataset]:
    name = frames.metadata.name
    if len(chosen) < _FEWEST:
        raise DataError(f"{name}: has {len(frames)} frames; fitting a head needs at least {_FEWEST}")
    for i in chosen:
        if frames[i].energy is None:
            raise DataError(f"{name}: frame {i} has no energy to fit; label it (ffpretrain label)")
    held_out = max(1, round(_HELD_OUT * len(chosen)))
    return frames[np.array(chosen[held_out:])], frames[np.array(chosen[:held_out])]


def _cache(encoder: Model, frames: Dataset, references: dict[int, float], scale: float) -> _Cached:
    """Return what the encoder says of each frame, and what the reference energies leave, over the scale."""
    features, target = [], []
    with torch.no_grad():
        for i, frame in enumerate(frames):
            graph = batch_graphs([sample_from_frame(frame, encoder.cutoff, i).graph])
            features.append(encoder.features(graph))
            base = sum(references.get(int(z), 0.0) for z in frame.numbers)
            target.append((float(frame.energy or 0.0) - base) / scale)
    return _Cached(features, torch.tensor(target, dtype=encoder.dtype), scale)


def _fit(
    encoder: Model,
    data: _Cached,
    steps: int,
    lr: float,
    seed: int,
    progress: Callable[[int], object] | None,
) -> EnergyHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = EnergyHead(encoder.backbone.n_features, encoder.backbone.has_vectors).to(encoder.dtype)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < min(_FRAMES_PER_STEP, len(data.features)):
            order = torch.randperm(len(data.features), generator=stream).tolist()
        some, order = order[:_FRAMES_PER_STEP], order[_FRAMES_PER_STEP:]
        loss = (_energies(head, [data.features[i] for i in some]) - data.target[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1)
    return head.eval()


def _energies(head: EnergyHead, features: Sequence[Features]) -> Tensor:
    """Return the sum of the head's atomic energies of each frame ``[B]``."""
    counts = [len(one.scalars) for one in features]
    vectors = [one.vectors for one in features if one.vectors is not None]
    joined = Features(torch.cat([one.scalars for one in features]), torch.cat(vectors) if vectors else None)
    batch = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    each = head(joined)
    return each.new_zeros(len(counts)).index_add(0, batch, each)


def _mae(head: EnergyHead, data: _Cached) -> float:
    with torch.no_grad():
        found = torch.cat([_energies(head, [one]) for one in data.features])
    return float((found - data.target).double().abs().mean()) * data.scale


def _potential(
    encoder: Model, head: EnergyHead, references: dict[int, float], scale: float, frames: Dataset
) -> Potential:
    backbone = copy.deepcopy(encoder.backbone)
    potential = Potential(backbone, head, scale=scale, reference_energies=references).eval()
    potential.requires_grad_(False)
    name = encoder.card.name if encoder.card is not None else backbone.name
    potential.card = make_card(
        potential,
        name,
        description=f"encoder of {name} with an energy head fitted on {frames.metadata.name}",
        level_of_theory=frames.metadata.level_of_theory,
        energy_zero=frames.metadata.energy_zero,
    )
    return potential
