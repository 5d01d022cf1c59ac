"""DeNS: denoising non-equilibrium structures (Liao et al. 2024, TMLR), beside supervised training.

Noise cannot be read off a noisy structure that did not start at a minimum: many clean ones lead to it. DeNS
says which one is meant by giving the network the forces of the clean structure. Some structures ``S`` of a
batch are displaced in some atoms, ``S~ = S + eps``; the network sees ``(S~, F(S))`` with the force of each
displaced atom encoded in its first features and nothing on the others, and one pass is trained on

    energy_weight |E^ - E(S)| + forces_weight mean_kept |f^ - f(S)| + dens_weight mean_moved |e^ - eps / n|

(lengths of vectors, not squared): the energy of the clean structure, forces where atoms stayed, the noise
over a constant ``n`` where they moved. The other structures are trained on as usual, without force encoding,
which is how the finished potential is evaluated.

What the paper leaves to its settings, and what is chosen here (each is an option): its MD17 values for the
noise (0.05 Å), the chance of a structure (0.25) and the share of its atoms (0.25), and the linear decay of
the weight over the run; the weight itself in units of the force RMS, where its 5 beside 80 for forces (both
over the standard deviation of energies) becomes 0.009 to 0.013 on the molecules of MD17. ``n`` is the
standard deviation, or the largest one where there are several levels, as in the published code. The published
networks take spherical harmonics of the force up to their own degree times its length, through a linear
layer; with vector features that is the force itself (degree 1) and its length (degree 0). The displaced share
of a structure is a fixed number of atoms rather than a draw for each. As published for MD17, forces of the
main loss are the gradient of the energy at the noisy positions; ``main_head="direct"`` is the way of OC20.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Features
from ffpretrain.direct import DirectPotential
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.heads import VectorHead
from ffpretrain.noise import FrameGenerators, Noise, masked_multiscale_noise, noise_levels
from ffpretrain.objectives.base import displaced, graph_of, index_of, label, regression_loss
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.potential import Potential

__all__ = ["DeNS", "ForceEncoding"]

DRAWS = ("structure", "batch")


class ForceEncoding(nn.Module):
    """The force on an atom as input features: the vector itself and its length, each times learned numbers.

    No biases, so that a force of zero is encoded as zeros.

    Args:
        n_features: F of the backbone.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.vector = nn.Linear(1, n_features, bias=False)
        self.length = nn.Linear(1, n_features, bias=False)

    def forward(self, forces: Tensor) -> Features:
        """Return scalars ``[N, F]`` and vectors ``[N, 3, F]`` of forces over the scale ``[N, 3]``."""
        length = torch.linalg.vector_norm(forces, dim=-1, keepdim=True)
        return Features(self.length(length), self.vector(forces.unsqueeze(-1)))


