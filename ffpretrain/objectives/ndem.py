"""NDeM: node denoising on non-equilibrium molecules (Tang et al. 2026), beside supervised training.

A molecule off its minimum feels a force, so the displacement that was added cannot be read off one noisy
structure. The difference of forces can (eq. 13-16): ``F(X) - F(X + eps) = H eps``, close to ``c eps`` where
the Hessian is close to ``c I``. A second head ``f'`` on the shared backbone sees the noisy structure and is
trained so that ``f_i(X) - f'_i(X + eps) = eps*_i`` (eq. 17), where ``f`` are the forces of the main branch
and ``eps*`` the normalised noise; eq. 18 adds this loss to the supervised one (eq. 9).

For a harmonic minimum with thermal covariance ``C = kT H^-1``, exact main forces in units of ``s`` and the
noise over ``n``, the optimum is ``f'(X~) = -(kT / s + sigma^2 / n) (C + sigma^2 I)^-1 u~``: a multiple of the
score of the smoothed data, which tends to the force as sigma goes to 0.

What the paper leaves open, and what is chosen here (each is an option): ``eps*`` is ``eps / sigma_max``, a
constant, because a relation with one curvature c cannot hold with a sampled divisor; sigma is drawn from 50
levels, log-uniform from ``sigma_max / 50`` to ``sigma_max``, once per batch (section 4.3.2 gives neither
distribution nor range); half of the atoms are displaced; the loss runs over all atoms, as eq. 17 is written;
the main branch is not detached; losses are in units of the force RMS, in which the weight of 1 that is best
in the paper drowns the force signal and 0.003 to 0.01 helps (measured with a squared force loss; with the
unsquared ``l2`` force loss the same balance asks for more).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.heads import VectorHead
from ffpretrain.noise import Noise, masked_multiscale_noise, noise_levels
from ffpretrain.objectives.base import Drawn, graph_of, happens
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.potential import Potential

__all__ = ["NDeM", "ndem_loss"]


def ndem_loss(
    force: Tensor, noisy_force: Tensor, noise: Tensor, noise_scale: float | Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the NDeM loss, eq. 17: mean over atoms of ``|(f - f') - noise / noise_scale|^2``.

    Args:
        force: main branch on the clean structure, normalised, ``[N, 3]``.
        noisy_force: auxiliary head on the noisy structure, normalised, ``[N, 3]``.
        noise: displacement in Å ``[N, 3]``.
        noise_scale: Å, a constant such as sigma_max.
        mask: atoms to average over, bool ``[N]``; None takes all. An empty mask gives 0.
    """
    per_atom = ((force - noisy_force) - noise / noise_scale).square().sum(-1)
    if mask is None:
        return per_atom.mean()
    weight = mask.to(per_atom.dtype)
    return (per_atom * weight).sum() / weight.sum().clamp_min(1.0)


