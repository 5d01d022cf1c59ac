"""What every backbone is: a module that turns a graph into per-atom features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ffpretrain.errors import ArtifactError, ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.native.build import NativeUnavailable
from ffpretrain.pairs import EdgeList, HalfPairs, Pairs


class Features(NamedTuple):
    """Per-atom output of a backbone.

    Attributes:
        scalars: invariant features ``[N, F]``.
        vectors: equivariant features ``[N, 3, F]``, or None for a backbone that has none.
    """

    scalars: Tensor
    vectors: Tensor | None


class Backbone(nn.Module, ABC):
    """Base class of all backbones.

    A subclass sets the class attributes, stores its constructor arguments in ``config`` (so that an artefact
    can rebuild it) and implements :meth:`encode`.

    Attributes:
        name: registry name.
        has_vectors: whether :class:`Features` carries vectors.
        self_pairs: whether an atom is its own neighbour.
        smooth: whether every message vanishes at the cutoff, so that pairs beyond it may be kept in the list.
        vector_input: whether the network has the weights that extra input vectors need.
        cutoff: Å.
        n_features: F.
        max_z: largest atomic number the embedding holds.
        native_messages: whether native code computes messages on a CPU; see :meth:`use_native_messages`.
    """

    name: ClassVar[str]
    has_vectors: ClassVar[bool]
    self_pairs: ClassVar[bool] = False
    smooth: bool = True
    vector_input: bool = False
    native_messages: bool = False

    def __init__(self, cutoff: float, n_features: int, max_z: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.cutoff = float(cutoff)
        self.n_features = n_features
        self.max_z = max_z
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.parameters()).dtype

    def forward(self, graph: Graph, initial: Features | None = None) -> Features:
        """Encode a graph.

        Args:
            graph: edges must be complete up to ``cutoff``. Edge vectors are formed in the precision of
                ``graph.pos`` and then cast to that of the weights.
            initial: as for :meth:`encode`.

        Raises:
            ConfigError: ``initial`` holds what the network cannot take in.
        """
        pairs: Any
        if self.native_messages and graph.pos.device.type == "cpu":
            pairs = HalfPairs(graph, self_pairs=self.self_pairs, dtype=self.dtype)
        else:
            pairs = EdgeList(graph, self_pairs=self.self_pairs, dtype=self.dtype)
        # a plug-in whose encode knows no extra features works as long as there are none
        return self.encode(graph.z, pairs) if initial is None else self.encode(graph.z, pairs, initial)

    def use_native_messages(self) -> None:
        """Let native code compute messages on a CPU: the same function to rounding, trained faster.

        Raises:
            NativeUnavailable: the backbone has no such code, or it cannot be built; the message says why.
        """
        raise NativeUnavailable(f"backbone {self.name!r} has no native messages")

    @abstractmethod
    def encode(self, z: Tensor, pairs: Pairs, initial: Features | None = None) -> Features:
        """Encode atoms given their pairs, in a layout of :mod:`ffpretrain.pairs`.

        Args:
            z: atomic numbers ``[N]``.
            pairs: as :class:`~ffpretrain.pairs.Pairs`. Where ``native_messages`` is set it may be a
                :class:`~ffpretrain.pairs.HalfPairs` instead: who sets it knows what to do with them.
            initial: what is known of each atom beside its element, added to the embeddings before the first
                layer: scalars ``[N, F]`` (zeros where there are none) and vectors ``[N, 3, F]`` or None.

        Raises:
            ConfigError: ``initial`` holds vectors and the network has no weights for them.
        """

    def accept_vectors(self) -> None:
        """Add the weights that vectors in ``initial`` need, freshly drawn; nothing where they are there.

        The network keeps all other weights and is the same function wherever no vectors are given.

        Raises:
            ConfigError: the backbone has no vector features to add them to.
        """
        if not self.vector_input:
            raise ConfigError(
                f"backbone {self.name!r} cannot take vectors as input; use one that can: torchmd-et, painn "
                "or egnn"
            )

    def with_initial(self, x: Tensor, initial: Features | None) -> tuple[Tensor, Tensor | None]:
        """Return embeddings ``[N, F]`` with the extra scalars added, and the extra vectors, if any.

        Args:
            x: embeddings of the elements ``[N, F]``.
            initial: as for :meth:`encode`.

        Raises:
            ConfigError: vectors are given and the network has no weights for them.
        """
        if initial is None:
            return x, None
        if initial.vectors is not None and not self.vector_input:
            mend = "build it with vector_input=true" if self.has_vectors else "give scalars only"
            raise ConfigError(f"this {self.name!r} backbone takes no vectors as extra input; {mend}")
        return x + initial.scalars, initial.vectors


def check_positive(name: str, **options: float) -> None:
    """Refuse sizes that build no network.

    Args:
        name: the backbone's.
        **options: option and value.

    Raises:
        ConfigError: a value is not above zero.
    """
    for option, value in options.items():
        if not value > 0:
            raise ConfigError(f"{name}: {option}={value} must be above zero")


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a whole state dict that another program's weights were mapped to.

    Args:
        module: takes the weights.
        weights: by this package's names; every one that the module has.
        source: named in the error.

    Raises:
        ArtifactError: a weight has another shape than the module's.
    """
    for key, own in module.state_dict().items():
        if weights[key].shape != own.shape:
            raise ArtifactError(
                f"{source}: {key} has shape {tuple(weights[key].shape)} where the sizes given need "
                f"{tuple(own.shape)}"
            )
    module.load_state_dict(dict(weights))
