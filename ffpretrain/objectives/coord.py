"""Coordinate denoising (Zaidi et al. 2022, "Pre-training via denoising for molecular property prediction").

Every atom is displaced by Gaussian noise, ``x~ = x + sigma eps``; the network predicts ``eps`` from ``x~``.
The best answer is ``-sigma grad log p_sigma(x~)``, the score of the smoothed data (Tweedie; Vincent 2011), so
for structures at thermal equilibrium the network learns the force field up to ``-sigma / kT``, label-free.

For displacements ``u`` from a harmonic minimum with thermal covariance ``C = kT H^-1`` the optimum is
``sigma (C + sigma^2 I)^-1 u~``, which tends to ``-(sigma / kT) F`` as sigma goes to 0. An equivariant network
cannot see the part of the noise that moves or turns the molecule as a whole: see :func:`rigid_body_floor`.

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
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.heads import VectorHead
from ffpretrain.noise import gaussian_noise
from ffpretrain.objectives.base import Objective, displaced, graph_of, index_of, mean_over
from ffpretrain.objectives.fields import DenoisingField, force_scale
from ffpretrain.potential import Potential

__all__ = ["Coord", "rigid_body_floor"]

HEADS = ("vector", "energy-gradient")
#: Å, root mean square distance from its axis below which a molecule counts as linear
_LINEAR = 0.01


def rigid_body_floor(n_atoms: int, linear: bool = False) -> float:
    """Return the smallest loss any E(3)-equivariant denoiser reaches on a molecule in vacuum.

    Displacements along rigid motions cannot be told from the noisy structure, so their share of the noise
    stays as error: ``6 / (3 N)`` per component in units of the noise variance, ``5 / (3 N)`` for a linear
    molecule, ``3 / 3`` for an atom. Holds for small noise that is neither centred nor aligned, whatever its
    size on each atom. A loss below it over many structures is a leak or an error.

    Args:
        n_atoms: number of atoms N.
        linear: all atoms on a line; two atoms always are.

    Raises:
        ConfigError: no atoms.
    """
    if n_atoms < 1:
        raise ConfigError(f"rigid_body_floor: n_atoms={n_atoms}; give at least 1")
    modes = 3 if n_atoms == 1 else 5 if linear or n_atoms == 2 else 6
    return modes / (3 * n_atoms)


def batch_floor(graph: Graph) -> Tensor:
    """Return the rigid modes of a batch over its number of components: the floor of its mean loss.

    A lattice vector keeps the structure from turning, but for turns about the vector itself where it is the
    only one.
    """
    count = atoms_per_graph(graph)
    pos = graph.pos.to(torch.float64)
    mean = pos.new_zeros(graph.n_graphs, 3).index_add(0, graph.batch, pos) / count.unsqueeze(1)
    off = pos - mean[graph.batch]
    outer = off.unsqueeze(2) * off.unsqueeze(1)
    gyration = pos.new_zeros(graph.n_graphs, 3, 3).index_add(0, graph.batch, outer) / count.view(-1, 1, 1)
    spread = torch.linalg.eigvalsh(gyration)
    # distance from the axis takes the two smaller moments, from the centre all three
    turns = torch.full_like(count, 3)
    turns[spread[:, :2].sum(1) < _LINEAR**2] = 2
    turns[spread.sum(1) < _LINEAR**2] = 0
    vectors = (graph.cell != 0).any(2).sum(1)
    turns = torch.where(vectors == 0, turns, (vectors == 1).to(turns))
    return (3 + turns).sum() / (3 * count.sum())


class Coord(Objective):
    """Coordinate denoising; registry name ``coord``. Needs no labels.

    Reports ``floor`` beside the loss: what is left of the loss for a perfect equivariant denoiser on the same
    batch. A prediction of zero has a loss of 1.

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
            raise ConfigError(f"coord: sigma={sigma} must be above zero; give it in Å")
        if head not in HEADS:
            raise ConfigError(f"coord: unknown head {head!r}; known: {', '.join(HEADS)}")
        backbone = potential.backbone
        if head == "vector" and not backbone.has_vectors:
            raise ConfigError(
                f"coord: head='vector' needs vector features, which backbone {backbone.name!r} lacks; "
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
        """See :class:`~ffpretrain.objectives.base.Objective`; adds the term ``floor``."""
        graph = graph_of(sample)
        noise = gaussian_noise(
            graph.batch, graph.n_graphs, self.sigma, generator, index_of(sample), graph.pos.dtype
        )
        shift = noise.displacement
        if self.rebuild_edges:
            noisy = displaced(graph, shift, self.network.cutoff)
        else:
            noisy = graph._replace(pos=graph.pos + shift)
        target = (shift / self.sigma).to(self.network.dtype)
        error = (self.predict(noisy) - target).square().mean(-1)
        return {"loss": mean_over(error, sample, "n_atoms"), "floor": batch_floor(graph).to(error)}

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
