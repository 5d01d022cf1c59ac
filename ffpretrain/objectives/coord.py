"""Coordinate denoising (Zaidi et al. 2022, "Pre-training via denoising for molecular property prediction").

Every atom is displaced by Gaussian noise, ``x~ = x + sigma eps``; the network predicts ``eps`` from ``x~``.
The best answer is ``-sigma grad log p_sigma(x~)``, the score of the smoothed data (Tweedie; Vincent 2011), so
for structures at thermal equilibrium the network learns the force field up to ``-sigma / kT``, label-free.

For displacements ``u`` from a harmonic minimum with thermal covariance ``C = kT H^-1`` the optimum is
``sigma (C + sigma^2 I)^-1 u~``, which tends to ``-(sigma / kT) F`` as sigma goes to 0. An equivariant network
cannot see the part of the noise that moves or turns the molecule as a whole: see
:func:`~ffpretrain.objectives.floors.rigid_body_floor`.

What the paper leaves open, and what is chosen here: the target is ``eps``, the noise over the fixed sigma,
where the published code keeps running statistics that start at zero and mix with whatever noise fine-tuning
uses; the loss is the mean over atoms and components, as published; edges belong to the noisy positions; noise
is neither centred nor aligned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.heads import VectorHead
from ffpretrain.noise import gaussian_noise
from ffpretrain.objectives.base import Objective, displaced, graph_of, index_of, mean_over
from ffpretrain.objectives.fields import DenoisingField, force_scale
from ffpretrain.objectives.floors import batch_floor
from ffpretrain.potential import Potential

__all__ = ["Coord"]

HEADS = ("vector", "energy-gradient")


class Coord(Objective):
    """Coordinate denoising; registry name ``coord``. Needs no labels.

    Reports beside the loss what to read it against: ``zero``, the expected loss of a prediction of zero, 1,
    and ``floor``, what is left for a perfect equivariant denoiser on the same batch.

    Args:
        potential: its backbone is trained in place; its energy head too where ``head`` says so.
        sigma: standard deviation of the noise, Å.
        head: ``vector`` predicts the noise directly; ``energy-gradient`` takes the gradient of the
            potential's energy head, so that what is learned is conservative, for any backbone, at the price
            of differentiating twice.
        rebuild_edges: find neighbours anew for the noisy positions; False keeps the clean ones.

    Raises:
        ConfigError: an option out of range, or a direct head on a backbone without vector features.
    """

    name: ClassVar[str] = "coord"
    needs_labels: ClassVar[bool] = False

    def __init__(
        self, potential: Potential, sigma: float = 0.04, head: str = "vector", rebuild_edges: bool = True
    ) -> None:
        super().__init__(potential)
        if not 0 < sigma < float("inf"):
            raise ConfigError(f"{self.name}: sigma={sigma} must be above zero; give it in Å")
        if head not in HEADS:
            raise ConfigError(f"{self.name}: unknown head {head!r}; known: {', '.join(HEADS)}")
        backbone = potential.backbone
        if head == "vector" and not backbone.has_vectors:
            raise ConfigError(
                f"{self.name}: head='vector' needs vector features, which backbone {backbone.name!r} lacks; "
                "set head='energy-gradient'"
            )
        self.sigma, self.head, self.rebuild_edges = sigma, head, rebuild_edges
        self.noise_head = VectorHead(backbone.n_features) if head == "vector" else None
        self._predict: Callable[[Graph], Tensor] | None = None

    def accelerate(self) -> None:
        """Compile the prediction for training; see :mod:`ffpretrain.compiled` for what that needs."""
        from ffpretrain.compiled import CompiledForces, CompiledVectors

        if self.noise_head is not None:
            self._predict = CompiledVectors(self.network.backbone, self.noise_head)
        else:
            forces = CompiledForces(self.network)
            self._predict = lambda graph: self._noise_of(forces(graph)["forces"])

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds ``zero`` and ``floor``."""
        graph = graph_of(sample)
        noise = gaussian_noise(
            graph.batch, graph.n_graphs, self.sigma, generator, index_of(sample), graph.pos.dtype
        )
        return self.denoising_terms(sample, graph, noise.displacement)

    def denoising_terms(self, sample: Sample | Graph, start: Graph, shift: Tensor) -> dict[str, Tensor]:
        """Return the loss of undoing a displacement, and what to read it against.

        Args:
            sample: the batch.
            start: its structures before the displacement.
            shift: noise of standard deviation sigma, Å ``[N, 3]``.
        """
        target = (shift / self.sigma).to(self.network.dtype)
        error = (self.predict(self.moved(start, shift)) - target).square().mean(-1)
        return {
            "loss": mean_over(error, sample, "n_atoms"),
            "zero": error.new_ones(()),
            "floor": batch_floor(start).to(error),
        }

    def moved(self, graph: Graph, displacement: Tensor) -> Graph:
        """Return the graph with atoms displaced ``[N, 3]`` Å, its edges as the objective is set."""
        if self.rebuild_edges:
            return displaced(graph, displacement, self.network.cutoff)
        return graph._replace(pos=graph.pos + displacement)

    def predict(self, graph: Graph) -> Tensor:
        """Return the predicted noise of noisy structures in units of sigma ``[N, 3]``."""
        self.network.check_elements(graph.z)
        if self._predict is not None and self.training:
            return self._predict(graph)
        if self.noise_head is not None:
            return self.noise_head(self.network.backbone(graph))
        return self._noise_of(self.network(graph, stress=False)["forces"])

    def _noise_of(self, forces: Tensor) -> Tensor:
        """Return the gradient of the energy head's output per Å; the potential's own unit drops out."""
        return (-forces / self.network.scale.to(forces)).to(self.network.dtype)

    def potential(self, kT: float | None = None, sigma: float | None = None) -> nn.Module:
        """Return the learned field as forces: ``-(kT / sigma^2)`` times the predicted displacement.

        Args:
            kT: temperature of the data in eV; None takes 300 K. For structures relaxed to their minima there
                is no temperature, and it only sets the unit.
            sigma: Å; None takes the noise it was trained with.

        Returns:
            A copy in eval mode: with an energy-gradient head a
            :class:`~ffpretrain.potential.Potential`, its energies counted from an arbitrary zero; with a
            vector head a :class:`~ffpretrain.objectives.fields.DenoisingField`, which has no energy.

        Raises:
            ConfigError: ``kT`` or ``sigma`` not above zero.
        """
        scale = force_scale(kT, self.sigma if sigma is None else sigma)
        network = copy.deepcopy(self.network)
        if self.noise_head is not None:
            return DenoisingField(network, copy.deepcopy(self.noise_head), self.sigma * scale).eval()
        learned = Potential(
            network.backbone, network.head, scale=self.sigma * scale, elements=network.elements
        )
        return learned.to(network.scale.device).eval()
