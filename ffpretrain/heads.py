"""Heads: what turns a backbone's features into energies or vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffpretrain.backbones.base import Features
from ffpretrain.errors import ConfigError


class GatedBlock(nn.Module):
    """Gated equivariant block (Schütt et al. 2021, PaiNN, Fig. 3).

    Args:
        n_in: features in.
        n_out: features out.
        scalars: whether scalars come out.
        vectors: whether vectors come out.
        activate: whether outgoing scalars pass a SiLU.
    """

    def __init__(
        self, n_in: int, n_out: int, *, scalars: bool = True, vectors: bool = True, activate: bool = False
    ) -> None:
        super().__init__()
        self.n_out, self.scalars, self.vectors, self.activate = n_out, scalars, vectors, activate
        self.norm_proj = nn.Linear(n_in, n_in, bias=False)
        self.vec_proj = nn.Linear(n_in, n_out, bias=False) if vectors else None
        self.hidden = nn.Linear(2 * n_in, n_in)
        self.out = nn.Linear(n_in, n_out * (int(scalars) + int(vectors)))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Map scalars ``[N, F]`` and vectors ``[N, 3, F]`` to what the constructor asked for."""
        norm = _smooth_norm(self.norm_proj(vec))
        out = self.out(functional.silu(self.hidden(torch.cat([x, norm], dim=-1))))
        scalars = out[..., : self.n_out] if self.scalars else None
        if scalars is not None and self.activate:
            scalars = functional.silu(scalars)
        if self.vec_proj is None:
            return scalars, None
        return scalars, out[..., -self.n_out :].unsqueeze(-2) * self.vec_proj(vec)


def _smooth_norm(vec: Tensor) -> Tensor:
    """Return the lengths of vectors ``[N, 3, F]``, smooth at zero.

    Of their squares s it is ``sqrt(s + 1e-12)``, and in float64 ``s / (s^2 + q^2)^(1/4)`` with ``q = 1e-18``.

    Where vectors vanish (no neighbours, or symmetry) a length has no derivative, and what rounding leaves of
    a vector that should be zero points anywhere: the root of the constant must lie far above that. The second
    form is exact to rounding from lengths of 1e-5 on; in float32 its squares could overflow.
    """
    square = vec.square().sum(-2)
    if vec.dtype != torch.float64:
        return (square + 1e-12).sqrt()
    ratio = square / 1e-18
    return square * (ratio.square() + 1).sqrt().rsqrt() * 1e9


class EnergyHead(nn.Module):
    """Atomic energies from features.

    Backbones with vectors get two gated blocks, as TorchMD-Net's ``EquivariantScalar``; the others a
    two-layer perceptron.

    Args:
        n_features: F of the backbone.
        has_vectors: whether the backbone has vector features.
    """

    def __init__(self, n_features: int, has_vectors: bool) -> None:
        super().__init__()
        half = n_features // 2
        self.first: nn.Module
        if has_vectors:
            self.first = GatedBlock(n_features, half, activate=True)
            self.second: nn.Module = GatedBlock(half, 1, vectors=False)
        else:
            self.first = nn.Linear(n_features, half)
            self.second = nn.Linear(half, 1)

    def forward(self, features: Features) -> Tensor:
        """Return atomic energies ``[N]`` in the network's own unit."""
        if features.vectors is None:
            return self.second(functional.silu(self.first(features.scalars))).squeeze(-1)
        energy, _ = self.second(*self.first(features.scalars, features.vectors))
        return energy.squeeze(-1)


class VectorHead(nn.Module):
    """One vector per atom (a direct force or a predicted noise) through two gated blocks.

    Args:
        n_features: F of the backbone.
        has_vectors: must be true.

    Raises:
        ConfigError: the backbone has no vector features.
    """

    def __init__(self, n_features: int, has_vectors: bool = True) -> None:
        super().__init__()
        if not has_vectors:
            raise ConfigError(
                "a direct vector head needs a backbone with vector features: torchmd-et, painn or egnn; "
                "this one has scalars alone"
            )
        self.first = GatedBlock(n_features, n_features // 2, activate=True)
        self.second = GatedBlock(n_features // 2, 1, scalars=False)

    def forward(self, features: Features) -> Tensor:
        """Return vectors ``[N, 3]``."""
        _, vec = self.second(*self.first(features.scalars, features.vectors))
        return vec.squeeze(-1)
