"""The equivariant transformer of TorchMD-Net (Thölke and De Fabritiis, ICLR 2022).

Same function as TorchMD-Net 3.1's ``equivariant-transformer`` with ``distance_influence="both"``; written for
speed: projections that share an input are one matrix product, the feature axis is always innermost, and the
first layer leaves out what multiplies the zero vector features it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffpretrain.backbones.base import Backbone, Features, check_positive
from ffpretrain.backbones.radial import ExpNormalBasis, cosine_cutoff
from ffpretrain.backbones.vector_norm import WhitenedNorm
from ffpretrain.errors import ConfigError
from ffpretrain.native.build import NativeUnavailable
from ffpretrain.native.messages import Shape, messages, require
from ffpretrain.pairs import HalfPairs, Pairs

if TYPE_CHECKING:
    from ffpretrain.potential import Potential


class TorchMDET(Backbone):
    """Equivariant transformer; registry name ``torchmd-et``.

    Args:
        hidden: features F; a multiple of ``heads``.
        layers: number of attention layers.
        heads: attention heads.
        rbf: number of radial functions.
        cutoff: Å.
        max_z: size of the element embedding; atomic numbers run from 1 to ``max_z - 1``.
        trainable_rbf: learn centres and widths of the radial functions.
        vector_cutoff: multiply the values by the cutoff function, so that energies are smooth where an atom
            crosses it. Upstream's default is off: then only the attention weight is cut off and the vector
            messages jump. Off is for reading published weights.
        vec_norm: ``"none"``, or ``"whitened"`` for weights of forks that normalise the outgoing vectors in a
            way that is not rotation-equivariant (:class:`~ffpretrain.backbones.vector_norm.WhitenedNorm`).
        vector_input: have the weights that vectors among the extra input features need.
        layer_norms: normalise scalars and vectors after every layer, for weights of Frad's code; the vectors
            as ``vec_norm="whitened"`` does.

    Raises:
        ConfigError: ``hidden`` is not a multiple of ``heads``, a size is not positive, or an unknown
            ``vec_norm``.
    """

    name: ClassVar[str] = "torchmd-et"
    has_vectors: ClassVar[bool] = True
    self_pairs: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int = 128,
        layers: int = 6,
        heads: int = 8,
        rbf: int = 32,
        cutoff: float = 5.0,
        max_z: int = 100,
        trainable_rbf: bool = True,
        vector_cutoff: bool = True,
        vec_norm: str = "none",
        vector_input: bool = False,
        layer_norms: bool = False,
    ) -> None:
        check_positive(
            "torchmd-et", hidden=hidden, layers=layers, heads=heads, rbf=rbf, cutoff=cutoff, max_z=max_z
        )
        if hidden % heads:
            raise ConfigError(f"torchmd-et: hidden={hidden} is not a multiple of heads={heads}")
        if vec_norm not in ("none", "whitened"):
            raise ConfigError(f"torchmd-et: unknown vec_norm {vec_norm!r}; known: 'none', 'whitened'")
        config = {
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "rbf": rbf,
            "cutoff": cutoff,
            "max_z": max_z,
            "trainable_rbf": trainable_rbf,
            "vector_cutoff": vector_cutoff,
            "vec_norm": vec_norm,
            "vector_input": False,
            "layer_norms": layer_norms,
        }
        super().__init__(cutoff, hidden, max_z, config)
        self.smooth, self.heads = vector_cutoff, heads
        self.embedding = nn.Embedding(max_z, hidden)
        self.basis = ExpNormalBasis(rbf, cutoff, trainable_rbf)
        self.neighbor_embedding = NeighborEmbedding(hidden, rbf, max_z)
        self.layers = nn.ModuleList(
            EquivariantAttention(hidden, rbf, heads, vector_cutoff, first=i == 0) for i in range(layers)
        )
        self.vec_norms = nn.ModuleList(WhitenedNorm(hidden) for _ in range(layers)) if layer_norms else None
        self.out_norm = nn.LayerNorm(hidden)
        self.out_norm_vec = WhitenedNorm(hidden) if vec_norm == "whitened" else None
        if vector_input:
            self.accept_vectors()

    def accept_vectors(self) -> None:
        """See :class:`~ffpretrain.backbones.base.Backbone`: what reads vectors in the first layer."""
        if not self.vector_input:
            cast("EquivariantAttention", self.layers[0]).accept_vectors()
            self.layers[0].to(self.embedding.weight)
            self.vector_input = self.config["vector_input"] = True

    def use_native_messages(self) -> None:
        """See :class:`~ffpretrain.backbones.base.Backbone`."""
        if not self.smooth:
            raise NativeUnavailable("native messages need vector_cutoff=true")
        require(self.n_features, self.heads)
        self.native_messages = True

    def encode(self, z: Tensor, pairs: Pairs | HalfPairs, initial: Features | None = None) -> Features:
        """See :class:`~ffpretrain.backbones.base.Backbone`."""
        weight = cosine_cutoff(pairs.distance, self.cutoff).unsqueeze(-1)
        basis = self.basis(pairs.radial)
        safe = pairs.distance if pairs.other is None else pairs.distance + (1 - pairs.other)
        direction = pairs.vector / safe.unsqueeze(-1)
        x, vec = self.with_initial(self.embedding(z), initial)
        first, *each = self._filters(basis)
        x = self.neighbor_embedding(z, x, pairs, basis, weight, first)
        for i, layer in enumerate(self.layers):
            x, vec = layer(x, vec, pairs, basis, weight, direction, each[i])
            if self.vec_norms is not None:
                x, vec = functional.layer_norm(x, x.shape[-1:]), self.vec_norms[i](vec)
        if self.out_norm_vec is not None:
            vec = self.out_norm_vec(vec)
        return Features(self.out_norm(x), vec)

    def _filters(self, basis: Tensor) -> list[Tensor | None]:
        """Return the filters ``[P, kF]`` of the neighbour embedding and of each layer, made by one product.

        Nothing for each where that does not pay: they then make their own, when they need them.
        """
        maps = [self.neighbor_embedding.filter]
        maps += [cast("EquivariantAttention", layer).filters for layer in self.layers]
        if not _together(basis, maps[0].weight):
            return [None] * len(maps)
        weight, bias = torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps])
        return list(functional.linear(basis, weight, bias).split([m.out_features for m in maps], dim=-1))


def _together(basis: Tensor, weight: Tensor) -> bool:
    """Return whether fewer, larger products pay: on a GPU, for forces (which keep all filters anyway)."""
    return basis.is_cuda and basis.requires_grad and not weight.requires_grad


class NeighborEmbedding(nn.Module):
    """Adds the elements of the neighbours to an atom's embedding (eq. 3 of the paper)."""

    def __init__(self, hidden: int, rbf: int, max_z: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(max_z, hidden)
        self.filter = _linear(rbf, hidden)
        self.combine = _linear(2 * hidden, hidden)

    def forward(
        self,
        z: Tensor,
        x: Tensor,
        pairs: Pairs | HalfPairs,
        basis: Tensor,
        weight: Tensor,
        filters: Tensor | None = None,
    ) -> Tensor:
        """Combine ``x [N, F]`` with the filtered sum over neighbours; an atom is not its own here."""
        if pairs.other is not None:
            weight = weight * pairs.other.unsqueeze(-1)
        filters = pairs.spread(self.filter(basis) if filters is None else filters)
        filters, neighbor = filters * weight, self.embedding(z)
        if isinstance(pairs, HalfPairs):
            total = pairs.exchange(filters, neighbor)
        else:
            total = pairs.sum(filters * pairs.neighbor(neighbor))
        return self.combine(torch.cat([x, total], dim=-1))


class EquivariantAttention(nn.Module):
    """One attention layer and its residual update (eq. 5-9 of the paper).

    ``mix`` holds query, key and the two or three values stacked as ``[q | k | value_x | value_d | value_v]``;
    ``filters`` the filters of key and values in the same order. The first layer has no vector features to
    read, so value_v, the vector projection and two thirds of the output projection do not exist there, unless
    :meth:`accept_vectors` has added them.
    """

    def __init__(self, hidden: int, rbf: int, heads: int, vector_cutoff: bool, first: bool) -> None:
        super().__init__()
        self.hidden, self.heads, self.vector_cutoff = hidden, heads, vector_cutoff
        values = 2 if first else 3
        self.norm = nn.LayerNorm(hidden)
        self.mix = _stacked(hidden, hidden, [1, 1, values], published=[1, 1, 3])
        self.filters = _stacked(rbf, hidden, [1, values], published=[1, 3])
        self.out = _stacked(hidden, hidden, [1] if first else [3], published=[3])
        self.vec_proj: nn.Linear | None = None if first else _unbiased(hidden, 3 * hidden)
        self.vector_value: nn.Linear | None = None
        self.vector_filters: nn.Linear | None = None
        self.vector_out: nn.Linear | None = None

    def accept_vectors(self) -> None:
        """Add what a first layer lacks, initialised as its published whole."""
        f = self.hidden
        self.vec_proj = _unbiased(f, 3 * f)
        self.vector_value = _stacked(f, f, [1], published=[3])
        self.vector_filters = _stacked(self.filters.in_features, f, [1], published=[3])
        self.vector_out = _stacked(f, f, [2], published=[3])

    def forward(
        self,
        x: Tensor,
        vec: Tensor | None,
        pairs: Pairs | HalfPairs,
        basis: Tensor,
        weight: Tensor,
        direction: Tensor,
        filters: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return updated ``x [N, F]`` and ``vec [N, 3, F]``.

        Args:
            x: scalar features ``[N, F]``.
            vec: vector features ``[N, 3, F]``; None in the first layer unless they are part of the input.
            pairs: neighbours.
            basis: radial functions ``[P, K]``.
            weight: cutoff function ``[P, 1]``.
            direction: unit vectors from centre to neighbour ``[P, 3]``, zero for self-pairs.
            filters: ``[P, kF]``, what ``self.filters`` makes of the basis; None lets it do so.
        """
        f = self.hidden
        normed = self.norm(x)
        mixed = self.mix(normed)
        filters = self.filters(basis) if filters is None else filters
        if vec is not None and self.vector_value is not None and self.vector_filters is not None:
            mixed = torch.cat([mixed, self.vector_value(normed)], dim=-1)
            filters = torch.cat([filters, self.vector_filters(basis)], dim=-1)
        filters = pairs.spread(filters)
        if isinstance(pairs, HalfPairs):
            known = vec if mixed.shape[-1] == 5 * f else None
            shape = Shape(pairs.first, pairs.second, self.heads, selves=True)
            total, moved = messages(mixed, known, filters, weight.squeeze(-1), direction, shape)
        else:
            total, moved = self._messages(mixed, vec, filters, pairs, weight, direction)
        new_x = self.out(total)
        if vec is None or self.vec_proj is None:
            return x + new_x, moved
        if self.vector_out is not None:
            new_x = torch.cat([self.vector_out(total), new_x], dim=-1)
        vec1, vec2, vec3 = self.vec_proj(vec).split(f, dim=-1)
        o1, o2, o3 = new_x.split(f, dim=-1)
        dx = (vec1 * vec2).sum(-2) * o2 + o3
        return x + dx, vec + (vec3 * o1.unsqueeze(-2) + moved)

    def _messages(
        self,
        mixed: Tensor,
        vec: Tensor | None,
        filters: Tensor,
        pairs: Pairs,
        weight: Tensor,
        direction: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the sums over neighbours of scalar ``[N, F]`` and vector messages ``[N, 3, F]``."""
        f = self.hidden
        # split, not slices: the derivative of all parts is then one concatenation
        values = mixed.shape[-1] - 2 * f
        filter_k, filter_v = functional.silu(filters).split([f, values], dim=-1)
        query, key, value = mixed.split([f, f, values], dim=-1)
        attention = self._per_head_sum(pairs.center(query) * pairs.neighbor(key) * filter_k)
        value = pairs.neighbor(value) * filter_v
        if self.vector_cutoff:
            value = value * weight
        else:
            # only the attention is cut off: pairs that a list keeps beyond the cutoff must not send vectors
            attention, value = attention * weight, value * (weight > 0).to(value.dtype)
        value_x, value_d, *value_v = value.split(f, dim=-1)
        total = pairs.sum(value_x * attention)
        message = value_d.unsqueeze(-2) * direction.unsqueeze(-1)
        if vec is not None and value_v:
            message = message + value_v[0].unsqueeze(-2) * pairs.neighbor(vec)
        return total, pairs.sum(message)

    def _per_head_sum(self, product: Tensor) -> Tensor:
        """Activate the sum over each head's features and spread it back: ``[P, F]`` to ``[P, F]``."""
        shape = product.shape
        heads = product.unflatten(-1, (self.heads, shape[-1] // self.heads)).sum(-1, keepdim=True)
        return functional.silu(heads).expand(*shape[:-1], self.heads, shape[-1] // self.heads).flatten(-2)


def from_torchmd_net(
    state_dict: Mapping[str, Tensor],
    hparams: Mapping[str, Any],
    *,
    energy_unit: str = "eV",
    length_unit: str = "angstrom",
    elements: Sequence[int] | None = None,
) -> Potential:
    """Return a potential with the weights of a TorchMD-Net 3.1 equivariant transformer with scalar output.

    Left out, because they multiply vector features that are zero or scale a vector that nothing reads: the
    vector rows of the first layer's value projections, its vector projection and the first two thirds of its
    output projection, and the vector part of the head's last block. TorchMD-Net's ``mean`` is added once per
    structure and becomes :attr:`Potential.shift <ffpretrain.potential.Potential>`.

    Args:
        state_dict: of the model, or of the Lightning module (``model.`` before each key).
        hparams: the checkpoint's ``hyper_parameters``.
        energy_unit: what the weights predict, as the training data had it; TorchMD-Net does not record it.
        length_unit: of the positions the weights were trained on.
        elements: atomic numbers of the training data; None accepts all that the embedding holds.

    Returns:
        The potential in eval mode, in the precision of the weights.

    Raises:
        ArtifactError: hyper-parameters that this network cannot represent, keys missing or left over (all are
            named), or shapes that contradict the hyper-parameters.
        DataError: unknown unit.
    """
    from ffpretrain.backbones.torchmd_net_import import convert

    return convert(state_dict, hparams, energy_unit=energy_unit, length_unit=length_unit, elements=elements)


def _linear(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _unbiased(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return layer


def _stacked(n_in: int, width: int, blocks: list[int], published: list[int]) -> nn.Linear:
    """One linear map made of several, each initialised like the published one of ``published[i]`` blocks."""
    layer = nn.Linear(n_in, width * sum(blocks))
    start = 0
    for rows, full in zip(blocks, published, strict=True):
        bound = (6.0 / (n_in + full * width)) ** 0.5
        nn.init.uniform_(layer.weight[start : start + rows * width], -bound, bound)
        start += rows * width
    nn.init.zeros_(layer.bias)
    return layer
