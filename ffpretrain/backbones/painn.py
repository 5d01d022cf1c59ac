"""PaiNN, the polarizable atom interaction network (Schütt, Unke and Gastegger, ICML 2021).

Same function as the representation of SchNetPack 2.1; written for speed: the filters of all layers are one
matrix product, the feature axis is always innermost, and the first layer leaves out what multiplies the zero
vector features it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffpretrain.backbones.base import Backbone, Features, check_positive, load_exactly
from ffpretrain.backbones.radial import GaussianBasis, cosine_cutoff
from ffpretrain.errors import ArtifactError
from ffpretrain.native.messages import LIBRARY, Shape, painn_messages
from ffpretrain.pairs import HalfPairs, Pairs
from ffpretrain.units import length_unit as length_unit_size


class PaiNN(Backbone):
    """Polarizable atom interaction network; registry name ``painn``.

    Args:
        hidden: features F.
        layers: number of interaction blocks, each a message and an update.
        rbf: number of radial functions.
        cutoff: Å.
        max_z: size of the element embedding; atomic numbers run from 1 to ``max_z - 1``.
        trainable_rbf: learn centres and widths of the radial functions.
        shared_filters: one set of filters for all layers instead of one for each.
        epsilon: added under the root of the vectors' norm, which keeps its derivatives finite at zero.
        vector_input: have the weights that vectors among the extra input features need.

    Raises:
        ConfigError: a size or the cutoff is not positive.
    """

    name: ClassVar[str] = "painn"
    has_vectors: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int = 128,
        layers: int = 3,
        rbf: int = 20,
        cutoff: float = 5.0,
        max_z: int = 100,
        trainable_rbf: bool = False,
        shared_filters: bool = False,
        epsilon: float = 1e-8,
        vector_input: bool = False,
    ) -> None:
        check_positive("painn", hidden=hidden, layers=layers, cutoff=cutoff, max_z=max_z, epsilon=epsilon)
        config = {
            "hidden": hidden,
            "layers": layers,
            "rbf": rbf,
            "cutoff": cutoff,
            "max_z": max_z,
            "trainable_rbf": trainable_rbf,
            "shared_filters": shared_filters,
            "epsilon": epsilon,
            "vector_input": False,
        }
        super().__init__(cutoff, hidden, max_z, config)
        self.shared_filters = shared_filters
        self.embedding = nn.Embedding(max_z, hidden)
        self.basis = GaussianBasis(rbf, cutoff, trainable_rbf)
        self.layers = nn.ModuleList(Interaction(hidden, epsilon, first=i == 0) for i in range(layers))
        self.filters = nn.Linear(rbf, hidden * sum(self._filter_blocks()))
        published = 3 * hidden * (1 if shared_filters else layers)
        _xavier(self.filters, published)
        self.vector_filters: nn.Linear | None = None
        if vector_input:
            self.accept_vectors()

    def accept_vectors(self) -> None:
        """See :class:`~ffpretrain.backbones.base.Backbone`: the vector message of the first layer."""
        if self.vector_input:
            return
        hidden, first = self.n_features, self.layers[0]
        first.vector_context = nn.Linear(hidden, hidden).to(self.embedding.weight)
        _xavier(first.vector_context, 3 * hidden)
        if self._filter_blocks()[0] == 2:
            self.vector_filters = nn.Linear(self.filters.in_features, hidden).to(self.embedding.weight)
            _xavier(self.vector_filters, 3 * hidden * len(self.layers))
        self.vector_input = self.config["vector_input"] = True

    def _filter_blocks(self) -> list[int]:
        """Return how many blocks of F filters each layer has of its own; the first reads no vectors."""
        n = len(self.layers)
        if self.shared_filters:
            return [2 if n == 1 else 3]
        return [2] + [3] * (n - 1)

    def use_native_messages(self) -> None:
        """See :class:`~ffpretrain.backbones.base.Backbone`."""
        LIBRARY.load()
        self.native_messages = True

    def encode(self, z: Tensor, pairs: Pairs | HalfPairs, initial: Features | None = None) -> Features:
        """See :class:`~ffpretrain.backbones.base.Backbone`."""
        weight, safe = cosine_cutoff(pairs.distance, self.cutoff), pairs.distance
        if pairs.other is not None:
            weight, safe = weight * pairs.other, safe + (1 - pairs.other)
        direction = pairs.vector / safe.unsqueeze(-1)
        x, vec = self.with_initial(self.embedding(z), initial)
        basis, native = self.basis(pairs.radial), isinstance(pairs, HalfPairs)
        # native messages multiply by the cutoff function where they read the filters
        each = self._filters(basis, pairs, None if native else weight.unsqueeze(-1), vec is not None)
        for i, layer in enumerate(self.layers):
            filters = each[0 if self.shared_filters else i]
            x, vec = layer(x, vec, pairs, filters, direction, weight=weight if native else None)
        return Features(x, vec)

    def _filters(
        self, basis: Tensor, pairs: Pairs | HalfPairs, weight: Tensor | None, vectors: bool
    ) -> list[Tensor]:
        """Return the filters ``[P, kF]`` of each layer, or of all of them where they are shared.

        One product makes them all where they are multiplied by the weight, too. Without it each layer's stand
        in a memory of their own, as native code reads them.
        """
        sizes = [self.n_features * n for n in self._filter_blocks()]
        if weight is None:
            maps = zip(self.filters.weight.split(sizes), self.filters.bias.split(sizes), strict=True)
            each = [functional.linear(basis, *one) for one in maps]
        else:
            each = list((pairs.spread(self.filters(basis)) * weight).split(sizes, dim=-1))
        if vectors and self.vector_filters is not None:
            more = pairs.spread(self.vector_filters(basis))
            each[0] = torch.cat([each[0], more if weight is None else more * weight], dim=-1)
        return each


class Interaction(nn.Module):
    """Message (eq. 7 and 8 of the paper) and update (eq. 9 and 10) of one layer.

    Rows of ``context_out`` and of the filters are stacked as ``[scalar | direction | vector]``, those of
    ``update_out`` as ``[scalar | vector | product]``. The first layer has no vectors to pass on, so the
    vector message does not exist there; ``vector_context`` holds its rows where input vectors are accepted.
    """

    def __init__(self, hidden: int, epsilon: float, first: bool) -> None:
        super().__init__()
        self.hidden, self.epsilon = hidden, epsilon
        blocks = 2 if first else 3
        self.context_in = nn.Linear(hidden, hidden)
        self.context_out = nn.Linear(hidden, blocks * hidden)
        self.vec_proj = nn.Linear(hidden, 2 * hidden, bias=False)
        self.update_in = nn.Linear(2 * hidden, hidden)
        self.update_out = nn.Linear(hidden, 3 * hidden)
        for layer in (self.context_in, self.vec_proj, self.update_in, self.update_out):
            _xavier(layer, layer.out_features)
        _xavier(self.context_out, 3 * hidden)
        self.vector_context: nn.Linear | None = None

    def forward(
        self,
        x: Tensor,
        vec: Tensor | None,
        pairs: Pairs | HalfPairs,
        filters: Tensor,
        direction: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return updated ``x [N, F]`` and ``vec [N, 3, F]``.

        Args:
            x: scalar features ``[N, F]``.
            vec: vector features ``[N, 3, F]``; None in the first layer unless they are part of the input.
            pairs: neighbours.
            filters: this layer's: ``[P, 2F]`` or ``[P, 3F]``; the cutoff function is in them unless it is
                given.
            direction: unit vectors from centre to neighbour ``[P, 3]``.
            weight: cutoff function ``[P]``, for pairs that are listed once.
        """
        f = self.hidden
        inner = functional.silu(self.context_in(x))
        context = self.context_out(inner)
        if vec is not None and self.vector_context is not None:
            context = torch.cat([context, self.vector_context(inner)], dim=-1)
        if filters.shape[-1] > context.shape[-1]:  # shared ones, in the first layer
            filters = filters[..., : context.shape[-1]]
        if isinstance(pairs, HalfPairs):
            shape = Shape(pairs.first, pairs.second)
            total, moved = painn_messages(context, vec, filters, cast("Tensor", weight), direction, shape)
        else:
            total, moved = self._messages(context, vec, filters, pairs, direction)
        x, vec = x + total, moved if vec is None else vec + moved
        v, w = self.vec_proj(vec).split(f, dim=-1)
        norm = (v.square().sum(-2) + self.epsilon).sqrt()
        update = self.update_out(functional.silu(self.update_in(torch.cat([x, norm], dim=-1))))
        scalar, vector, product = update.split(f, dim=-1)
        return x + scalar + product * (v * w).sum(-2), vec + vector.unsqueeze(-2) * w

    def _messages(
        self, context: Tensor, vec: Tensor | None, filters: Tensor, pairs: Pairs, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sums over neighbours of scalar ``[N, F]`` and vector messages ``[N, 3, F]``."""
        f = self.hidden
        message = pairs.neighbor(context) * filters
        along = message[..., f : 2 * f].unsqueeze(-2) * direction.unsqueeze(-1)
        if vec is not None:
            along = along + message[..., 2 * f :].unsqueeze(-2) * pairs.neighbor(vec)
        return pairs.sum(message[..., :f]), pairs.sum(along)


def _xavier(layer: nn.Linear, published_rows: int) -> None:
    """Initialise as a Glorot-uniform layer with ``published_rows`` outputs, of which some may be left out."""
    bound = (6.0 / (layer.in_features + published_rows)) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def from_schnetpack(
    state_dict: Mapping[str, Tensor], *, epsilon: float = 1e-8, length_unit: str = "angstrom"
) -> PaiNN:
    """Return a PaiNN with the weights of SchNetPack's.

    Sizes, cutoff and radial functions are read from the tensors. SchNetPack does not store the activation
    (SiLU, its default, is assumed), ``epsilon`` and the length unit. Left out, because it multiplies vector
    features that are zero: the vector message of the first interaction.

    Args:
        state_dict: that of ``schnetpack.representation.PaiNN`` with Gaussian radial functions, a cosine
            cutoff and the plain element embedding; a prefix ``representation.`` or ``model.representation.``
            is taken off.
        epsilon: as SchNetPack's.
        length_unit: of the distances the weights were trained with.

    Returns:
        The backbone, in the precision of the weights.

    Raises:
        ArtifactError: keys are missing or left over, or shapes do not fit.
        DataError: unknown length unit.
    """
    weights = _without_prefix(state_dict)
    layers = sum(key.endswith("vec_proj.weight") for key in map(_schnetpack_key, weights))
    _check_keys(weights, layers)
    hidden, rbf = weights["embedding.weight"].shape[1], weights["radial_basis.offsets"].shape[0]
    size = length_unit_size(length_unit)
    filters = weights["filter_net.weight"].shape[0] // (3 * hidden)
    if filters not in (1, layers):
        raise ArtifactError(f"filter_net has filters for {filters} of {layers} interactions; 1 or all fit")
    model = PaiNN(
        hidden=hidden,
        layers=layers,
        rbf=rbf,
        cutoff=float(weights["cutoff_fn.cutoff"]) * size,
        max_z=weights["embedding.weight"].shape[0],
        shared_filters=filters == 1 and layers > 1,
        epsilon=epsilon,
    ).to(weights["embedding.weight"].dtype)
    ours: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key != "cutoff_fn.cutoff":
            ours[_schnetpack_key(key)] = value * size if key.startswith("radial_basis.") else value
    first = ["layers.0.context_out"] if model.shared_filters else ["layers.0.context_out", "filters"]
    for layer in first:
        for kind in ("weight", "bias"):
            full = ours[f"{layer}.{kind}"]
            ours[f"{layer}.{kind}"] = torch.cat([full[: 2 * hidden], full[3 * hidden :]])
    load_exactly(model, ours, "SchNetPack PaiNN")
    return model


_SCHNETPACK = {
    "embedding": "embedding",
    "radial_basis.offsets": "basis.centers",
    "radial_basis.widths": "basis.widths",
    "filter_net": "filters",
}
_SCHNETPACK_LAYER = {
    "interactions.interatomic_context_net.0": "context_in",
    "interactions.interatomic_context_net.1": "context_out",
    "mixing.mu_channel_mix": "vec_proj",
    "mixing.intraatomic_context_net.0": "update_in",
    "mixing.intraatomic_context_net.1": "update_out",
}


def _schnetpack_key(key: str) -> str:
    """Return our name of one of SchNetPack's keys, or an empty string."""
    if key in _SCHNETPACK:
        return _SCHNETPACK[key]
    module, _, kind = key.rpartition(".")
    if module in _SCHNETPACK:
        return f"{_SCHNETPACK[module]}.{kind}"
    block, _, rest = module.partition(".")
    number, _, inner = rest.partition(".")
    name = _SCHNETPACK_LAYER.get(f"{block}.{inner}")
    return f"layers.{number}.{name}.{kind}" if name and number.isdigit() else ""


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("model.representation.", "representation."):
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            return {key[len(prefix) :]: value for key, value in state_dict.items()}
    return dict(state_dict)


def _check_keys(weights: Mapping[str, Tensor], layers: int) -> None:
    wanted = {"embedding.weight", "cutoff_fn.cutoff", "filter_net.weight", "filter_net.bias"}
    wanted |= {"radial_basis.offsets", "radial_basis.widths"}
    for i in range(max(layers, 1)):
        for name in _SCHNETPACK_LAYER:
            block, _, inner = name.partition(".")
            wanted.add(f"{block}.{i}.{inner}.weight")
            if name != "mixing.mu_channel_mix":
                wanted.add(f"{block}.{i}.{inner}.bias")
    missing, extra = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
    if extra:
        raise ArtifactError(
            f"this PaiNN has what ours cannot hold: {', '.join(extra)}; give the state dict of the "
            "representation alone, with Gaussian radial functions and a cosine cutoff"
        )
    if missing:
        raise ArtifactError(f"the state dict is not a complete PaiNN; missing: {', '.join(missing)}")
