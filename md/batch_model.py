"""A model as an engine for many structures sees it: loaded, watched, evaluated as one batch."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ffpretrain.md.batches import BatchEvaluation
from ffpretrain.md.calculator import Model, load_model
from ffpretrain.md.runtime import Runtime
from ffpretrain.md.unfamiliar import Familiarity, Policy


class BatchModel:
    """One potential for batches of structures; says when one lies outside what the model was trained on.

    Args:
        model: a name of :func:`ffpretrain.list_models`, a model file or a
            :class:`~ffpretrain.potential.Potential`.
        device: ``auto`` (CUDA where there is one) or a name torch knows.
        dtype: ``float32`` or ``float64``, of the network; energies and sums are float64 in both.
        on_unfamiliar: as for :class:`~ffpretrain.FFCalculator`.

    Attributes:
        runtime: evaluates the model.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, or a device that is absent.
    """

    def __init__(
        self,
        model: Model,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        on_unfamiliar: Policy = "warn",
    ) -> None:
        potential = load_model(model)
        self.runtime = Runtime(potential, str(device), dtype)
        self._familiarity = Familiarity(getattr(potential, "card", None), on_unfamiliar)
        self._seen: Tensor | None = None

    def evaluate(
        self, numbers: Tensor, positions: Tensor, batch: Tensor, cell: Tensor, periodic: Tensor
    ) -> BatchEvaluation:
        """Evaluate a batch; as :meth:`Runtime.evaluate_tensors <ffpretrain.md.Runtime.evaluate_tensors>`.

        Raises:
            UnsupportedInputError: what the runtime refuses, or unfamiliar input under ``raise``.
            ConfigError: the model has no energy.
            NonFiniteError: an energy or force is not finite.
        """
        found = self.runtime.evaluate_tensors(numbers, positions, batch, cell, periodic)
        seen = torch.stack([numbers.to(batch), batch])
        if self._seen is None or not torch.equal(self._seen, seen):
            for place in _first_of_each_composition(numbers, batch):
                self._familiarity.check_structure(_atoms(place, numbers, positions, batch, cell, periodic))
            self._seen = seen
        least = self._familiarity.min_distance
        if least is not None and bool((found.shortest < least).any()):
            place = int(found.shortest.argmin())
            atoms = _atoms(place, numbers, positions, batch, cell, periodic)
            self._familiarity.check_distance(float(found.shortest[place]), atoms)
        return found


def _first_of_each_composition(numbers: Tensor, batch: Tensor) -> list[int]:
    starts = np.unique(batch.cpu().numpy(), return_index=True)[1]
    first: dict[bytes, int] = {}
    for place, inside in enumerate(np.split(numbers.cpu().numpy(), starts[1:])):
        first.setdefault(np.sort(inside).tobytes(), place)
    return list(first.values())


def _atoms(
    place: int, numbers: Tensor, positions: Tensor, batch: Tensor, cell: Tensor, periodic: Tensor
) -> Atoms:
    inside = (batch == place).cpu().numpy()
    repeats = bool(periodic[place])
    return Atoms(
        numbers.cpu().numpy()[inside],
        positions.detach().cpu().double().numpy()[inside],
        cell=cell[place].detach().cpu().double().numpy() if repeats else None,
        pbc=repeats,
    )
