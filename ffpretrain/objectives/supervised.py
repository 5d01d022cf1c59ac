"""Supervised training on energies and forces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.objectives.base import Objective, graph_of, label, mean_over, regression_loss
from ffpretrain.potential import Potential


class Supervised(Objective):
    """``energy_weight * |E - E*| + forces_weight * |F - F*|`` in units of the potential's scale.

    This is eq. 9-10 of NDeM (Tang et al. 2026), the usual loss, with the length of the force error by default
    where the paper has its square; ``forces_loss="mse"`` is the paper's.

    Both residuals are divided by ``potential.scale`` (set to the force RMS, times 1 Å for energies), so that
    weights mean the same on every dataset. The energy residual is divided by the number of atoms as well when
    ``energy_per_atom`` is set.

    Args:
        potential: trained in place.
        energy_weight: weight of the energy term; 0 leaves it out.
        forces_weight: weight of the force term; 0 leaves it out.
        energy_loss: ``l1``, ``mse`` or ``huber``, see
            :func:`~ffpretrain.objectives.base.regression_loss`.
        forces_loss: ``l1``, ``l2``, ``mse`` or ``huber``.
        huber_delta: where the Huber loss turns linear, in units of the scale.
        energy_per_atom: divide energy residuals by the number of atoms.

    Raises:
        ConfigError: an unknown loss, or a negative or all-zero weight.
    """

    name: ClassVar[str] = "supervised"
    needs_labels: ClassVar[bool] = True

    def __init__(
        self,
        potential: Potential,
        energy_weight: float = 0.05,
        forces_weight: float = 1.0,
        energy_loss: str = "l1",
        forces_loss: str = "l2",
        huber_delta: float = 0.1,
        energy_per_atom: bool = False,
    ) -> None:
        super().__init__(potential)
        if not (energy_weight >= 0 and forces_weight >= 0 and 0 < energy_weight + forces_weight < math.inf):
            raise ConfigError("energy_weight and forces_weight must be finite, not negative, nor both zero")
        for kind in (energy_loss, forces_loss):
            regression_loss(kind, torch.zeros(1, 1))
        self.energy_weight, self.forces_weight = energy_weight, forces_weight
        self.energy_loss, self.forces_loss = energy_loss, forces_loss
        self.huber_delta, self.energy_per_atom = huber_delta, energy_per_atom
        self._evaluate: Callable[[Graph], dict[str, Tensor]] | None = None

    def accelerate(self) -> None:
        """Compile energies and forces; :class:`~ffpretrain.compiled.CompiledForces` says what that needs."""
        from ffpretrain.compiled import CompiledForces

        self._evaluate = CompiledForces(self.network)

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        out = self.evaluate(graph_of(sample))
        return self.supervised_terms(sample, out)

    def evaluate(self, graph: Graph) -> dict[str, Tensor]:
        """Return the network's energies and forces, differentiable where in training mode."""
        if self._evaluate is not None and self.training:
            return self._evaluate(graph)
        return self.network(graph, stress=False)

    def supervised_terms(self, sample: Sample | Graph, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of predictions ``out`` with its terms ``energy`` and ``forces``."""
        scale, dtype = self.network.scale, self.network.dtype
        terms: dict[str, Tensor] = {}
        loss = torch.zeros((), dtype=dtype, device=scale.device)
        if self.energy_weight:
            # the difference is formed in float64: total energies have more digits than float32 holds
            residual = (out["energy"] - label(sample, "energy")) / scale
            if self.energy_per_atom:
                residual = residual / atoms_per_graph(graph_of(sample))
            terms["energy"] = mean_over(
                regression_loss(self.energy_loss, residual.to(dtype), self.huber_delta), sample, "n_graphs"
            )
            loss = loss + self.energy_weight * terms["energy"]
        if self.forces_weight:
            residual = ((out["forces"] - label(sample, "forces")) / scale).to(dtype)
            terms["forces"] = mean_over(
                regression_loss(self.forces_loss, residual, self.huber_delta), sample, "n_atoms"
            )
            loss = loss + self.forces_weight * terms["forces"]
        return {"loss": loss, **terms}

    def potential(self, kT: float | None = None, sigma: float | None = None) -> Potential:
        """Return the trained potential; ``kT`` and ``sigma`` do not matter, labels set the scale."""
        return self.network