class NDeM(Supervised):
    """Supervised training with the NDeM auxiliary task; registry name ``ndem``.

    Reports ``ndem_zero`` beside the auxiliary loss: what is expected of a second head that predicts nothing,
    ``|f|^2 + 3 r E[sigma^2] / sigma_max^2`` for a fraction r of displaced atoms.

    Args:
        potential: trained in place; its backbone must have vector features.
        ndem_weight: weight of the auxiliary loss (the paper's lambda) in normalised units.
        sigma_max: largest noise and normaliser of the target, Å (paper: 0.05 is best of four).
        sigma_min: smallest noise, Å; None takes ``sigma_max / 50``.
        levels: number of noise levels.
        per_structure: draw a level for each structure (as DeNS) instead of each batch (as the paper).
        mask_ratio: fraction of atoms displaced.
        structure_ratio: fraction of each batch's structures the auxiliary task runs on; the first ones, since
            batches are shuffled. Below 1 it costs less time per step.
        batch_probability: chance that a step has the auxiliary task at all (as DeNS on OC20); below 1 it
            costs less time per step and its mean weight falls in proportion.
        only_corrupted: average over displaced atoms only.
        detach_main: keep the auxiliary loss from changing the main branch.
        **supervised: as :class:`~ffpretrain.objectives.supervised.Supervised`.

    Raises:
        ConfigError: an option out of range, or a backbone without vector features.
    """

    name: ClassVar[str] = "ndem"
    sigmas: Tensor

    def __init__(
        self,
        potential: Potential,
        ndem_weight: float = 0.005,
        sigma_max: float = 0.05,
        sigma_min: float | None = None,
        levels: int = 50,
        per_structure: bool = False,
        mask_ratio: float = 0.5,
        structure_ratio: float = 1.0,
        batch_probability: float = 1.0,
        only_corrupted: bool = False,
        detach_main: bool = False,
        energy_weight: float = 0.05,
        forces_weight: float = 1.0,
        energy_loss: str = "l1",
        forces_loss: str = "l2",
        huber_delta: float = 0.1,
        energy_per_atom: bool = False,
        main_head: str = "energy-gradient",
        strain_weight: float = 0.0,
        strain_force: float = 1.0,
        strain_probability: float = 0.25,
        strains: Sequence[str] | None = None,
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
            strain_weight,
            strain_force,
            strain_probability,
            strains,
        )
        if not 0 <= ndem_weight < float("inf"):
            raise ConfigError(f"ndem_weight={ndem_weight} must be finite and not negative")
        if not 0 <= mask_ratio <= 1:
            raise ConfigError(f"mask_ratio={mask_ratio} must lie between 0 and 1")
        if not 0 < structure_ratio <= 1:
            raise ConfigError(f"structure_ratio={structure_ratio} must lie above 0 and not exceed 1")
        if not 0 < batch_probability <= 1:
            raise ConfigError(f"batch_probability={batch_probability} must lie above 0 and not exceed 1")
        self.ndem_weight, self.sigma_max = ndem_weight, sigma_max
        self.mask_ratio, self.structure_ratio = mask_ratio, structure_ratio
        self.batch_probability = batch_probability
        self.per_structure, self.only_corrupted, self.detach_main = per_structure, only_corrupted, detach_main
        sigmas = noise_levels(sigma_max, sigma_max / 50 if sigma_min is None else sigma_min, levels)
        self.register_buffer("sigmas", sigmas, persistent=False)
        backbone = potential.backbone
        # the head draws its weights apart from the global stream, so that a weight of 0 leaves the
        # supervised run untouched, number for number
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.noise_head = VectorHead(backbone.n_features, backbone.has_vectors)
        self._noisy_force: Callable[[Graph], Tensor] | None = None

    def accelerate(self) -> None:
        """Compile both branches; see :class:`~ffpretrain.compiled.CompiledForces` for what that needs."""
        from ffpretrain.compiled import CompiledVectors

        super().accelerate()
        self._noisy_force = CompiledVectors(self.network.backbone, self.noise_head)

    def noisy_force(self, graph: Graph) -> Tensor:
        """Return the auxiliary head's output on noisy structures ``[N, 3]``, normalised."""
        if self._noisy_force is not None and self.training:
            return self._noisy_force(graph)
        return self.noise_head(self.network.backbone(graph))

    def draw_step(self, graph: Graph, index: Tensor | None, generator: torch.Generator) -> Drawn:
        """See :class:`~ffpretrain.objectives.base.Objective`; no noise where a step has no auxiliary task."""
        noise = None
        if self.ndem_weight and happens(self.batch_probability, generator):
            noise = masked_multiscale_noise(
                graph.batch,
                graph.n_graphs,
                self.sigmas,
                self.mask_ratio,
                generator,
                per_structure=self.per_structure,
                index=index,
                dtype=graph.pos.dtype,
            )
        return Drawn(noise, self.draw_strained(graph, index, generator))

    def terms_given(self, sample: Sample | Graph, drawn: Drawn) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds ``ndem``, ``ndem_zero``."""
        out = self.evaluate(graph_of(sample))
        terms = self.supervised_terms(sample, out)
        if drawn.noise is not None:
            terms = self._with_ndem(terms, sample, out["forces"], drawn.noise)
        return self.with_strain(terms, sample, drawn.strained)

    def _with_ndem(
        self, terms: dict[str, Tensor], sample: Sample | Graph, forces: Tensor, noise: Noise
    ) -> dict[str, Tensor]:
        """Return the terms of a step with the auxiliary task's among them; forces in eV/Å ``[N, 3]``."""
        graph = graph_of(sample)
        part, n_atoms = self._part(graph)
        shift, mask = noise.displacement[:n_atoms], noise.mask[:n_atoms]
        dtype = self.network.dtype
        force = (forces[:n_atoms] / self.network.scale).to(dtype)
        if self.detach_main:
            force = force.detach()
        noisy_force = self.noisy_force(self.moved(part, shift))
        terms["ndem"] = ndem_loss(
            force, noisy_force, shift.to(dtype), self.sigma_max, mask if self.only_corrupted else None
        )
        square = 3 * (noise.sigma[part.batch] / self.sigma_max).square() * mask
        expected = (force.detach().square().sum(-1) + square).to(dtype)
        weight = mask.to(dtype) if self.only_corrupted else torch.ones_like(expected)
        terms["ndem_zero"] = (expected * weight).sum() / weight.sum().clamp_min(1)
        if isinstance(sample, Sample) and "n_atoms" in sample.extras:
            # several processes: each counts by its atoms, as in mean_over
            share = len(graph.z) / sample.extras["n_atoms"]
            terms["ndem"], terms["ndem_zero"] = terms["ndem"] * share, terms["ndem_zero"] * share
        terms["loss"] = terms["loss"] + self.ndem_weight * terms["ndem"]
        return terms

    def not_parallel(self) -> str | None:
        """See :class:`~ffpretrain.objectives.base.Objective`: a part of a batch depends on its sharing."""
        if self.structure_ratio < 1 or self.only_corrupted:
            return (
                "ndem shares its loss among processes exactly only with structure_ratio: 1 and "
                "only_corrupted: false; set both, or train with one device"
            )
        return None

    def _part(self, graph: Graph) -> tuple[Graph, int]:
        """Return the structures the auxiliary task runs on (positions only) and their number of atoms."""
        n_graphs = max(1, round(self.structure_ratio * graph.n_graphs))
        if self._noisy_force is not None and self.training:
            n_atoms = n_graphs * (len(graph.z) // graph.n_graphs)  # of equal molecules
        else:
            n_atoms = int((graph.batch < n_graphs).sum())
        return (
            graph._replace(
                z=graph.z[:n_atoms],
                pos=graph.pos[:n_atoms],
                batch=graph.batch[:n_atoms],
                cell=graph.cell[:n_graphs],
                n_graphs=n_graphs,
            ),
            n_atoms,
        )
