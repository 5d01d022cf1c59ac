"""GeoRecon: denoising with a graph-level reconstruction task (GeoRecon, sections 3 and 3.2).

One draw of noise makes three inputs, ``x``, ``x + eps`` and ``x + lambda eps``, all encoded by one backbone:

    ``L_denoise = mean_i |head(x + eps)_i - eps_i|^2``
    ``L_clean   = mean_i |head(x)_i|^2``                                        (the same head)
    ``L_rec     = mean_i |decoder(g, h_i, u_i)_i - lambda eps_i|^2``,  ``g = mean_i h_i(x)``

where ``h, u`` are scalar and vector features of ``x + lambda eps``; the total is
``denoise_weight L_denoise + rec_weight L_rec + clean_weight L_clean`` (section 3.2). The gradient flows
through ``g``: that is what makes it informative.

What the paper leaves open or contradicts, and what is chosen here: its decoder acts on invariant scalars and
returns vectors, which no equivariant map can, so the decoder joins ``g`` to the scalars and passes both
streams through gated equivariant blocks, ``decoder_layers`` of them (``decoder="message-passing"`` is the
other reading of "L layers": layers of the backbone's own kind, which see the neighbours too); lambda
(``noise_scale_factor``) is not given for the main tables, so that of the ablations is taken, 1, with 5 layers
(with lambda = 1 the second and third input coincide and are encoded once); targets are in units of sigma,
without which losses are some 1e-3 (``normalize=False``: Å).

The clean term pulls the head to zero: on a harmonic potential with variance ``s^2`` the best slope of the
head is ``sigma^2 / (sigma^2 + s^2 (1 + w))`` with ``w = clean_weight / denoise_weight``, where it would be
``sigma^2 / (sigma^2 + s^2)`` without: forces read off it are too small by that much.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.heads import GatedBlock, VectorHead
from ffpretrain.noise import gaussian_noise
from ffpretrain.objectives.base import Objective, displaced, graph_of, index_of, mean_over, with_layers
from ffpretrain.objectives.fields import DenoisingField, force_scale
from ffpretrain.objectives.floors import batch_floor
from ffpretrain.potential import Potential

__all__ = ["GeoRecon"]


DECODERS = ("gated", "message-passing")


class GatedDecoder(nn.Module):
    """Noise from local features and a graph-level vector, through gated equivariant blocks.

    Args:
        n_features: F of the backbone.
        layers: number of blocks, at least 1.
    """

    def __init__(self, n_features: int, layers: int) -> None:
        super().__init__()
        self.join = nn.Linear(2 * n_features, n_features)
        self.blocks = nn.ModuleList(
            GatedBlock(n_features, n_features, activate=True) for _ in range(layers - 1)
        )
        self.last = GatedBlock(n_features, 1, scalars=False)

    def forward(self, embedding: Tensor, features: Features, graph: Graph) -> Tensor:
        """Return vectors ``[N, 3]``.

        Args:
            embedding: of the structure of each atom ``[N, F]``.
            features: of the noisy structures.
            graph: the noisy structures, which these blocks do not look at again.
        """
        scalars, vectors = self.join(torch.cat([embedding, features.scalars], dim=-1)), features.vectors
        for block in self.blocks:
            scalars, vectors = block(scalars, vectors)
        return self.last(scalars, vectors)[1].squeeze(-1)


class MessagePassingDecoder(nn.Module):
    """Noise from local features and a graph-level vector, through layers as those of the backbone.

    Args:
        backbone: its kind and options are taken, its weights are not.
        layers: number of layers, at least 1.

    Raises:
        ConfigError: the backbone cannot start from features, or has no layers to count.
    """

    def __init__(self, backbone: Backbone, layers: int) -> None:
        super().__init__()
        n = backbone.n_features
        self.join = nn.Linear(2 * n, n)
        self.layers = with_layers(backbone, layers, "georecon")
        self.layers.accept_vectors()
        self.last = GatedBlock(n, 1, scalars=False)

    def forward(self, embedding: Tensor, features: Features, graph: Graph) -> Tensor:
        """Return vectors ``[N, 3]``; arguments as :meth:`GatedDecoder.forward`."""
        joined = self.join(torch.cat([embedding, features.scalars], dim=-1))
        decoded = self.layers(graph, Features(joined, features.vectors))
        return self.last(decoded.scalars, decoded.vectors)[1].squeeze(-1)


class GeoRecon(Objective):
    """GeoRecon pretraining; registry name ``georecon``. Needs no labels.

    Reports beside the loss what to read it against: ``zero``, the expected loss of a prediction of zero, and
    ``floor``, what is left for a perfect equivariant network: neither denoising nor reconstruction sees how
    the noise moved or turned the structure as a whole.

    Args:
        potential: its backbone is trained in place and must have vector features.
        sigma: standard deviation of the noise, Å.
        noise_scale_factor: lambda, how many times the noise the reconstruction sees.
        decoder_layers: layers of the decoder.
        decoder: ``gated`` works on each atom; ``message-passing`` looks at neighbours, at the cost of so many
            more layers of the backbone.
        denoise_weight: of the denoising loss.
        rec_weight: of the reconstruction loss.
        clean_weight: of the loss on clean structures.
        normalize: targets in units of sigma; False takes Å, as the paper writes them.
        rebuild_edges: find neighbours anew for noisy positions.

    Raises:
        ConfigError: an option out of range, or a backbone without vector features.
    """

    name: ClassVar[str] = "georecon"
    needs_labels: ClassVar[bool] = False

    def __init__(
        self,
        potential: Potential,
        sigma: float = 0.04,
        noise_scale_factor: float = 1.0,
        decoder_layers: int = 5,
        decoder: str = "gated",
        denoise_weight: float = 1.0,
        rec_weight: float = 0.5,
        clean_weight: float = 10.0,
        normalize: bool = True,
        rebuild_edges: bool = True,
    ) -> None:
        super().__init__(potential)
        if not (0 < sigma < float("inf") and 0 < noise_scale_factor < float("inf")):
            raise ConfigError(
                f"georecon: sigma={sigma} and noise_scale_factor={noise_scale_factor} must be above zero"
            )
        if decoder_layers < 1:
            raise ConfigError(f"georecon: decoder_layers={decoder_layers}; the decoder needs at least 1")
        if decoder not in DECODERS:
            raise ConfigError(f"georecon: unknown decoder {decoder!r}; known: {', '.join(DECODERS)}")
        weights = (denoise_weight, rec_weight, clean_weight)
        if not (all(w >= 0 for w in weights) and 0 < sum(weights) < float("inf")):
            raise ConfigError("georecon: weights must be finite, not negative, nor all zero")
        self.sigma, self.noise_scale_factor, self.rebuild_edges = sigma, noise_scale_factor, rebuild_edges
        self.denoise_weight, self.rec_weight, self.clean_weight = weights
        #: Å per unit of the heads' output
        self.unit = sigma if normalize else 1.0
        backbone = potential.backbone
        self.noise_head = VectorHead(backbone.n_features, backbone.has_vectors)
        self.decoder: nn.Module
        if decoder == "gated":
            self.decoder = GatedDecoder(backbone.n_features, decoder_layers)
        else:
            self.decoder = MessagePassingDecoder(backbone, decoder_layers)

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds its three terms and references."""
        graph = graph_of(sample)
        self.network.check_elements(graph.z)
        noise = gaussian_noise(
            graph.batch, graph.n_graphs, self.sigma, generator, index_of(sample), graph.pos.dtype
        ).displacement
        backbone = self.network.backbone
        noisy_graph = wide_graph = self.moved(graph, noise)
        clean, noisy = backbone(graph), backbone(noisy_graph)
        wide = noisy
        if self.noise_scale_factor != 1:  # at 1 the two noisy inputs are one and the same
            wide_graph = self.moved(graph, self.noise_scale_factor * noise)
            wide = backbone(wide_graph)
        target = (noise / self.unit).to(self.network.dtype)
        errors = {
            "denoise": self.noise_head(noisy) - target,
            "rec": self.reconstruct(clean, wide, wide_graph) - self.noise_scale_factor * target,
            "clean": self.noise_head(clean),
        }
        terms = {key: mean_over(e.square().sum(-1), sample, "n_atoms") for key, e in errors.items()}
        loss = (
            self.denoise_weight * terms["denoise"]
            + self.rec_weight * terms["rec"]
            + self.clean_weight * terms["clean"]
        )
        return {"loss": loss, **terms, **self.references(graph, loss)}

    def unit_of(self, term: str) -> str:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return "1" if self.unit == self.sigma else "angstrom^2"

    def references(self, graph: Graph, like: Tensor) -> dict[str, Tensor]:
        """Return ``zero`` and ``floor`` of a batch: ``3 sigma^2 (w_denoise + w_rec lambda^2)`` per atom."""
        weight = self.denoise_weight + self.rec_weight * self.noise_scale_factor**2
        zero = like.new_full((), 3 * (self.sigma / self.unit) ** 2 * weight)
        return {"zero": zero, "floor": zero * batch_floor(graph).to(like)}

    def moved(self, graph: Graph, displacement: Tensor) -> Graph:
        """Return the graph with atoms displaced ``[N, 3]`` Å, its edges as the objective is set."""
        if self.rebuild_edges:
            return displaced(graph, displacement, self.network.cutoff)
        return graph._replace(pos=graph.pos + displacement)

    def embedding(self, clean: Features, graph: Graph) -> Tensor:
        """Return the graph-level vectors g ``[B, F]``: the mean of the clean scalars over each structure."""
        total = clean.scalars.new_zeros(graph.n_graphs, clean.scalars.shape[1])
        return total.index_add(0, graph.batch, clean.scalars) / atoms_per_graph(graph).unsqueeze(1)

    def reconstruct(self, clean: Features, noisy: Features, graph: Graph) -> Tensor:
        """Return the decoder's noise ``[N, 3]``.

        Args:
            clean: features of the clean structures.
            noisy: features of the noisy ones.
            graph: the noisy structures.
        """
        return self.decoder(self.embedding(clean, graph)[graph.batch], noisy, graph)

    def potential(self, kT: float | None = None, sigma: float | None = None) -> DenoisingField:
        """Return the denoising head as forces, without an energy: as ``coord`` with a vector head.

        Args:
            kT: eV; None takes 300 K.
            sigma: Å; None takes the noise it was trained with.
        """
        scale = force_scale(kT, self.sigma if sigma is None else sigma)
        head = copy.deepcopy(self.noise_head)
        return DenoisingField(copy.deepcopy(self.network), head, self.unit * scale).eval()
