"""The whitened norm of vector features, for reading weights that were trained with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EPSILON = 1e-5


class WhitenedNorm(nn.Module):
    """Makes the 3x3 covariance of an atom's vectors the unit matrix, as the code of Zaidi et al. (2023) does.

    Not equivariant: the regulariser ``diag(1, 2, 3) * 1e-5``, there to keep eigenvalues apart, singles out
    the axes of the frame. Vectors of size 1 come out wrong by about 5e-6 on rotation, vectors of size 0.01 by
    some per cent. For published weights only.

    Args:
        n_features: F.
    """

    regulariser: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_features))
        axes = _EPSILON * torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        self.register_buffer("regulariser", axes, persistent=False)

    def forward(self, vec: Tensor) -> Tensor:
        """Map vectors ``[N, 3, F]``; inside in float64, as an inverse root needs."""
        centered = vec.double() - vec.double().mean(-1, keepdim=True)
        covariance = centered @ centered.transpose(-1, -2) / vec.shape[-1] + self.regulariser.double()
        size, axes = torch.linalg.eigh(covariance)
        root = (axes * (size + _EPSILON).rsqrt().unsqueeze(-2)) @ axes.transpose(-1, -2)
        return (root @ centered).to(self.weight.dtype) * self.weight
