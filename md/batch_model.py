"""A model as an engine for many structures sees it: loaded, watched, evaluated as one batch."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ffpretrain.md.batches import BatchEvaluation, Unchanged
from ffpretrain.md.calculator import Model, load_model
from ffpretrain.md.native.ready import NATIVE_MIN_STEPS
from ffpretrain.md.runtime import CompileOption, Runtime
from ffpretrain.md.unfamiliar import Familiarity, Policy, require_molecule


class BatchModel:
    """One potential for batches of structures; says when one lies outside what the model was trained on.

    Args:
        runtime: evaluates the potential.
        familiarity: what the model was trained on.
        own_molecules_only: refuse another composition whatever the policy: an engine is given its structures
            once and for all, so that one for another molecule is a mistake.

    Attributes:
        last: the last evaluation, for who wants more of it than an engine hands on.
    """

    last: BatchEvaluation

    def __init__(self, runtime: Runtime, familiarity: Familiarity, own_molecules_only: bool) -> None:
        self.runtime, self.familiarity = runtime, familiarity
        self.own_molecules_only = own_molecules_only
        self._seen: tuple[Tensor, Tensor] | None = None
        self._unchanged = Unchanged()
        self._known: object = None

    @classmethod
    def load(
        cls,
        model: Model | BatchModel,
        device: str | torch.device,
        dtype: str,
        compile: CompileOption,
        on_unfamiliar: Policy,
    ) -> BatchModel:
        """Return a model ready for batches; one that is so already comes back as it is.

        Args:
            model: a name of :func:`ffpretrain.list_models`, a model file or a
                :class:`~ffpretrain.potential.Potential`.
            device: ``auto`` (CUDA where there is one) or a device torch knows.
            dtype: ``float32`` or ``float64``, of the network; energies and sums are float64 in both.
            compile: False evaluates with torch alone; else natively where the machine and model allow it.
            on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.

        Raises:
            ArtifactError: no such model, or a damaged one.
            ConfigError: an unknown option, or a device that is absent.
        """
        if isinstance(model, BatchModel):
            return model
        potential = load_model(model)
        runtime = Runtime(potential, str(device), dtype, compile)
        # an engine is made for a run: worth the seconds that the native code takes to build, once per machine
        runtime.expected_steps = NATIVE_MIN_STEPS
        return cls(runtime, Familiarity(getattr(potential, "card", None), on_unfamiliar), True)

    def check_composition(self, numbers: Tensor, batch: Tensor) -> None:
        """Refuse structures the model is not for.

        Args:
            numbers: atomic numbers ``[N]`` of all structures.
            batch: structure of each atom ``[N]``, ascending from 0 without gaps.

        Raises:
            UnsupportedInputError: an element or a composition it was not trained on.
            ConfigError: the model has no energy.
        """
        starts = np.unique(batch.cpu().numpy(), return_index=True)[1]
        structures = np.split(numbers.cpu().numpy().astype(np.int64), starts[1:])
        for inside in {np.sort(one).tobytes(): one for one in reversed(structures)}.values():
            if self.own_molecules_only:
                require_molecule(self.runtime.model, inside)
            else:
                self.familiarity.check_structure(Atoms(inside))

    def evaluate(
        self,
        numbers: Tensor,
        positions: Tensor,
        batch: Tensor,
        cell: Tensor,
        periodic: Tensor,
        known: object = None,
    ) -> BatchEvaluation:
        """Evaluate a batch; as :meth:`Runtime.evaluate_tensors <ffpretrain.md.Runtime.evaluate_tensors>`.

        Raises:
            UnsupportedInputError: what the runtime refuses, a composition the model was not trained on, or
                atoms closer than any in training under ``raise``.
            ConfigError: the model has no energy.
            NonFiniteError: an energy or force is not finite.
        """
        if (known is None or known is not self._known) and not self._unchanged(numbers, batch):
            seen = self._seen
            if seen is None or not (torch.equal(seen[0], numbers) and torch.equal(seen[1], batch)):
                self.check_composition(numbers, batch)
                # copies, so that a change that an engine makes in place is noticed
                self._seen = numbers.clone(), batch.clone()
            self._unchanged.keep(numbers, batch)
        self._known = known
        found = self.runtime.evaluate_tensors(numbers, positions, batch, cell, periodic, known)
        least = self.familiarity.min_distance
        if least is not None and _below(found, least):
            place = int(found.shortest.argmin())
            atoms = _atoms(place, numbers, positions, batch, cell, periodic)
            self.familiarity.check_distance(float(found.shortest[place]), atoms)
        self.last = found
        return found


def _below(found: BatchEvaluation, least: float) -> bool:
    if found.nearest is not None:
        return found.nearest < least
    return bool((found.shortest < least).any())


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
