"""A model with an energy and, from a second head, forces that are not its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ffpretrain.backbones.base import Features
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.heads import EnergyHead, VectorHead
from ffpretrain.potential import Model, Potential

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard


class DirectPotential(Model):
    """Energy ``scale * sum_i e_i + sum_i E_ref(z_i) + shift``, forces ``scale * f_i`` of a vector head.

    As models for catalysis (OC20) mostly are: evaluated and trained without differentiating, but the forces
    are no gradient, so they do work along closed paths and dynamics gain or lose energy. There is no stress.

    Args:
        network: its backbone, energy head, scale, reference energies, shift and elements are shared.
        force_head: from the backbone's features to forces over the scale ``[N, 3]``.
        card: what is known of a trained model.
    """

    conservative: ClassVar[bool] = False
    exact: ClassVar[tuple[str, ...]] = ("scale", "shift", "reference")
    head: EnergyHead
    scale: Tensor
    shift: Tensor
    reference: Tensor

    def __init__(self, network: Potential, force_head: VectorHead, card: ModelCard | None = None) -> None:
        super().__init__(network.backbone, network.head, network.known, card)
        self.force_head = force_head
        for name in self.exact:
            self.register_buffer(name, getattr(network, name))

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        """Evaluate a graph.

        Args:
            graph: as for a potential.
            forces: False returns energies only.
            stress: must not be asked for.

        Returns:
            ``energy [B]`` eV float64, ``energies [N]`` eV float64 (without the shift) and ``forces [N, 3]``
            eV/Å in the precision of ``graph.pos``; differentiable in training mode.

        Raises:
            UnsupportedInputError: an element the model never saw.
            ConfigError: a stress is asked for, which only a gradient has.
        """
        if stress:
            raise ConfigError(
                "a model with direct forces has no stress; train with main_head='energy-gradient' for one"
            )
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            out = self.read(self.features(graph), graph)
        if not forces:
            del out["forces"]
        return out

    def read(self, features: Features, graph: Graph) -> dict[str, Tensor]:
        """Return what the heads make of the features of a graph; as :meth:`forward`."""
        energies = self.head(features).to(self.scale.dtype) * self.scale + self.reference[graph.z]
        energy = energies.new_zeros(graph.n_graphs).index_add(0, graph.batch, energies) + self.shift
        forces = self.force_head(features).to(graph.pos.dtype) * self.scale.to(graph.pos.dtype)
        return {"energy": energy, "energies": energies, "forces": forces}
