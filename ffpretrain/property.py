"""A model of one number for each structure, such as an orbital energy or the length of the dipole moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, atoms_per_graph
from ffpretrain.heads import EnergyHead
from ffpretrain.potential import Model

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard

READOUTS = ("mean", "sum")


class PropertyHead(nn.Module):
    """One number for each structure: the mean or the sum of one for each atom.

    Args:
        n_features: F of the backbone.
        has_vectors: whether the backbone has vector features.
        readout: ``mean``, or ``sum`` for what grows with the size of a structure.

    Raises:
        ConfigError: unknown readout.
    """

    def __init__(self, n_features: int, has_vectors: bool, readout: str = "mean") -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ConfigError(f"unknown readout {readout!r}; known: {', '.join(READOUTS)}")
        self.readout = readout
        self.atoms = EnergyHead(n_features, has_vectors)

    def forward(self, features: Features, graph: Graph) -> Tensor:
        """Return one number for each structure ``[B]`` in the network's own unit."""
        each = self.atoms(features)
        total = each.new_zeros(graph.n_graphs).index_add(0, graph.batch, each)
        return total / atoms_per_graph(graph) if self.readout == "mean" else total


class PropertyModel(Model):
    """Predicts ``scale * head + sum_i reference(z_i) + shift``; it has neither an energy nor forces.

    The network's part is computed in the precision of its weights, the rest in float64.

    Args:
        backbone: any backbone.
        head: gives a standardised number for each structure.
        known: whether the model was trained on an atomic number ``[max_z]``, bool.
        name: of the property, a key of the output.
        unit: of the property.
        scale: its unit per unit of the head's output.
        shift: added once for each structure.
        reference: added for each atom, by atomic number.
        card: what is known of a trained model.
    """

    conservative: ClassVar[bool] = False
    has_energy: ClassVar[bool] = False
    exact: ClassVar[tuple[str, ...]] = ("scale", "shift", "reference")
    head: PropertyHead
    scale: Tensor
    shift: Tensor
    reference: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: PropertyHead,
        known: Tensor,
        name: str,
        unit: str = "",
        *,
        scale: float = 1.0,
        shift: float = 0.0,
        reference: Mapping[int, float] | None = None,
        card: ModelCard | None = None,
    ) -> None:
        super().__init__(backbone, head, known, card)
        self.register_buffer("scale", torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("reference", torch.zeros(len(known), dtype=torch.float64))
        self.name, self.unit = name, unit
        self.standardise(unit, scale, shift, reference or {})

    def standardise(self, unit: str, scale: float, shift: float, reference: Mapping[int, float]) -> None:
        """Set the unit and what the network's output is scaled and shifted by."""
        self.unit = unit
        self.scale.fill_(scale)
        self.shift.fill_(shift)
        self.reference.zero_()
        for number, value in reference.items():
            self.reference[number] = value

    def options(self) -> dict[str, Any]:
        """Return what, beside the weights, builds this head and its scale again."""
        return {
            "name": self.name,
            "unit": self.unit,
            "readout": self.head.readout,
            "scale": self.scale.item(),
            "shift": self.shift.item(),
            "reference": {str(z): value for z, value in enumerate(self.reference.tolist()) if value != 0.0},
        }

    def forward(self, graph: Graph, *, forces: bool = False, stress: bool | None = None) -> dict[str, Tensor]:
        """Evaluate a graph.

        Args:
            graph: as for a potential.
            forces: must not be asked for.
            stress: must not be asked for.

        Returns:
            the property by its name ``[B]`` in its unit, float64; differentiable in training mode.

        Raises:
            UnsupportedInputError: an element the model never saw.
            ConfigError: forces or a stress are asked for.
        """
        if forces or stress:
            raise ConfigError(f"the model predicts {self.name} alone, no energy, forces or stress")
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            value = self.head(self.features(graph), graph).to(self.scale.dtype) * self.scale + self.shift
            each = self.reference[graph.z]
            return {self.name: value.index_add(0, graph.batch, each)}