class DeNS(Supervised):
    """Supervised training with force-conditioned denoising; registry name ``dens``.

    Reports ``dens_zero`` beside the denoising term: the expected cost of predicting no noise, the mean length
    of the target, ``sqrt(8 / pi) E[sigma] / sigma_max``.

    Args:
        potential: trained in place; its backbone must take vectors as extra input, and is given the weights
            for them where it has none.
        dens_weight: weight of the denoising term, in units where forces are over their RMS.
        linear_decay: let the weight fall linearly to zero over the run.
        probability: chance that a structure, or the whole batch, is displaced.
        draw: what the chance is drawn for: ``structure`` (the paper on MD17) or ``batch`` (on OC20).
        mask_ratio: fraction of the atoms of a displaced structure that move.
        sigma_max: standard deviation of the noise, Å; the largest where there are several. The target is the
            noise over it.
        sigma_min: smallest noise, Å, of ``levels`` even in their logarithm, one drawn for each structure;
            None has ``sigma_max`` alone.
        levels: number of noise levels.
        **supervised: as :class:`~ffpretrain.objectives.supervised.Supervised`.

    Raises:
        ConfigError: an option out of range, or a backbone that takes no vectors.
    """

    name: ClassVar[str] = "dens"
    sigmas: Tensor

    @property
    def recordable(self) -> bool:
        """See :class:`~ffpretrain.objectives.base.Objective`: its draws and its terms are one."""
        return False

    def __init__(
        self,
        potential: Potential,
        dens_weight: float = 0.01,
        linear_decay: bool = True,
        probability: float = 0.25,
        draw: str = "structure",
        mask_ratio: float = 0.25,
        sigma_max: float = 0.05,
        sigma_min: float | None = None,
        levels: int = 50,
        energy_weight: float = 0.05,
        forces_weight: float = 1.0,
        energy_loss: str = "l1",
        forces_loss: str = "l2",
        huber_delta: float = 0.1,
        energy_per_atom: bool = False,
        main_head: str = "energy-gradient",
    ) -> None:
        super().__init__(
            potential,
            energy_weight,
            forces_weight,
            energy_loss,
            forces_loss,
            huber_delta,
            energy_per_atom,
            main_head,
        )
        if not 0 <= dens_weight < float("inf"):
            raise ConfigError(f"dens_weight={dens_weight} must be finite and not negative")
        if not 0 <= probability <= 1:
            raise ConfigError(f"probability={probability} must lie between 0 and 1")
        if not 0 < mask_ratio <= 1:
            raise ConfigError(f"mask_ratio={mask_ratio} must lie above 0 and not exceed 1")
        if draw not in DRAWS:
            raise ConfigError(f"unknown draw {draw!r}; known: {', '.join(DRAWS)}")
        self.dens_weight, self.linear_decay, self._progress = dens_weight, linear_decay, 0.0
        self.probability, self.draw, self.mask_ratio = probability, draw, mask_ratio
        self.sigma_max = sigma_max
        sigmas = noise_levels(sigma_max, *((sigma_max, 1) if sigma_min is None else (sigma_min, levels)))
        self.register_buffer("sigmas", sigmas, persistent=False)
        # what only denoising needs draws its weights apart from the global stream, so that a probability of
        # 0 leaves the supervised run untouched, number for number
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _accept_forces(potential)
            self.encoding = ForceEncoding(potential.backbone.n_features)
            self.noise_head = VectorHead(potential.backbone.n_features, potential.backbone.has_vectors)

    def at_step(self, step: int, max_steps: int) -> None:
        """See :class:`~ffpretrain.objectives.base.Objective`: sets the weight of the denoising term."""
        self._progress = min(1.0, step / max_steps)

    @property
    def current_weight(self) -> float:
        """Weight of the denoising term at this point of the run."""
        return self.dens_weight * (1 - self._progress) if self.linear_decay else self.dens_weight

    def accelerate(self) -> None:
        """Refuse: the number of displaced structures changes from step to step.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("objective 'dens' has no compiled path; set compile: false")

    def not_parallel(self) -> str | None:
        """See :class:`~ffpretrain.objectives.base.Objective`: how many atoms move is known to one process."""
        if self.probability == 0:
            return None
        return (
            "dens averages over displaced atoms, whose number no other process knows; train with one device"
        )

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds ``dens``, ``dens_zero`` where atoms
        moved.
        """
        graph = graph_of(sample)
        noise = self._draw(graph, index_of(sample), generator) if self.probability else None
        if noise is None or not bool(noise.mask.any()):
            return super().forward(sample, generator)
        noisy = displaced(graph, noise.displacement, self.network.cutoff)
        forces = label(sample, "forces") / self.network.scale
        out, predicted = self.evaluate_noisy(noisy, self.encode(forces, noise.mask))
        terms = self.supervised_terms(sample, out, ~noise.mask)
        target = (noise.displacement / self.sigma_max).to(predicted)
        terms["dens"] = regression_loss("l2", (predicted - target)[noise.mask]).mean()
        level = (noise.sigma / self.sigma_max)[graph.batch][noise.mask].to(predicted)
        # the mean length of a standard normal vector
        terms["dens_zero"] = (8 / torch.pi) ** 0.5 * level.mean()
        terms["loss"] = terms["loss"] + self.current_weight * terms["dens"]
        return terms

    def encode(self, forces: Tensor, moved: Tensor) -> Features:
        """Return the input features of forces over the scale ``[N, 3]``: zeros but for atoms that moved."""
        known = torch.where(moved.unsqueeze(-1), forces, 0.0).to(self.network.dtype)
        return self.encoding(known)

    def evaluate_noisy(self, noisy: Graph, initial: Features) -> tuple[dict[str, Tensor], Tensor]:
        """Return energies and forces as a potential does, and the predicted noise over its constant.

        Args:
            noisy: structures with displaced atoms.
            initial: the encoded forces of the clean structures.

        Returns:
            ``energy [B]`` eV and ``forces [N, 3]`` eV/Å at the noisy positions, and ``[N, 3]``.
        """
        network = self.network
        network.check_elements(noisy.z)
        if self.force_head is not None:
            features = network.backbone(noisy, initial)
            return DirectPotential(network, self.force_head).read(features, noisy), self.noise_head(features)
        with torch.enable_grad():
            pos = noisy.pos.detach().requires_grad_(True)
            features = network.backbone(noisy._replace(pos=pos), initial)
            energies = network.atomic_energies(features, noisy.z)
            energy = energies.new_zeros(noisy.n_graphs).index_add(0, noisy.batch, energies) + network.shift
            (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        return {"energy": energy, "energies": energies, "forces": -gradient}, self.noise_head(features)

    def _draw(self, graph: Graph, index: Tensor | None, generator: torch.Generator) -> Noise:
        """Return displacements that are zero on structures that chance leaves alone."""
        if self.draw == "batch":
            chance = torch.rand((1,), generator=generator, device=generator.device, dtype=torch.float64)
            chances = chance.expand(graph.n_graphs)
        else:
            streams = FrameGenerators(generator, index, graph.n_graphs)
            chances = torch.cat(streams.uniform([1] * graph.n_graphs))
        noise = masked_multiscale_noise(
            graph.batch,
            graph.n_graphs,
            self.sigmas,
            self.mask_ratio,
            generator,
            per_structure=True,
            index=index,
            dtype=graph.pos.dtype,
        )
        mask = noise.mask & (chances.to(noise.mask.device) < self.probability)[graph.batch]
        return Noise(noise.displacement * mask.unsqueeze(-1), noise.sigma, mask)


def _accept_forces(potential: Potential) -> None:
    """Let the backbone take forces as input.

    Raises:
        ConfigError: it takes no vectors.
    """
    try:
        potential.backbone.accept_vectors()
    except ConfigError as error:
        raise ConfigError(
            f"dens tells the network the forces of the clean structure, which are vectors: {error}"
        ) from None
