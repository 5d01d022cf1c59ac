"""Frad: fractional denoising with rotation noise (Feng et al. 2023, ICML; 2024, Nature Machine Intelligence).

Two kinds of noise, of which the network is asked for the second alone. Every rotatable bond is turned by a
normal angle of standard deviation ``s``, which takes x to ``x_a``; then every atom is displaced as in
:mod:`~ffpretrain.objectives.coord`, ``x~ = x_a + tau eps``, and the network predicts ``eps``.

Since the second noise is isotropic whatever ``x_a``, the best answer is again ``-tau grad log p(x~)``, now of
the density after both noises. Around a minimum with thermal covariance C and for small turns, ``J psi`` with
``psi ~ N(0, s^2 I)``, that is ``tau (tau^2 I + s^2 J J^T + C)^-1 u~``: a force field that is soft along
torsions and stiff across them, where coordinate noise alone has one stiffness for all.

What the paper leaves open or its code does otherwise, and what is chosen here: the target is ``eps``, the
loss, the edges and the head are those of ``coord``; bonds are turned one after the other, the smaller side
moves (which side, changes the result by a rigid motion only); a bond can be turned where it is single, in no
ring, both its atoms have further neighbours, hydrogens included, and neither has a triple bond, the code's
pattern. Structures without such a bond get coordinate noise alone, as in the code. The defaults are those for
QM9; for MD17 the code has ``sigma: 0.4`` (0.04 in the first paper) when pretraining.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.molecules import Molecule, MoleculeCache, Rotors, turn_bonds
from ffpretrain.noise import FrameGenerators, gaussian_noise
from ffpretrain.objectives.base import graph_of, index_of, mean_over
from ffpretrain.objectives.coord import Coord
from ffpretrain.potential import Potential

__all__ = ["Frad"]


class Frad(Coord):
    """Fractional denoising; registry name ``frad``. Needs no labels; molecules only.

    Reports ``plain`` beside what ``coord`` reports: the fraction of structures without a bond to turn.

    Args:
        potential: its backbone is trained in place; its energy head too where ``head`` says so.
        dihedral_sigma_degrees: standard deviation of the turn of each rotatable bond, degrees.
        sigma: standard deviation of the coordinate noise, the paper's tau, Å.
        head: as in :class:`~ffpretrain.objectives.coord.Coord`.
        rebuild_edges: as in :class:`~ffpretrain.objectives.coord.Coord`.

    Raises:
        ConfigError: an option out of range, or a direct head on a backbone without vector features.
    """

    name: ClassVar[str] = "frad"

    def __init__(
        self,
        potential: Potential,
        dihedral_sigma_degrees: float = 2.0,
        sigma: float = 0.04,
        head: str = "vector",
        rebuild_edges: bool = True,
    ) -> None:
        super().__init__(potential, sigma, head, rebuild_edges)
        if not 0 <= dihedral_sigma_degrees < float("inf"):
            raise ConfigError(
                f"frad: dihedral_sigma_degrees={dihedral_sigma_degrees} must be finite and not negative"
            )
        self.dihedral_sigma_degrees = dihedral_sigma_degrees
        self._rotors = MoleculeCache(_rotors_of)

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds ``plain``, ``zero`` and ``floor``.

        Raises:
            UnsupportedInputError: a periodic structure.
            DataError: bonds or torsions in the extras that do not fit.
        """
        graph = graph_of(sample)
        noise = gaussian_noise(
            graph.batch, graph.n_graphs, self.sigma, generator, index_of(sample), graph.pos.dtype
        )
        # a draw of its own after that of coord: without turns the loss is coord's, bit for bit
        turned, plain = self.turned(sample, FrameGenerators(generator, index_of(sample), graph.n_graphs))
        terms = self.denoising_terms(sample, turned, noise.displacement)
        return {**terms, "plain": mean_over(plain.to(terms["loss"]), sample, "n_graphs")}

    def turned(self, sample: Sample | Graph, streams: FrameGenerators) -> tuple[Graph, Tensor]:
        """Return the structures with their rotatable bonds turned, x_a, and which have none, bool ``[B]``.

        The edges stay those of the clean positions.

        Args:
            sample: the batch.
            streams: of its structures.
        """
        graph, rotors = graph_of(sample), self._rotors(sample)
        turns = [len(found.axes) for found in rotors]
        angles = math.radians(self.dihedral_sigma_degrees) * streams.normal(turns, torch.float64, 1).squeeze(
            1
        )
        pos = turn_bonds(graph.pos, rotors, atoms_per_graph(graph).tolist(), angles.to(graph.pos.device))
        return graph._replace(pos=pos), torch.tensor(turns, device=pos.device) == 0

    def potential(self, kT: float | None = None, sigma: float | None = None) -> nn.Module:
        """Return the learned field as forces: ``-(kT / tau^2)`` times the predicted displacement.

        Args:
            kT: temperature of the data in eV; None takes 300 K.
            sigma: Å; None takes the coordinate noise it was trained with, tau.

        Returns:
            As :meth:`Coord.potential <ffpretrain.objectives.coord.Coord.potential>`; the forces are those of
            the density after both noises, softer along torsions by the turns that were made.
        """
        return super().potential(kT, sigma)


def _rotors_of(molecule: Molecule) -> Rotors:
    return molecule.rotors
