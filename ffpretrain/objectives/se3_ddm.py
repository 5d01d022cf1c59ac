"""SE(3)-DDM: denoising of distances between two views (SE(3)-DDM, also GeoSSL-DDM, section 4).

The views are a structure and a copy displaced by Gaussian noise. Distances ``d`` of one view are disturbed
once more, ``d~ = d + sigma xi``, and scored with the help of the other view's features (eq. 7-8):

    ``s(d~, g)_ij = MLP(MLP(d~_ij), h(g)_i + h(g)_j)``
    ``l(g -> d) = sigma^beta |s / sigma - (d - d~) / sigma^2|^2 / 2 = sigma^(beta - 2) |s + xi|^2 / 2``

summed over all pairs of atoms, mean over structures and over the two directions (eq. 9), each with its own
head.

What the paper leaves open or its code does otherwise, and what is chosen here: one level for each structure
and direction, drawn from all, as in the code (``all_levels=True`` takes the mean over all of them, as eq. 9
is written, each with its own draw); beta is 2, which weighs all levels alike (the grid
is 0.05 to 10, the choice not reported); ``mask_ratio`` is 0 (the grid is 0 and 0.3): above it, both views
keep the same connected part of the atoms, found by breadth-first search over bonds from a random atom; the
view's edges are its own (``rebuild_edges=False`` keeps the clean ones, as the code). Disturbed distances may
be negative, and the head is not told the level. All pairs count, whatever their distance.

Not knowing the level costs: :func:`unknown_level_floor` is what a head pays that knows every distance.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.molecules import MoleculeCache, neighbour_lists
from ffpretrain.noise import FrameGenerators, noise_levels
from ffpretrain.objectives.base import Objective, displaced, graph_of, index_of, mean_over
from ffpretrain.objectives.fields import Learned, force_scale
from ffpretrain.objectives.subgraphs import connected_part, part_of
from ffpretrain.potential import Potential

__all__ = [
    "SE3DDM",
    "DistanceField",
    "DistanceScore",
    "all_pairs",
    "distance_score_loss",
    "distances",
    "pair_forces",
    "unknown_level_floor",
]


def all_pairs(graph: Graph) -> Tensor:
    """Return every unordered pair of atoms of the same structure once, int64 ``[2, P]``.

    Raises:
        UnsupportedInputError: a periodic structure, whose pairs have no one distance.
    """
    if bool((graph.cell != 0).any()):
        raise UnsupportedInputError(
            "se3-ddm scores distances within molecules; periodic structures have none"
        )
    pairs, start = [], 0
    for n in torch.bincount(graph.batch, minlength=graph.n_graphs).tolist():
        pairs.append(torch.triu_indices(n, n, 1, device=graph.z.device) + start)
        start += n
    return torch.cat(pairs, dim=1)


def distances(pos: Tensor, pairs: Tensor) -> Tensor:
    """Return the distance of each pair in Å ``[P]``."""
    return (pos[pairs[0]] - pos[pairs[1]]).norm(dim=1)


def pair_forces(score: Tensor, pos: Tensor, pairs: Tensor) -> Tensor:
    """Return the score of the positions from that of the distances, eq. 5, ``[N, 3]``.

    ``sum_j s_ij (r_i - r_j) / d_ij``: no net force and no net torque, whatever the scores.

    Args:
        score: of each pair ``[P]``.
        pos: ``[N, 3]`` Å.
        pairs: as :func:`all_pairs`.
    """
    vector = pos[pairs[0]] - pos[pairs[1]]
    pull = score.to(pos).unsqueeze(1) * vector / vector.norm(dim=1, keepdim=True)
    return torch.zeros_like(pos).index_add(0, pairs[0], pull).index_add(0, pairs[1], -pull)


def distance_score_loss(score: Tensor, xi: Tensor, sigma: Tensor, beta: float = 2.0) -> Tensor:
    """Return ``sigma^(beta - 2) (s + xi)^2 / 2``, eq. 9 for each pair, in the shape of the arguments.

    That is ``sigma^beta (s / sigma - (d - d~) / sigma^2)^2 / 2`` with ``d~ = d + sigma xi``.

    Args:
        score: s, of disturbed distances.
        xi: standard normal numbers they were disturbed by.
        sigma: level of each, Å.
        beta: exponent of the weight of a level.
    """
    return 0.5 * sigma.pow(beta - 2) * (score + xi).square()


def unknown_level_floor(sigmas: Tensor, beta: float) -> float:
    """Return the least loss of a pair for a head that knows its distance but not the level of the noise.

    With ``u = d~ - d = sigma xi`` known, weights ``w = sigma^(beta - 2)`` and all levels equally likely, the
    best score is ``-E[w xi | u] / E[w | u]``, at a loss of ``(E[w] - E[E[w xi | u]^2 / E[w | u]]) / 2``. With
    a single level it is 0.

    Args:
        sigmas: levels, Å ``[L]``.
        beta: exponent of the weights.
    """
    level = sigmas.to("cpu", torch.float64)
    low, high = float(level.min().log10()), float(level.max().log10())
    # one side of u; the density is even, and smooth over the logarithm
    u = torch.logspace(low - 6, high + 1.5, 20_001, dtype=torch.float64).unsqueeze(1)
    density = (-0.5 * (u / level).square()).exp() / (level * (2 * torch.pi) ** 0.5 * len(level))
    weighted = density * level.pow(beta - 2)
    first, total = (weighted * u / level).sum(1), weighted.sum(1)
    explained = torch.where(total > 0, first.square() / total, 0.0) * u.squeeze(1)
    known = 2 * float(torch.trapezoid(explained, u.squeeze(1).log()))
    return max(0.0, 0.5 * (float(level.pow(beta - 2).mean()) - known))


class DistanceScore(nn.Module):
    """Score of disturbed distances given features, eq. 8.

    Args:
        n_features: F of the backbone.
    """

    def __init__(self, n_features: int) -> None:
        super().__init__()
        n = n_features
        self.distance = nn.Sequential(nn.Linear(1, n), nn.SiLU(), nn.Linear(n, 1))
        self.out = nn.Sequential(
            nn.Linear(n + 1, n), nn.SiLU(), nn.Linear(n, n // 2), nn.SiLU(), nn.Linear(n // 2, 1)
        )

    def forward(self, distance: Tensor, scalars: Tensor, pairs: Tensor) -> Tensor:
        """Return s ``[P]``.

        Args:
            distance: disturbed, Å ``[P]``.
            scalars: features of the other view ``[N, F]``.
            pairs: as :func:`all_pairs`.
        """
        both = scalars[pairs[0]] + scalars[pairs[1]]
        own = self.distance(distance.to(scalars).unsqueeze(1))
        return self.out(torch.cat([own, both], dim=1)).squeeze(1)


class DistanceField(Learned):
    """Scores of a structure's own distances as forces; without an energy, since the scores are no gradient.

    Args:
        network: its backbone and elements are used.
        head: scores distances.
        factor: eV/Å per unit of the score.
        card: what is known of a trained model.
    """

    conservative: ClassVar[bool] = False
    has_energy: ClassVar[bool] = False
    head_name: ClassVar[str] = "distance-score"
    head_class: ClassVar[type[nn.Module]] = DistanceScore

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        """Return ``forces [N, 3]`` eV/Å in the precision of ``graph.pos``, detached; nothing without forces.

        Args:
            graph: molecules.
            forces: False leaves them out.
            stress: must not be asked for.

        Raises:
            UnsupportedInputError: an element the model never saw, or a periodic structure.
            ConfigError: a stress is asked for.
        """
        if stress:
            raise ConfigError("a field of distance scores has no stress")
        if not forces:
            return {}
        pairs = all_pairs(graph)
        with torch.no_grad():
            score = self.head(distances(graph.pos, pairs), self.features(graph).scalars, pairs)
            return {"forces": self.factor.to(graph.pos) * pair_forces(score, graph.pos, pairs)}


class SE3DDM(Objective):
    """SE(3)-DDM pretraining; registry name ``se3-ddm``. Needs no labels.

    Reports beside the loss what to read it against: ``zero``, the expected loss of scores of zero, and
    ``floor``, that of a head that knows all distances but not the level.

    Args:
        potential: its backbone is trained in place.
        view_sigma: standard deviation of the second view's displacements, Å.
        sigma_max: largest level of the noise on distances, Å.
        sigma_min: smallest level, Å.
        levels: number of levels, log-uniform.
        beta: exponent of the weight of a level (annealing factor).
        mask_ratio: fraction of each structure's atoms that both views leave out.
        all_levels: disturb each distance at all levels and take the mean, instead of at one for a structure.
        rebuild_edges: find neighbours anew for the second view; False keeps the clean ones.

    Raises:
        ConfigError: an option out of range.
    """

    name: ClassVar[str] = "se3-ddm"
    needs_labels: ClassVar[bool] = False
    sigmas: Tensor

    def __init__(
        self,
        potential: Potential,
        view_sigma: float = 0.3,
        sigma_max: float = 10.0,
        sigma_min: float = 0.01,
        levels: int = 50,
        beta: float = 2.0,
        mask_ratio: float = 0.0,
        all_levels: bool = False,
        rebuild_edges: bool = True,
    ) -> None:
        super().__init__(potential)
        if not 0 < view_sigma < float("inf"):
            raise ConfigError(f"se3-ddm: view_sigma={view_sigma} must be above zero; give it in Å")
        if not abs(beta) < float("inf"):
            raise ConfigError(f"se3-ddm: beta={beta} must be finite")
        if not 0 <= mask_ratio < 1:
            raise ConfigError(f"se3-ddm: mask_ratio={mask_ratio} must be at least 0 and below 1")
        self.view_sigma, self.beta, self.rebuild_edges = view_sigma, beta, rebuild_edges
        self.mask_ratio, self.all_levels = mask_ratio, all_levels
        self._neighbours = MoleculeCache(lambda found: neighbour_lists(len(found.numbers), found.bonds))
        self.register_buffer("sigmas", noise_levels(sigma_max, sigma_min, levels), persistent=False)
        #: scores the clean view's distances from the displaced view, and the other way round
        self.score_clean = DistanceScore(potential.backbone.n_features)
        self.score_noisy = DistanceScore(potential.backbone.n_features)
        #: loss of a pair whose score is zero, and the least loss of a pair, both over all levels
        self.pair_zero = 0.5 * float(self.sigmas.pow(beta - 2).mean())
        self.pair_floor = unknown_level_floor(self.sigmas, beta)

    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """See :class:`~ffpretrain.objectives.base.Objective`; adds the directions ``clean`` and ``noisy``,
        and references.
        """
        graph = graph_of(sample)
        streams = FrameGenerators(generator, index_of(sample), graph.n_graphs)
        if self.mask_ratio:
            draws = streams.uniform(torch.bincount(graph.batch, minlength=graph.n_graphs).tolist())
            chosen = connected_part(graph, 1 - self.mask_ratio, draws, self._neighbours(sample))
            graph = part_of(graph, chosen)
        pairs = all_pairs(graph)
        counts = torch.bincount(graph.batch, minlength=graph.n_graphs).tolist()
        device, dtype = graph.pos.device, graph.pos.dtype
        shift = self.view_sigma * streams.normal(counts, dtype).to(device)
        if self.rebuild_edges:
            view = displaced(graph, shift, self.network.cutoff)
        else:
            view = graph._replace(pos=graph.pos + shift)
        sigma, xi = self._disturbance([n * (n - 1) // 2 for n in counts], streams, dtype, device)
        losses = {
            "clean": self.direction(self.score_clean, view, graph, pairs, sigma[0], xi[0]),
            "noisy": self.direction(self.score_noisy, graph, view, pairs, sigma[1], xi[1]),
        }
        terms = {key: mean_over(value, sample, "n_graphs") for key, value in losses.items()}
        loss = 0.5 * (terms["clean"] + terms["noisy"])
        n_pairs = pairs.shape[1] / graph.n_graphs
        references = {"zero": self.pair_zero * n_pairs, "floor": self.pair_floor * n_pairs}
        return {"loss": loss, **terms, **{key: loss.new_full((), v) for key, v in references.items()}}

    def _disturbance(
        self, n_pairs: list[int], streams: FrameGenerators, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return levels ``[2, B, K]`` and draws ``[2, P, K]`` of both directions, K levels at once."""
        n, k = len(n_pairs), len(self.sigmas) if self.all_levels else 1
        if self.all_levels:
            sigma = self.sigmas.to(device, dtype).expand(2, n, k)
        else:
            picks = torch.stack(streams.uniform([2] * n))
            sigma = self.sigmas[(picks * len(self.sigmas)).long().to(device)].to(dtype).T.unsqueeze(2)
        xi = streams.normal(n_pairs, dtype, width=2 * k).to(device)
        return sigma, xi.view(-1, 2, k).transpose(0, 1)

    def unit_of(self, term: str) -> str:
        """See :class:`~ffpretrain.objectives.base.Objective`."""
        return "1" if self.beta == 2 else f"angstrom^{self.beta - 2:g}"

    def direction(
        self, head: DistanceScore, known: Graph, wanted: Graph, pairs: Tensor, sigma: Tensor, xi: Tensor
    ) -> Tensor:
        """Return one direction's loss for each structure ``[B]``.

        Args:
            head: of this direction.
            known: view whose features are used.
            wanted: view whose distances are disturbed.
            pairs: as :func:`all_pairs`.
            sigma: levels of each structure, Å ``[B, K]``; the loss is the mean over them.
            xi: standard normal numbers of each pair ``[P, K]``.
        """
        of_pair, k = known.batch[pairs[0]], xi.shape[1]
        level = sigma[of_pair]
        disturbed = distances(wanted.pos, pairs).unsqueeze(1) + level * xi
        each = pairs.repeat_interleave(k, dim=1)
        score = head(disturbed.flatten(), self.network.features(known).scalars, each).view(-1, k)
        error = distance_score_loss(score, xi.to(score), level.to(score), self.beta).mean(1)
        return error.new_zeros(known.n_graphs).index_add(0, of_pair, error)

    def potential(self, kT: float | None = None, sigma: float | None = None) -> DistanceField:
        """Return the pull of a structure's distances towards those of clean ones as forces, without an
        energy.

        Args:
            kT: eV; None takes 300 K.
            sigma: level the scores are read at, Å; None takes ``sqrt(2) view_sigma``, the spread of a
                displaced view's distances. It sets the unit alone, since the head is not told the level.
        """
        level = 2**0.5 * self.view_sigma if sigma is None else sigma
        scale = force_scale(kT, level) * level
        return DistanceField(copy.deepcopy(self.network), copy.deepcopy(self.score_clean), scale).eval()
