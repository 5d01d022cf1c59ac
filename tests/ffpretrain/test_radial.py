"""Radial functions: values against their formula, and no subnormal numbers in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ffpretrain.backbones.radial import ExpNormalBasis, GaussianBasis, cosine_cutoff

DISTANCES = torch.linspace(0.0, 5.0, 2001, dtype=torch.float64)


def published(basis: ExpNormalBasis | GaussianBasis, distance: Tensor) -> Tensor:
    d = distance.unsqueeze(-1)
    if isinstance(basis, GaussianBasis):
        return torch.exp(-((d - basis.centers) ** 2) / (2 * basis.widths**2))
    spread = torch.exp(-basis.betas * (torch.exp(-5.0 / basis.cutoff * d) - basis.means) ** 2)
    return 0.5 * (torch.cos(math.pi * d / basis.cutoff) + 1) * (d < basis.cutoff) * spread


@pytest.mark.parametrize("kind", [ExpNormalBasis, GaussianBasis])
def test_values_are_the_formula_up_to_a_tail_below_rounding(kind: type) -> None:
    basis = kind(32, 5.0).double()
    assert torch.allclose(basis(DISTANCES), published(basis, DISTANCES), rtol=1e-12, atol=5e-18)


@pytest.mark.parametrize("kind", [ExpNormalBasis, GaussianBasis])
def test_no_value_or_slope_is_subnormal(kind: type) -> None:
    basis = kind(64, 5.0)
    # the last point is left out: the cutoff function itself ends there
    distance = DISTANCES[:-1].to(torch.float32).requires_grad_(True)
    value = basis(distance)
    slopes = torch.stack([torch.autograd.grad(v.sum(), distance, retain_graph=True)[0] for v in value.T])
    tiny = torch.finfo(torch.float32).tiny
    for found in (value, slopes):
        small = (found != 0) & (found.abs() < tiny)
        assert not bool(small.any())
    # the same formula without its tail cut does have subnormal values, so this test can fail
    untamed = published(basis, distance)
    assert bool(((untamed != 0) & (untamed.abs() < tiny)).any())


def test_cosine_cutoff_ends_smoothly() -> None:
    d = torch.tensor([0.0, 2.5, 5.0 - 1e-6, 5.0, 7.0], dtype=torch.float64, requires_grad=True)
    weight = cosine_cutoff(d, 5.0)
    assert torch.allclose(weight, torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64), atol=1e-12)
    (slope,) = torch.autograd.grad(weight.sum(), d)
    assert float(slope[2:].abs().max()) < 1e-6
