"""3D-EMGP: energy-motivated pretraining (Jiao et al. 2023), force prediction and noise-scale prediction.

A level ``sigma_l`` is drawn for each structure, which is then displaced by it. From the node features
``h'_i`` (eq. 1) come a graph-level vector ``u = sum_i h'_i``, an energy ``E = proj(u)`` (eq. 2) and forces
``F = -dE/dx`` (eq. 3). Two losses (eq. 14): ``L = efp_weight L_EFP + inp_weight L_INP`` with

    ``L_EFP = sigma^2 |F(X~) / sigma - S / alpha|^2 = |F(X~) - sigma S / alpha|^2``   (eq. 12)
    ``L_INP = cross entropy of the level from (u(X), u(X~))``   (eq. 13)

summed over atoms and components, mean over structures. ``S`` is the score of the Riemann-Gaussian
distribution (eq. 11), which does not change when the clean structure is moved or turned.

What is to know of it: with one Langevin step, the paper's choice, the noise is plain Gaussian and only the
target is Riemannian. The target has neither net force nor torque, and none to first order out of the plane
of a planar molecule; a prediction of zero costs ``N + 1 + (tr M)^2 / tr M^2`` at small sigma (M: second
moments of the clean structure). Levels reach 10 Å, where nothing is left of the molecule. The network is
not told the level. At small sigma the target is not the score of the positions but that score weighted by
M: twice its size for two atoms, ``1 / sqrt(3)`` of it for most directions of a large round molecule. What is
learned is read as forces by the one number that fits best over all directions, which depends on the number
of atoms and on ``shape``: see :func:`~ffpretrain.noise.riemann_gaussian_slope`.

What the paper leaves open, and what is chosen here: the node decoder is a two-layer perceptron on the
backbone's scalars, its edges are those of the backbone's cutoff and not all pairs with bond types.

Two ablations of its table 3 are options: ``target="gaussian"`` trains forces on the plain score,
``-(X~ - X) / sigma``, and ``target="distance"`` replaces forces by a head that tells the change of each
distance in units of sigma, mean over pairs (the paper says neither how nor from what).
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Features
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.noise import (
    FrameGenerators,
    noise_levels,
    riemann_gaussian_noise,
    riemann_gaussian_slope,
    riemann_gaussian_target,
)
from ffpretrain.objectives.base import Objective, displaced, graph_of, index_of, mean_over
from ffpretrain.objectives.fields import Learned, force_scale
from ffpretrain.objectives.se3_ddm import DistanceField, DistanceScore, all_pairs, distances
from ffpretrain.potential import Model, Potential

__all__ = ["EMGP", "PooledEnergy", "PooledPotential"]


def _perceptron(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out))


class PooledEnergy(nn.Module):
    """A graph-level vector from node features and an energy from it, eq. 2.

    Args:
        n_features: F of the backbone.
        shape: of the molecules, as for :func:`~ffpretrain.noise.riemann_gaussian_slope`, where the energy was
            trained on the Riemannian target; None where its gradient is a score as it is.
    """

    def __init__(self, n_features: int, shape: float | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.node = _perceptron(n_features, n_features, n_features)
        self.project = _perceptron(n_features, n_features, 1)

    def pool(self, features: Features, graph: Graph) -> Tensor:
        """Return u ``[B, F]``."""
        node = self.node(features.scalars)
        return node.new_zeros(graph.n_graphs, node.shape[1]).index_add(0, graph.batch, node)

    def forward(self, network: Model, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        """Return u ``[B, F]``, the energy ``[B]`` and its negative gradient ``[N, 3]``, differentiable."""
        pos = graph.pos.detach().requires_grad_(True)
        pooled = self.pool(network.features(graph._replace(pos=pos)), graph)
        energy = self.project(pooled).squeeze(-1)
        (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=True, materialize_grads=True)
        return pooled, energy, -gradient.to(energy)


class PooledPotential(Learned):
    """The pooled energy as a potential: an energy for each structure, none for each atom, and no stress.

    Args:
        network: its backbone and elements are used.
        head: of the energy.
        factor: eV per unit of the head's energy.
        card: what is known of a trained model.
    """

    conservative: ClassVar[bool] = True
    head_name: ClassVar[str] = "pooled-energy"
    head_class: ClassVar[type[nn.Module]] = PooledEnergy
    head: PooledEnergy

    def head_options(self) -> dict[str, float]:
        """See :class:`~ffpretrain.objectives.fields.Learned`."""
        return {} if self.head.shape is None else {"shape": self.head.shape}

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        """Evaluate a graph.

        Args:
            graph: as for a potential.
            forces: False leaves them out.
            stress: must not be asked for.

        Returns:
            ``energy [B]`` eV float64 and ``forces [N, 3]`` eV/Å in the precision of ``graph.pos``, detached.

        Raises:
            UnsupportedInputError: an element the model never saw.
            ConfigError: a stress is asked for.
        """
        if stress:
            raise ConfigError("this potential has no stress; train with labels, or with coord, for one")
        with torch.enable_grad():
            _, energy, force = self.head(self, graph)
        factor = self.factor.expand(graph.n_graphs)
        if self.head.shape is not None:
            factor = factor * riemann_gaussian_slope(atoms_per_graph(graph), self.head.shape)
        out = {"energy": energy.detach().to(torch.float64) * factor}
        if forces:
            out["forces"] = force.detach().to(graph.pos) * factor[graph.batch].unsqueeze(1).to(graph.pos)
        return out


TARGETS = ("riemann", "gaussian", "distance")


class EMGP(Objective):
    """3D-EMGP pretraining; registry name ``3d-emgp``. Needs no labels.

    Reports beside the loss what to read it against: ``efp_zero``, the cost of forces of zero on the very
    batch, which tends to ``N + 1 + (tr M)^2 / tr M^2`` at small levels; ``inp_chance``, the logarithm of the
    number of levels, which guessing costs; and ``zero``, the loss of both. The Gaussian target has a
    ``floor`` too: no gradient follows the noise that moves a structure as a whole, 1 per direction.

    Args:
        potential: its backbone is trained in place.
        sigma_max: largest level, Å.
        sigma_min: smallest level, Å.
        levels: number of levels, log-uniform.
        langevin_steps: T of appendix A.6.
        efp_weight: weight of force prediction (lambda_1).
        inp_weight: weight of noise-scale prediction (lambda_2).
        target: ``riemann``, ``gaussian`` or ``distance``; the last one is for molecules and learns no energy.
        shape: of the molecules, 1 (rod) to 3 (ball), for reading a Riemannian target as forces; 2.1 is the
            median over QM9, and the size of forces depends little on it.

    Raises:
        ConfigError: an option out of range.
    """

    name: ClassVar[str] = "3d-emgp"
    needs_labels: ClassVar[bool] = False
    sigmas: Tensor

    def __init__(
        self,
        potential: Potential,
        sigma_max: float = 10.0,
        sigma_min: float = 0.01,
        levels: int = 50,
        langevin_steps: int = 1,
        efp_weight: float = 1.0,
        inp_weight: float = 0.2,
        target: str = "riemann",
        shape: float = 2.1,
    ) -> None:
        super().__init__(potential)
        if langevin_steps < 1:
            raise ConfigError(f"3d-emgp: langevin_steps={langevin_steps}; give at least 1")
        if not (efp_weight >= 0 and inp_weight >= 0 and 0 < efp_weight + inp_weight < float("inf")):
            raise ConfigError("3d-emgp: weights must be finite, not negative, nor both zero")
        if target not in TARGETS:
            raise ConfigError(f"3d-emgp: unknown target {target!r}; known: {', '.join(TARGETS)}")
        if not 1 <= shape <= 3:
            raise ConfigError(f"3d-emgp: shape={shape} must lie between 1 (a rod) and 3 (a ball)")
        self.langevin_steps, self.efp_weight, self.inp_weight = langevin_steps, efp_weight, inp_weight
        self.register_buffer("sigmas", noise_levels(sigma_max, sigma_min, levels), persistent=False)
        n_features = potential.backbone.n_features
        self.energy_head = PooledEnergy(n_features, shape if target == "riemann" else None)
        self.level_head = _perceptron(2 * n_features, n_features, levels)
        self.target = target
        self.distance_head = DistanceScore(n_features) if target == "distance" else None

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds ``efp``, ``inp``, references."""
        graph = graph_of(sample)
        noisy, level = self.draw(sample, generator)
        sigma = self.sigmas[level].to(graph.pos)
        if self.distance_head is None:
            pooled_noisy, error, size = self._forces(graph, noisy, sigma)
        else:
            pooled_noisy, error, size = self._distances(self.distance_head, graph, noisy, sigma)
        pooled = self.energy_head.pool(self.network.features(graph), graph)
        entropy = nn.functional.cross_entropy(self.logits(pooled, pooled_noisy), level, reduction="none")
        terms = {
            "efp": mean_over(error, sample, "n_graphs"),
            "inp": mean_over(entropy, sample, "n_graphs"),
            "efp_zero": mean_over(size, sample, "n_graphs"),
            "inp_chance": entropy.new_full((), math.log(len(self.sigmas))),
        }
        if self.target == "gaussian":
            terms["floor"] = error.new_full((), 3 * self.efp_weight)
        return {
            "loss": self.efp_weight * terms["efp"] + self.inp_weight * terms["inp"],
            "zero": self.efp_weight * terms["efp_zero"] + self.inp_weight * terms["inp_chance"],
            **terms,
        }

    def _forces(self, graph: Graph, noisy: Graph, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u of the noisy structures ``[B, F]``, squared error and square of the target ``[B]``."""
        with torch.enable_grad():
            pooled, _, force = self.energy_head(self.network, noisy)
        if self.target == "gaussian":
            target = (graph.pos - noisy.pos) / sigma[graph.batch].unsqueeze(1)
        else:
            target = riemann_gaussian_target(noisy.pos, graph.pos, sigma, graph.batch)
        target = target.to(force)
        return pooled, self._squares(force - target, graph), self._squares(target, graph)

    def _distances(
        self, head: DistanceScore, graph: Graph, noisy: Graph, sigma: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of changes of distances, means over the pairs of each structure."""
        pairs, features = all_pairs(graph), self.network.features(noisy)
        of_pair, now = graph.batch[pairs[0]], distances(noisy.pos, pairs)
        target = ((now - distances(graph.pos, pairs)) / sigma[of_pair]).to(features.scalars)
        error = head(now, features.scalars, pairs) - target
        count = torch.bincount(of_pair, minlength=graph.n_graphs).clamp_min(1)
        means = [
            value.new_zeros(graph.n_graphs).index_add(0, of_pair, value.square()) / count
            for value in (error, target)
        ]
        return self.energy_head.pool(features, noisy), means[0], means[1]

    @staticmethod
    def _squares(vectors: Tensor, graph: Graph) -> Tensor:
        """Return the sum of squares over the atoms of each structure ``[B]``."""
        squares = vectors.square().sum(-1)
        return squares.new_zeros(graph.n_graphs).index_add(0, graph.batch, squares)

    def draw(self, sample: Sample | Graph, generator: torch.Generator) -> tuple[Graph, Tensor]:
        """Return the noisy graph and the level of each structure, int64 ``[B]``."""
        graph = graph_of(sample)
        counts = torch.bincount(graph.batch, minlength=graph.n_graphs).tolist()
        streams = FrameGenerators(generator, index_of(sample), graph.n_graphs)
        picks = torch.cat(streams.uniform([1] * graph.n_graphs))
        level = (picks * len(self.sigmas)).long().to(graph.pos.device)
        unit = [
            streams.normal(counts, graph.pos.dtype).to(graph.pos.device) for _ in range(self.langevin_steps)
        ]
        pos = riemann_gaussian_noise(graph.pos, graph.batch, self.sigmas[level], unit)
        return displaced(graph, pos - graph.pos, self.network.cutoff), level

    def logits(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """Return the scores of the levels ``[B, L]`` from the graph-level vectors ``[B, F]`` of both."""
        return self.level_head(torch.cat([clean, noisy], dim=-1))

    def potential(self, kT: float | None = None, sigma: float | None = None) -> Learned:
        """Return the energy of force prediction as a potential: forces are ``c (kT / sigma) F``.

        ``-sigma c F`` is the predicted displacement in Å: c is 1 with ``target="gaussian"``, and with
        ``target="riemann"`` that of :func:`~ffpretrain.noise.riemann_gaussian_slope`, the best number over
        all directions.

        With ``target="distance"`` there is none: then it is a field that pulls distances back, by
        ``kT / sigma`` times their predicted change in units of sigma, along the lines between atoms.

        Args:
            kT: eV; None takes 300 K.
            sigma: Å, the level the score is read at; None takes the geometric mean of the levels. It sets the
                unit alone, since the network is not told the level.
        """
        level = float((self.sigmas[0] * self.sigmas[-1]).sqrt()) if sigma is None else sigma
        scale = force_scale(kT, level) * level
        if self.distance_head is not None:
            return DistanceField(
                copy.deepcopy(self.network), copy.deepcopy(self.distance_head), -scale
            ).eval()
        return PooledPotential(copy.deepcopy(self.network), copy.deepcopy(self.energy_head), scale).eval()
