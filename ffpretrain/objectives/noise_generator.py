"""The noise generator that DenoiseVAE learns (section 3.2, eq. 4), and a field that keeps it for later use.

DenoiseVAE drops the generator after pretraining; its landscapes (appendix A.11) and its picture of the noise
of each atom (figure 5) need it again, so a model file can hold it beside the denoiser.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.backbones import create_backbone
from ffpretrain.backbones.base import Backbone
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.noise import FrameGenerators, gaussian_noise
from ffpretrain.objectives.fields import DenoisingField
from ffpretrain.potential import Model

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard

SIGMA_FORMS = ("log-variance", "softplus")


class NoiseGenerator(nn.Module):
    """Standard deviation of each atom's noise from a clean structure, eq. 4.

    Args:
        backbone: its own, not the denoiser's.
        prior_sigma: Å, what it gives before training.
        sigma_form: ``log-variance``, ``sigma = exp(a / 2)``, or ``softplus``, ``sigma = ln(1 + exp(a))``.
        rank: length of each atom's correlation vector; 0 where atoms are displaced independently.
    """

    def __init__(
        self, backbone: Backbone, prior_sigma: float, sigma_form: str = "log-variance", rank: int = 0
    ) -> None:
        super().__init__()
        self.backbone, self.sigma_form = backbone, sigma_form
        self.prior_sigma, self.rank = prior_sigma, rank
        n = backbone.n_features
        self.hidden = nn.Linear(n, n)
        self.size = nn.Linear(n, 1)
        nn.init.zeros_(self.size.weight)
        exact = (
            2 * math.log(prior_sigma) if sigma_form == "log-variance" else math.log(math.expm1(prior_sigma))
        )
        nn.init.constant_(self.size.bias, exact)
        if rank:
            self.correlation = nn.Linear(n, rank)

    def forward(self, graph: Graph) -> Tensor:
        """Return sigma in Å ``[N]``."""
        return self._sigma(self._hidden(graph))

    def correlated(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """Return sigma in Å ``[N]`` and the correlation vectors ``[N, rank]``."""
        hidden = self._hidden(graph)
        return self._sigma(hidden), self.correlation(hidden)

    def _hidden(self, graph: Graph) -> Tensor:
        return nn.functional.silu(self.hidden(self.backbone(graph).scalars))

    def _sigma(self, hidden: Tensor) -> Tensor:
        size = self.size(hidden).squeeze(-1)
        return (0.5 * size).exp() if self.sigma_form == "log-variance" else nn.functional.softplus(size)

    def draw(self, graph: Graph, generator: torch.Generator) -> Tensor:
        """Return displacements ``sigma_i eps_i`` in Å ``[N, 3]``, eq. 5, correlated where it learned that.

        Args:
            graph: clean structures.
            generator: of the draws.
        """
        unit = gaussian_noise(graph.batch, graph.n_graphs, 1.0, generator, None, graph.pos.dtype).displacement
        if not self.rank:
            return self(graph).unsqueeze(1).to(unit) * unit
        sigma, vectors = self.correlated(graph)
        shared = shared_noise(self.rank, graph, generator, None, unit)
        return sigma.unsqueeze(1).to(unit) * correlate(unit, vectors, shared, graph)


def shared_noise(
    rank: int, graph: Graph, generator: torch.Generator, index: Tensor | None, like: Tensor
) -> Tensor:
    """Return xi, the noise that the atoms of a structure share ``[B * rank, 3]``.

    Args:
        rank: length of the correlation vectors.
        graph: the structures.
        generator: of the draws.
        index: identifiers of the structures ``[B]``, or None.
        like: gives type and device.
    """
    streams = FrameGenerators(generator, index, graph.n_graphs)
    return streams.normal([rank] * graph.n_graphs, like.dtype).to(like)


def correlate(unit: Tensor, vectors: Tensor, shared: Tensor, graph: Graph) -> Tensor:
    """Return draws of unit variance whose correlation between atoms is K ``[N, 3]``.

    Args:
        unit: eps, independent ``[N, 3]``.
        vectors: u ``[N, rank]``.
        shared: xi, one set for each structure ``[B * rank, 3]``.
        graph: the structures.
    """
    u = vectors.to(unit)
    common = torch.einsum("nk,nkd->nd", u, shared.view(-1, u.shape[1], 3)[graph.batch])
    return (unit + common) / (1 + u.square().sum(1, keepdim=True)).sqrt()


class FieldWithNoise(DenoisingField):
    """A denoising field and the noise generator it was trained with.

    Args:
        network: its backbone and its elements are used.
        head: from features to displacements ``[N, 3]``.
        factor: eV/Å per unit of the head's output.
        card: what is known of a trained model.
        noise_generator: gives the noise of each atom of a clean structure.
    """

    head_name: ClassVar[str] = "vector+noise"

    def __init__(
        self,
        network: Model,
        head: nn.Module,
        factor: float,
        card: ModelCard | None = None,
        *,
        noise_generator: NoiseGenerator,
    ) -> None:
        super().__init__(network, head, factor, card)
        self.noise_generator = noise_generator

    def noise_scale(self, graph: Graph) -> Tensor:
        """Return the standard deviation of each atom's noise in Å ``[N]``.

        Raises:
            UnsupportedInputError: an element the model never saw.
        """
        self.check_elements(graph.z)
        with torch.no_grad():
            return self.noise_generator(graph)

    def draw_noise(self, graph: Graph, generator: torch.Generator) -> Tensor:
        """Return a draw of the learned noise in Å ``[N, 3]``.

        Args:
            graph: clean structures.
            generator: of the draws.

        Raises:
            UnsupportedInputError: an element the model never saw.
        """
        self.check_elements(graph.z)
        with torch.no_grad():
            return self.noise_generator.draw(graph, generator)

    def head_options(self) -> dict[str, Any]:
        """See :class:`~ffpretrain.objectives.fields.Learned`: what the generator is rebuilt from."""
        generator = self.noise_generator
        return {
            "generator": generator.backbone.name,
            "generator_options": dict(generator.backbone.config),
            "prior_sigma": generator.prior_sigma,
            "sigma_form": generator.sigma_form,
            "rank": generator.rank,
        }

    @classmethod
    def from_options(
        cls, network: Model, factor: float, options: dict[str, Any], card: ModelCard
    ) -> FieldWithNoise:
        """See :class:`~ffpretrain.objectives.fields.Learned`.

        Raises:
            ConfigError: a form of sigma that this package does not know.
        """
        if options["sigma_form"] not in SIGMA_FORMS:
            raise ConfigError(
                f"unknown sigma_form {options['sigma_form']!r}; known: {', '.join(SIGMA_FORMS)}"
            )
        backbone = create_backbone(options["generator"], **options["generator_options"])
        kept = NoiseGenerator(backbone, options["prior_sigma"], options["sigma_form"], options["rank"])
        head = cls.head_class(network.backbone.n_features)
        return cls(network, head, factor, card, noise_generator=kept)
