"""Radial building blocks shared by the backbones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ffpretrain.errors import ConfigError

#: exponent beyond which a Gaussian counts as zero: exp(-40) is 4e-18
_TAIL = 40.0


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """Return ``(cos(pi d / cutoff) + 1) / 2`` inside the cutoff and 0 beyond (Behler 2011).

    Args:
        distance: Å, any shape.
        cutoff: Å.
    """
    inside = (distance < cutoff).to(distance.dtype)
    return 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1.0) * inside


def _bump(exponent: Tensor) -> Tensor:
    """Return ``exp(-exponent)``, with tails below 4e-18 put to zero.

    They are lost in rounding next to any other function of the basis, in float64 too, but their products fall
    into the subnormal range of float32, where a matrix product on a CPU takes up to forty times as long.
    """
    return torch.exp(-exponent) * (exponent < _TAIL).to(exponent.dtype)


class ExpNormalBasis(nn.Module):
    """Exponential-normal radial basis times the cosine cutoff (PhysNet, Unke and Meuwly 2019, eq. 7-8).

    Args:
        n: number of functions K.
        cutoff: Å.
        trainable: whether centres and widths are learned.
    """

    def __init__(self, n: int, cutoff: float, trainable: bool = True) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.alpha = 5.0 / cutoff
        start = math.exp(-cutoff)
        self.means = nn.Parameter(torch.linspace(start, 1.0, n), requires_grad=trainable)
        self.betas = nn.Parameter(torch.full((n,), (2.0 / n * (1.0 - start)) ** -2), requires_grad=trainable)

    def forward(self, distance: Tensor) -> Tensor:
        """Expand distances ``[...]`` in Å to ``[..., K]``."""
        d = distance.unsqueeze(-1)
        return cosine_cutoff(d, self.cutoff) * _bump(
            self.betas * (torch.exp(-self.alpha * d) - self.means).square()
        )


class GaussianBasis(nn.Module):
    """Gaussians as wide as the spacing of their centres, which run from zero to the cutoff (SchNet, 2017).

    They do not vanish at the cutoff: what is made of them must be multiplied by a cutoff function.

    Args:
        n: number of functions K, at least 2.
        cutoff: centre of the last function in Å.
        trainable: whether centres and widths are learned.

    Raises:
        ConfigError: fewer than two functions.
    """

    def __init__(self, n: int, cutoff: float, trainable: bool = False) -> None:
        super().__init__()
        if n < 2:
            raise ConfigError(f"rbf={n}: Gaussian radial functions need at least 2 centres")
        centers = torch.linspace(0.0, cutoff, n)
        self.centers = nn.Parameter(centers, requires_grad=trainable)
        self.widths = nn.Parameter(torch.full((n,), cutoff / (n - 1)), requires_grad=trainable)

    def forward(self, distance: Tensor) -> Tensor:
        """Expand distances ``[...]`` in Å to ``[..., K]``."""
        return _bump(0.5 * ((distance.unsqueeze(-1) - self.centers) / self.widths).square())
