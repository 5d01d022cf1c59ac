"""DenoiseVAE: denoising with learned noise, a size for each atom (DenoiseVAE, section 3.2).

A noise generator, a second network, reads the clean structure and gives ``sigma_i`` (eq. 4); atoms are
displaced, ``x~_i = x_i + sigma_i eps_i`` (eq. 5), so that gradients reach the generator; the denoiser ``D``
answers with a score:

    ``L_denoise = sum_i sigma_i^2 |D_i - (x_i - x~_i) / sigma_i^2|^2 = sum_i |sigma_i D_i + eps_i|^2`` (eq. 6)
    ``L_KL = mean_i KL(N(0, sigma_i^2) || N(0, prior_sigma^2))`` (eq. 7)
    ``L = L_denoise + kl_weight L_KL`` (eq. 8)

What is to know of it: for data of variance ``s^2`` the best denoising loss is ``s^2 / (s^2 + sigma^2)`` per
component, so the denoising term alone drives sigma up and the KL term bounds it from above, against the text.

What the paper leaves open, and what is chosen here: the generator gives the log-variance of each atom, one
number for its three components (more would break equivariance), and starts at the prior; the KL is that of
three components (``kl_dims``); the sum of eq. 6 runs over the atoms of a structure while eq. 7 is a mean,
as written (``reduction="paper"``), which makes the weight of the KL one N-th of what it is with
``reduction="mean"``; no gradient is stopped; 0.1 Å is a standard deviation, as the text says, not a
variance as in its figure 3.

``covariance="full"`` is the variant of its appendix A.13, where atoms move together (eq. 31-37), with
``Sigma = diag(sigma) K diag(sigma)``. How the generator gives a covariance is not said: here
``K_ij = (delta_ij + u_i . u_j) / sqrt((1 + |u_i|^2) (1 + |u_j|^2))`` from a vector ``u_i`` of each atom. It
has ones on its diagonal, is positive definite, and is sampled as ``(eps_i + u_i . xi) / sqrt(1 + |u_i|^2)``
with ``xi`` shared by the atoms of a structure. Its divergence is divided by N, as eq. 7 is a mean.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.heads import VectorHead
from ffpretrain.noise import gaussian_noise
from ffpretrain.objectives.base import (
    Objective,
    graph_of,
    index_of,
    mean_over,
    rebuilt_edges,
    with_layers,
)
from ffpretrain.objectives.fields import DenoisingField, force_scale
from ffpretrain.objectives.floors import batch_floor, rigid_modes
from ffpretrain.objectives.noise_generator import FieldWithNoise, NoiseGenerator, correlate, shared_noise
from ffpretrain.potential import Potential

__all__ = ["DenoiseVAE", "NoiseGenerator", "covariance_divergence", "denoising_term", "kl_divergence"]


def kl_divergence(sigma: Tensor, prior_sigma: float | Tensor, dims: int = 3) -> Tensor:
    """Return ``KL(N(0, sigma^2 I) || N(0, prior_sigma^2 I))`` for each entry of ``sigma``, eq. 7.

    ``dims * (ln(prior_sigma / sigma) + sigma^2 / (2 prior_sigma^2) - 1/2)``.

    Args:
        sigma: standard deviations, above zero, ``[N]``.
        prior_sigma: of the prior, in the same unit.
        dims: number of independent components.
    """
    ratio = sigma / prior_sigma
    return dims * (0.5 * ratio.square() - 0.5 - ratio.log())


def covariance_divergence(covariance: Tensor, prior_sigma: float, dims: int = 3) -> Tensor:
    """Return ``KL(N(0, Sigma) || N(0, prior_sigma^2 I))``, eq. 36: the same Sigma for each component.

    ``dims / 2 * (tr Sigma / prior_sigma^2 - n + n ln prior_sigma^2 - ln det Sigma)``.

    Args:
        covariance: between the atoms of one structure, positive definite ``[n, n]``.
        prior_sigma: of the prior, in the unit of the covariance's root.
        dims: number of independent components.
    """
    ratio = covariance / prior_sigma**2
    log_det = 2 * torch.linalg.cholesky(ratio).diagonal().log().sum()
    return 0.5 * dims * (ratio.trace() - len(ratio) - log_det)


def denoising_term(score: Tensor, unit: Tensor, sigma: Tensor) -> Tensor:
    """Return ``sigma_i^2 |D_i - (x_i - x~_i) / sigma_i^2|^2 = |sigma_i D_i + eps_i|^2`` ``[N]``, eq. 6.

    Args:
        score: D, 1/Å ``[N, 3]``.
        unit: eps ``[N, 3]``; the structure was displaced by ``sigma_i eps_i``.
        sigma: Å ``[N]``.
    """
    return (sigma.unsqueeze(1) * score + unit).square().sum(-1)


def correlation_matrix(vectors: Tensor) -> Tensor:
    """Return K ``[n, n]`` of the correlation vectors ``[n, rank]`` of one structure."""
    square = vectors @ vectors.T + torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
    root = square.diagonal().sqrt()
    return square / (root.unsqueeze(1) * root)


class DenoiseVAE(Objective):
    """DenoiseVAE pretraining; registry name ``denoisevae``. Needs no labels.

    Reports ``sigma``, the mean standard deviation in Å, beside the loss and its terms, and what to read them
    against: ``zero``, what a denoiser that gives zero costs whatever the noise, with the noise at the prior;
    ``floor``, the rigid motions of each structure, which no equivariant denoiser sees (where atoms move
    independently); ``kl_floor``, the divergence at the prior, 0.

    Args:
        potential: its backbone becomes the denoiser and must have vector features.
        prior_sigma: standard deviation of the prior, Å.
        kl_weight: lambda.
        kl_dims: components the KL counts: 3, or 1 as in code by some of the authors for another method.
        generator_layers: of the noise generator's backbone, otherwise a copy of the denoiser's with fresh
            weights.
        reduction: ``paper`` sums the denoising term over the atoms of a structure; ``mean`` averages it.
        rebuild_edges: find neighbours anew for the noisy positions; False keeps the clean ones.
        sigma_form: how the generator's number becomes sigma: ``log-variance`` or ``softplus``.
        covariance: ``independent`` atoms, or ``full``, of appendix A.13, where atoms move together.
        rank: length of the vectors that a full covariance is made of.
        keep_generator: keep the noise generator with what was learned; landscapes and pictures of the noise
            need it. False drops it, as the paper does.

    Raises:
        ConfigError: an option out of range, or a backbone without vector features or layers to count.
    """

    name: ClassVar[str] = "denoisevae"
    needs_labels: ClassVar[bool] = False

    def __init__(
        self,
        potential: Potential,
        prior_sigma: float = 0.1,
        kl_weight: float = 1.0,
        kl_dims: int = 3,
        generator_layers: int = 4,
        reduction: str = "paper",
        rebuild_edges: bool = True,
        sigma_form: str = "log-variance",
        covariance: str = "independent",
        rank: int = 8,
        keep_generator: bool = True,
    ) -> None:
        super().__init__(potential)
        self.keep_generator = keep_generator
        if not 0 < prior_sigma < float("inf"):
            raise ConfigError(f"denoisevae: prior_sigma={prior_sigma} must be above zero; give it in Å")
        if not 0 <= kl_weight < float("inf"):
            raise ConfigError(f"denoisevae: kl_weight={kl_weight} must be finite and not negative")
        if kl_dims not in (1, 3):
            raise ConfigError(f"denoisevae: kl_dims={kl_dims} is neither 1 nor 3")
        if reduction not in ("paper", "mean"):
            raise ConfigError(f"denoisevae: unknown reduction {reduction!r}; known: paper, mean")
        if sigma_form not in ("log-variance", "softplus"):
            raise ConfigError(f"denoisevae: unknown sigma_form {sigma_form!r}; known: log-variance, softplus")
        if covariance not in ("independent", "full"):
            raise ConfigError(f"denoisevae: unknown covariance {covariance!r}; known: independent, full")
        if rank < 1:
            raise ConfigError(f"denoisevae: rank={rank}; give at least 1")
        self.prior_sigma, self.kl_weight, self.kl_dims = prior_sigma, kl_weight, kl_dims
        self.reduction, self.rebuild_edges = reduction, rebuild_edges
        backbone = potential.backbone
        encoder = with_layers(backbone, generator_layers, "denoisevae")
        self.covariance, self.rank = covariance, rank if covariance == "full" else 0
        self.noise_generator = NoiseGenerator(encoder, prior_sigma, sigma_form, self.rank)
        self.noise_head = VectorHead(backbone.n_features, backbone.has_vectors)

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds its two terms, ``sigma``, references."""
        graph = graph_of(sample)
        self.network.check_elements(graph.z)
        unit = gaussian_noise(
            graph.batch, graph.n_graphs, 1.0, generator, index_of(sample), graph.pos.dtype
        ).displacement
        if not self.rank:
            sigma = self.noise_generator(graph)
            kl = kl_divergence(sigma, self.prior_sigma, self.kl_dims)
        else:
            sigma, vectors = self.noise_generator.correlated(graph)
            shared = shared_noise(self.rank, graph, generator, index_of(sample), unit)
            unit = self.correlated(unit, vectors, shared, graph)
            kl = self._joint_divergence(sigma, vectors, graph)
        error = self.denoising_error(graph, sigma, unit)
        if self.reduction == "paper":
            terms = {
                "denoise": mean_over(self._sum(error, graph), sample, "n_graphs"),
                "kl": mean_over(self._sum(kl, graph) / atoms_per_graph(graph), sample, "n_graphs"),
            }
        else:
            terms = {"denoise": mean_over(error, sample, "n_atoms"), "kl": mean_over(kl, sample, "n_atoms")}
        loss = terms["denoise"] + self.kl_weight * terms["kl"]
        terms["sigma"] = mean_over(sigma.detach(), sample, "n_atoms")
        return {"loss": loss, **terms, **self.references(graph, loss)}

    def correlated(self, unit: Tensor, vectors: Tensor, shared: Tensor, graph: Graph) -> Tensor:
        """Return draws of unit variance whose correlation between atoms is K ``[N, 3]``."""
        return correlate(unit, vectors, shared, graph)

    def _joint_divergence(self, sigma: Tensor, vectors: Tensor, graph: Graph) -> Tensor:
        """Return eq. 36 of each structure over its number of atoms, spread to the atoms ``[N]``."""
        counts = atoms_per_graph(graph).tolist()
        # exact where it is cheap: the determinant of nearly dependent atoms would not survive float32
        parts = zip(sigma.double().split(counts), vectors.double().split(counts), strict=True)
        each = []
        for level, u in parts:
            covariance = level.unsqueeze(1) * correlation_matrix(u) * level
            each.append(covariance_divergence(covariance, self.prior_sigma, self.kl_dims) / len(level))
        return torch.stack(each).to(sigma)[graph.batch]

    def unit_of(self, term: str) -> str:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return "angstrom" if term == "sigma" else "1"

    def references(self, graph: Graph, like: Tensor) -> dict[str, Tensor]:
        """Return ``zero``, ``kl_floor`` and ``floor`` of a batch: 3 per atom, 0 and 1 per rigid motion."""
        if self.reduction == "paper":
            zero, floor = 3 * len(graph.z) / graph.n_graphs, rigid_modes(graph).to(like).mean()
        else:
            zero, floor = 3.0, 3 * batch_floor(graph).to(like)
        found = {"zero": like.new_full((), zero), "kl_floor": like.new_zeros(())}
        return found if self.rank else {**found, "floor": floor}

    def denoising_error(self, graph: Graph, sigma: Tensor, unit: Tensor) -> Tensor:
        """Return ``|sigma_i D_i + eps_i|^2`` of each atom ``[N]``, differentiable by ``sigma``.

        Args:
            graph: clean structures.
            sigma: Å ``[N]``.
            unit: eps, of unit variance ``[N, 3]``.
        """
        pos = graph.pos + sigma.unsqueeze(1).to(unit) * unit
        noisy = graph._replace(pos=pos)
        if self.rebuild_edges:
            edge_index, edge_shift = rebuilt_edges(graph, pos.detach(), self.network.cutoff)
            noisy = noisy._replace(edge_index=edge_index, edge_shift=edge_shift)
        score = self.score(noisy)
        return denoising_term(score, unit.to(score), sigma)

    def score(self, graph: Graph) -> Tensor:
        """Return D of noisy structures in 1/Å ``[N, 3]``: it points along the force."""
        return self.noise_head(self.network.backbone(graph)) / self.prior_sigma

    @staticmethod
    def _sum(values: Tensor, graph: Graph) -> Tensor:
        return values.new_zeros(graph.n_graphs).index_add(0, graph.batch, values)

    def potential(self, kT: float | None = None, sigma: float | None = None) -> DenoisingField:
        """Return the denoiser as forces ``kT D``, without an energy, with the generator where it is kept.

        Args:
            kT: eV; None takes 300 K.
            sigma: ignored: the score is that of the density smoothed by the learned noise.
        """
        # D is a score already; the field has the sign of a displacement, against it
        factor = -force_scale(kT, 1.0) / self.prior_sigma
        network, head = copy.deepcopy(self.network), copy.deepcopy(self.noise_head)
        if not self.keep_generator:
            return DenoisingField(network, head, factor).eval()
        kept = copy.deepcopy(self.noise_generator)
        return FieldWithNoise(network, head, factor, noise_generator=kept).eval()
