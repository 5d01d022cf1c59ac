"""Supervised training on one property of each structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.objectives.base import Objective, graph_of, label, mean_over, regression_loss
from ffpretrain.potential import Potential
from ffpretrain.property import PropertyHead, PropertyModel

LOSSES = ("l1", "mse", "huber")


class SupervisedProperty(Objective):
    """``|P - P*|`` over the standard deviation of the training labels; ``supervised`` with ``property`` set.

    With the readout ``mean`` labels are standardised by their mean and deviation, as is usual on QM9. With
    ``sum`` a number for each element, fitted to the training labels, is taken off instead of the mean, so
    that the model stays a sum over atoms; the deviation is that of the rest.

    Args:
        potential: its backbone is trained in place; its energy head is not used.
        property: name of the property in the data.
        readout: ``mean`` over atoms, or ``sum`` for what grows with the size of a structure.
        loss: ``l1``, ``mse`` or ``huber``, see :func:`~ffpretrain.objectives.base.regression_loss`.
        huber_delta: where the Huber loss turns linear, in standard deviations.

    Raises:
        ConfigError: no property, or an unknown readout or loss.
    """

    name: ClassVar[str] = "supervised"
    needs_labels: ClassVar[bool] = True
    network: PropertyModel  # type: ignore[assignment]

    def __init__(
        self,
        potential: Potential,
        property: str,
        readout: str = "mean",
        loss: str = "l1",
        huber_delta: float = 0.1,
    ) -> None:
        super().__init__(potential)
        if loss not in LOSSES:
            raise ConfigError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
        backbone = potential.backbone
        head = PropertyHead(backbone.n_features, backbone.has_vectors, readout)
        self.network = PropertyModel(backbone, head, potential.known, property)
        self.loss, self.huber_delta = loss, huber_delta

    @classmethod
    def labels(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """See :class:`~ffpretrain.objectives.base.Objective`: the property."""
        return (str(options["property"]),)

    @property
    def monitor(self) -> str:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return f"{self.network.name}_mae"

    def unit_of(self, term: str) -> str:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return self.network.unit if term in (f"{self.network.name}_mae", f"{self.network.name}_rmse") else "1"

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; the term has the property's name."""
        residual = self._residual(sample) / self.network.scale
        each = regression_loss(self.loss, residual.to(self.network.dtype), self.huber_delta)
        loss = mean_over(each, sample, "n_graphs")
        return {"loss": loss, self.network.name: loss}

    def validation_errors(self, sample: Sample) -> dict[str, tuple[float, int]]:
        """See :class:`~ffpretrain.objectives.base.Objective`; in the property's unit."""
        residual, name = self._residual(sample).detach(), self.network.name
        return {
            f"{name}_mae": (float(residual.abs().sum()), len(residual)),
            f"{name}_mse": (float(residual.square().sum()), len(residual)),
        }

    def potential(self, kT: float | None = None, sigma: float | None = None) -> PropertyModel:
        """Return the trained model, which predicts the property alone; ``kT`` and ``sigma`` do not matter."""
        return self.network

    def _residual(self, sample: Sample | Graph) -> Tensor:
        name = self.network.name
        return self.network(graph_of(sample))[name] - label(sample, name)
