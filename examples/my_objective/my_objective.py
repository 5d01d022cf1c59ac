"""Mass-weighted denoising: as ``coord``, but light atoms are displaced further than heavy ones, as by heat.

Atom i is displaced by ``sigma_i eps_i`` with ``sigma_i = sigma sqrt(m_H / m_i)``, and the network predicts
``eps_i``. The score is ``-eps_i / sigma_i``, so a force is ``-(kT / sigma_i)`` times the prediction.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from ase.data import atomic_masses
from torch import Tensor

from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.heads import VectorHead
from ffpretrain.noise import gaussian_noise
from ffpretrain.objectives.base import Objective, displaced, graph_of, index_of, mean_over
from ffpretrain.objectives.fields import DenoisingField, force_scale
from ffpretrain.objectives.floors import batch_floor
from ffpretrain.potential import Potential


def lightness(z: Tensor) -> Tensor:
    """Return ``sqrt(m_H / m_i)`` of atomic numbers ``[N]``."""
    masses = torch.as_tensor(atomic_masses, device=z.device)
    return (masses[1] / masses[z]).sqrt()


class MassWeighted(Objective):
    """Mass-weighted denoising; needs no labels.

    Args:
        potential: its backbone is trained in place and must have vector features.
        sigma: standard deviation of the noise on hydrogen, Å.

    Raises:
        ConfigError: sigma is not above zero, or the backbone has no vectors.
    """

    name: ClassVar[str] = "mass-weighted"
    needs_labels: ClassVar[bool] = False

    def __init__(self, potential: Potential, sigma: float = 0.1) -> None:
        super().__init__(potential)
        if not 0 < sigma < float("inf"):
            raise ConfigError(f"mass-weighted: sigma={sigma} must be above zero; give it in Å")
        self.sigma = sigma
        self.noise_head = VectorHead(potential.backbone.n_features, potential.backbone.has_vectors)

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the mean squared error per component; predicting nothing costs 1."""
        graph = graph_of(sample)
        # each structure draws by its index in the data, whatever batch it is in
        unit = gaussian_noise(graph.batch, graph.n_graphs, 1.0, generator, index_of(sample)).displacement
        shift = self.sigma * lightness(graph.z).unsqueeze(1) * unit
        noisy = displaced(graph, shift, self.network.cutoff)
        predicted = self.noise_head(self.network.features(noisy))
        error = (predicted - unit.to(predicted)).square().mean(-1)
        return {
            "loss": mean_over(error, sample, "n_atoms"),  # right over several processes, too
            "zero": error.new_ones(()),
            "floor": batch_floor(graph).to(error),  # of any noise, whatever its size on each atom
        }

    def potential(self, kT: float | None = None, sigma: float | None = None) -> DenoisingField:
        """Return what was learned as forces without an energy."""
        chosen = self.sigma if sigma is None else sigma
        head = copy.deepcopy(self.noise_head)
        return MassWeightedField(copy.deepcopy(self.network), head, force_scale(kT, chosen) * chosen).eval()


class MassWeightedField(DenoisingField):
    """Forces ``-(kT / sigma_i) eps_i``."""

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        """Evaluate a graph, as any field."""
        out = super().forward(graph, forces=forces, stress=stress)
        return {key: value / lightness(graph.z).to(value).unsqueeze(1) for key, value in out.items()}
