"""SliDe: sliced denoising of bonds, angles and torsions (Ni et al. 2024, ICLR).

The energy of a molecule near its equilibrium ``x0`` is taken as that of a classical force field, quadratic in
all bond lengths, angles and torsions q, each with a standard deviation ``sigma_k`` in place of a stiffness:

    ``E(x) / kT = sum_k (q_k(x) - q_k(x0))^2 / (2 sigma_k^2)``

Bonds, angles and torsions are disturbed by normal draws of these sizes (BAT noise), and the network learns
``grad E / kT`` of the noisy structure. The matrix ``dq/dx`` is spared by slicing: for a random direction v,

    ``<grad E / kT, v> = sum_k (dq_k / sigma_k^2) dq_k[v]``,

where ``dq_k[v]``, the derivative of one coordinate along v, can be a finite difference. Since
``E[v v^T] = I``, the mean squared error of the slices is that of the force. As in the published code, the
force is solved for from ``directions`` slices by least squares: exactly where there are as many as
components, else the shortest solution, its projection on the directions drawn, whose mean is
``directions / 3N`` of the force.

What the paper leaves open or its code does otherwise, and what is chosen here: all bonds, angles and torsions
count, rings included, where the code leaves out rings and takes some angles and torsions at random; nearly
straight angles and torsions as in :mod:`ffpretrain.internal_coordinates`; there are no improper torsions, so
nothing keeps an atom with three neighbours planar but its torsions. Noise is drawn for every coordinate at
once. Rotatable bonds are turned by the mean of the draws of their torsions, weighted by ``1 / sigma^2``, as
the force field would; the rest moves atoms by a least-squares fit of the draws, damped so that no soft mode
moves far. Angles are drawn in radians; the code draws them in degrees (``angular_noise: 0.01745``), but
divides them by variances in radians. Frad's term, which the code adds, is left out. The target is in units of
``1 / sigma`` of a bond; noisy structures with large forces are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.bat_energy import BATEnergy, springs_of
from ffpretrain.bat_widths import Widths
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.molecules import MoleculeCache
from ffpretrain.noise import FrameGenerators
from ffpretrain.objectives.base import graph_of, index_of, mean_over
from ffpretrain.objectives.coord import Coord
from ffpretrain.potential import Potential

__all__ = ["SliDe", "solve_slices"]

DERIVATIVES = ("exact", "finite-difference")


def solve_slices(directions: Tensor, slices: Tensor) -> Tensor:
    """Return the vector f ``[D]`` with ``directions @ f = slices``, of least squares or of least length.

    Args:
        directions: ``[M, D]``, in general position.
        slices: ``[M]``.
    """
    if len(directions) >= directions.shape[1]:
        q, r = torch.linalg.qr(directions)
        return torch.linalg.solve_triangular(r, (q.T @ slices).unsqueeze(1), upper=True).squeeze(1)
    q, r = torch.linalg.qr(directions.T)
    return q @ torch.linalg.solve_triangular(r.T, slices.unsqueeze(1), upper=False).squeeze(1)


class SliDe(Coord):
    """Sliced denoising; registry name ``slide``. Needs no labels; molecules only.

    Reports beside the loss ``zero``, what a prediction of zero costs on the same batch, and ``unbonded``, the
    fraction of structures without a bond, of which nothing can be learned.

    Args:
        potential: its backbone is trained in place; its energy head too where ``head`` says so.
        widths: standard deviations of bonds in Å, angles and torsions in radians: what differs from the
            generic ones, or a file with it; see :class:`~ffpretrain.bat_widths.Widths`.
        directions: random directions the force of each structure is solved for from; None takes the force.
        derivative: of the coordinates along a direction: ``exact`` or ``finite-difference``.
        step: of the finite difference, Å.
        angular_noise: factor on the noise of angles and torsions, not on their widths in the energy.
        head: as in :class:`~ffpretrain.objectives.coord.Coord`.
        rebuild_edges: as in :class:`~ffpretrain.objectives.coord.Coord`.

    Raises:
        ConfigError: an option out of range, a table that is wrong, or a direct head on a backbone without
            vector features.
    """

    name: ClassVar[str] = "slide"

    def __init__(
        self,
        potential: Potential,
        widths: Mapping[str, Any] | str | Path | None = None,
        directions: int | None = 128,
        derivative: str = "exact",
        step: float = 0.001,
        angular_noise: float = 1.0,
        head: str = "vector",
        rebuild_edges: bool = True,
    ) -> None:
        self.widths = Widths(widths)
        super().__init__(potential, self.widths.generic["bond"], head, rebuild_edges)
        if directions is not None and directions < 1:
            raise ConfigError(f"slide: directions={directions}; give at least 1, or null for the whole force")
        if derivative not in DERIVATIVES:
            raise ConfigError(f"slide: unknown derivative {derivative!r}; known: {', '.join(DERIVATIVES)}")
        if not 0 < step < float("inf"):
            raise ConfigError(f"slide: step={step} must be above zero; give it in Å")
        if not 0 < angular_noise < float("inf"):
            raise ConfigError(f"slide: angular_noise={angular_noise} must be above zero; 1 is the full size")
        self.directions, self.angular_noise = directions, angular_noise
        self.step = step if derivative == "finite-difference" else None
        self._springs = MoleculeCache(partial(springs_of, self.widths))

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds ``zero`` and ``unbonded``.

        Raises:
            UnsupportedInputError: a periodic structure.
            DataError: bonds or torsions in the extras that do not fit.
        """
        graph = graph_of(sample)
        springs = self._springs(sample)
        energy = BATEnergy(graph, springs)
        streams = FrameGenerators(generator, index_of(sample), graph.n_graphs)
        counts = [s.terms.size for s in springs]
        pos = energy.noisy(
            streams.normal(counts, torch.float64, 1).squeeze(1).split(counts), self.angular_noise
        )
        target = (self.sigma * self.target(energy, pos, streams)).to(self.network.dtype)
        error = (self.predict(self.moved(graph, pos - energy.clean)) - target).square().mean(-1)
        bare = torch.tensor([s.terms.size == 0 for s in springs]).to(error)
        return {
            "loss": mean_over(error, sample, "n_atoms"),
            "zero": mean_over(target.square().mean(-1), sample, "n_atoms"),
            "unbonded": mean_over(bare, sample, "n_graphs"),
        }

    def target(self, energy: BATEnergy, pos: Tensor, streams: FrameGenerators) -> Tensor:
        """Return ``grad E / kT`` in 1/Å ``[N, 3]``, or what the slices tell of it.

        Args:
            energy: of the batch.
            pos: noisy positions ``[N, 3]``.
            streams: draw the directions.
        """
        if self.directions is None:
            return energy.gradient(pos)
        drawn = streams.normal(energy.q.counts, torch.float64, 3 * self.directions).to(pos.device)
        directions = drawn.view(-1, self.directions, 3).transpose(0, 1)
        slices = energy.slices(pos, directions, self.step)
        solved = [
            solve_slices(part.flatten(1), found).view(-1, 3)
            for part, found in zip(directions.split(energy.q.counts, dim=1), slices.T, strict=True)
        ]
        return torch.cat(solved)

    def predict(self, graph: Graph) -> Tensor:
        """Return the predicted ``grad E / kT`` of noisy structures in units of ``1 / sigma`` of a bond."""
        return super().predict(graph)

    def potential(self, kT: float | None = None, sigma: float | None = None) -> nn.Module:
        """Return the learned field as forces ``-kT`` times the predicted ``grad E / kT``.

        The energy that was learned has no unit: kT gives it one. With the generic widths, a kT of
        1 kcal/mol (0.0434 eV, 503 K) makes force constants of 300 kcal/mol/Å² for bonds and 60 kcal/mol for
        angles, those of a usual force field.

        Args:
            kT: eV; None takes 300 K.
            sigma: ignored: the sizes of the noise are part of the energy.

        Returns:
            As :meth:`Coord.potential <ffpretrain.objectives.coord.Coord.potential>`.
        """
        return super().potential(kT)
