"""Radial building blocks shared by the backbones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """Return ``(cos(pi d / cutoff) + 1) / 2`` inside the cutoff and 0 beyond (Behler 2011).

    Args:
        distance: Å, any shape.
        cutoff: Å.
    """
    inside = (distance < cutoff).to(distance.dtype)
    return 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1.0) * inside


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
        bump = torch.exp(-self.betas * (torch.exp(-self.alpha * d) - self.means).square())
        return cosine_cutoff(d, self.cutoff) * bump
