"""Supervised training on energies and forces; on a property, :mod:`ffpretrain.objectives.property`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ffpretrain.datasets import Dataset
from ffpretrain.direct import DirectPotential
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.heads import VectorHead
from ffpretrain.objectives.base import (
    Drawn,
    Objective,
    displaced,
    graph_of,
    happens,
    index_of,
    label,
    mean_over,
    regression_loss,
)
from ffpretrain.objectives.strained import Strained, check_strain, strain, strain_loss
from ffpretrain.potential import Model, Potential

MAIN_HEADS = ("energy-gradient", "direct")


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
        main_head: what gives the forces: ``energy-gradient``, which conserves the energy, or ``direct``, a
            vector head beside the energy head, as is usual on OC20: faster, and no gradient of anything.
        strain_weight: weight of ``strain``, by how much bonds and angles far from rest fall short of coming
            back, over the scale; see :mod:`~ffpretrain.objectives.strained`. For molecules that stay whole.
        strain_force: what they must come back with at least, eV/Å.
        strain_probability: chance that a step has this term; the mean weight falls with it.
        strains: which, of :data:`~ffpretrain.objectives.strained.STRAINS`; None takes all.

    Raises:
        ConfigError: an unknown loss, a negative or all-zero weight, or a direct head that the backbone has no
            vectors for or that would learn nothing.
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
        main_head: str = "energy-gradient",
        strain_weight: float = 0.0,
        strain_force: float = 1.0,
        strain_probability: float = 0.25,
        strains: Sequence[str] | None = None,
    ) -> None:
        super().__init__(potential)
        if not (energy_weight >= 0 and forces_weight >= 0 and 0 < energy_weight + forces_weight < math.inf):
            raise ConfigError("energy_weight and forces_weight must be finite, not negative, nor both zero")
        for kind in (energy_loss, forces_loss):
            regression_loss(kind, torch.zeros(1, 1))
        self.energy_weight, self.forces_weight = energy_weight, forces_weight
        self.energy_loss, self.forces_loss = energy_loss, forces_loss
        self.huber_delta, self.energy_per_atom = huber_delta, energy_per_atom
        self._check_head(main_head)
        direct = main_head == "direct"
        check_strain(strain_weight, strain_probability, strain_force, strains, direct)
        self.strain_weight, self.strain_force = strain_weight, strain_force
        self.strain_probability, self.strains = strain_probability, strains
        self.force_head = VectorHead(potential.backbone.n_features) if direct else None
        self._evaluate: Callable[[Graph], dict[str, Tensor]] | None = None

    @property
    def recordable(self) -> bool:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return True

    def _check_head(self, main_head: str) -> None:
        backbone = self.network.backbone
        if main_head not in MAIN_HEADS:
            raise ConfigError(f"unknown main_head {main_head!r}; known: {', '.join(MAIN_HEADS)}")
        if main_head == "direct" and not backbone.has_vectors:
            raise ConfigError(
                f"main_head='direct' needs vector features, which backbone {backbone.name!r} lacks; "
                "set main_head='energy-gradient'"
            )
        if main_head == "direct" and not self.forces_weight:
            raise ConfigError("main_head='direct' learns nothing with forces_weight=0; raise it")

    def accelerate(self) -> None:
        """Compile energies and forces; :class:`~ffpretrain.compiled.CompiledForces` says what that needs.

        Raises:
            ConfigError: a direct head, whose step is not compiled.
        """
        from ffpretrain.compiled import CompiledForces

        if self.force_head is not None:
            raise ConfigError("main_head='direct' has no compiled path; set compile: false")
        self._evaluate = CompiledForces(self.network)

    @classmethod
    def variant(cls, options: Mapping[str, Any]) -> type[Objective]:
        """See :class:`~ffpretrain.objectives.base.Objective`: a property is learned by a class of its own."""
        if cls is not Supervised or options.get("property") is None:
            return cls
        from ffpretrain.objectives.property import SupervisedProperty

        return SupervisedProperty

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        drawn = self.draw_step(graph_of(sample), index_of(sample), generator)
        return self.terms_given(sample, drawn)

    def draw_step(self, graph: Graph, index: Tensor | None, generator: torch.Generator) -> Drawn:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return Drawn(strained=self.draw_strained(graph, index, generator))

    def check_frames(self, frames: Dataset) -> None:
        """See :class:`~ffpretrain.objectives.base.Objective`: strained structures are molecules."""
        if not self.strain_weight:
            return
        for place in range(len(frames)):
            if any(frames[place].pbc):
                raise DataError(
                    f"frame {place} of those that train is periodic, and only molecules are strained; set "
                    "objective.options.strain_weight=0"
                )

    def draw_strained(
        self, graph: Graph, index: Tensor | None, generator: torch.Generator
    ) -> Strained | None:
        """Return the structures strained; None by chance or, without a draw, where the weight is 0."""
        if not self.strain_weight or not happens(self.strain_probability, generator):
            return None
        return strain(graph, generator, index, self.strains)

    def terms_given(self, sample: Sample | Graph, drawn: Drawn) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        terms = self.supervised_terms(sample, self.evaluate(graph_of(sample)))
        return self.with_strain(terms, sample, drawn.strained)

    def with_strain(
        self, terms: dict[str, Tensor], sample: Sample | Graph, strained: Strained | None
    ) -> dict[str, Tensor]:
        """Return the terms of a step with ``strain`` among them, where the step has it.

        Args:
            terms: of the step.
            sample: its batch.
            strained: its structures, or None.
        """
        if strained is None:
            return terms
        graph = graph_of(sample)
        forces = self.evaluate(self.moved(graph, strained.pos - graph.pos))["forces"]
        short = strain_loss(forces, strained, graph.batch, self.strain_force) / self.network.scale
        term = mean_over(short.to(self.network.dtype), sample, "n_graphs")
        return {**terms, "loss": terms["loss"] + self.strain_weight * term, "strain": term}

    def moved(self, graph: Graph, displacement: Tensor) -> Graph:
        """Return the structures moved by ``[N, 3]`` Å; compiled code keeps all pairs and reads no edges."""
        if self._evaluate is not None and self.training:
            return graph._replace(pos=graph.pos + displacement.to(graph.pos))
        return displaced(graph, displacement, self.network.cutoff)

    def evaluate(self, graph: Graph) -> dict[str, Tensor]:
        """Return the network's energies and forces, differentiable where in training mode."""
        if self._evaluate is not None and self.training:
            return self._evaluate(graph)
        return self.potential()(graph, stress=False)

    def supervised_terms(
        self, sample: Sample | Graph, out: dict[str, Tensor], atoms: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss of predictions with its terms ``energy`` and ``forces``.

        Args:
            sample: the batch.
            out: ``energy [B]`` eV and ``forces [N, 3]`` eV/Å.
            atoms: whose forces count, bool ``[N]``, in a batch that one process has alone; None takes all.
        """
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
            each = regression_loss(self.forces_loss, residual, self.huber_delta)
            if atoms is None:
                terms["forces"] = mean_over(each, sample, "n_atoms")
            else:
                terms["forces"] = (each * atoms).sum() / atoms.sum().clamp_min(1)
            loss = loss + self.forces_weight * terms["forces"]
        return {"loss": loss, **terms}

    def potential(self, kT: float | None = None, sigma: float | None = None) -> Model:
        """Return the trained potential; ``kT`` and ``sigma`` do not matter, labels set the scale.

        Returns:
            The network itself, or with a direct head a :class:`~ffpretrain.direct.DirectPotential` around it,
            whose forces are no gradient.
        """
        if self.force_head is None:
            return self.network
        return DirectPotential(self.network, self.force_head).train(self.training)
