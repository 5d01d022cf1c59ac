"""Bond lengths, angles and torsions against ASE and against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torch import Tensor

from ffpretrain.internal_coordinates import (
    InternalCoordinates,
    Terms,
    bond_angle,
    bond_length,
    dihedral,
    find_terms,
    wrapped,
)
from ffpretrain.molecules import find_bonds

NAMES = ("CH3CH2OH", "C6H6", "CH3CN", "CH3CONH2", "C3H4_D3h", "H2O", "H")


def terms_of(atoms: Atoms) -> Terms:
    return find_terms(atoms.positions, find_bonds(atoms.numbers, atoms.positions))


def batch() -> tuple[InternalCoordinates, Tensor, list[int]]:
    found = [molecule(name) for name in NAMES if name != "C3H4_D3h"] + [molecule("trans-butane")]
    pos = torch.from_numpy(np.concatenate([atoms.positions for atoms in found]))
    generator = torch.Generator().manual_seed(0)
    pos = pos + 0.05 * torch.randn(pos.shape, generator=generator, dtype=torch.float64)
    counts = [len(atoms) for atoms in found]
    return InternalCoordinates([terms_of(atoms) for atoms in found], counts), pos, counts


@pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "CH3CONH2"])
def test_values_are_ases(name: str) -> None:
    atoms = molecule(name)
    atoms.rattle(0.1, seed=3)
    terms, pos = terms_of(molecule(name)), torch.from_numpy(atoms.positions)
    lengths = [atoms.get_distance(*row) for row in terms.bonds.tolist()]
    angles = [atoms.get_angle(*row) for row in terms.angles.tolist()]
    torsions = [(atoms.get_dihedral(*row) + 180) % 360 - 180 for row in terms.torsions.tolist()]
    index = [torch.from_numpy(part.astype(np.int64)) for part in terms]
    np.testing.assert_allclose(bond_length(pos, index[0]), lengths, atol=1e-12)
    np.testing.assert_allclose(bond_angle(pos, index[1]).rad2deg(), angles, atol=1e-9)
    np.testing.assert_allclose(dihedral(pos, index[3]).rad2deg(), torsions, atol=1e-9)
    assert len(torsions) > 0


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("C2H6", (7, 12, 0, 9)),
        ("C6H6", (12, 18, 0, 24)),
        # cyclopropane: 6 torsions a ring bond end at one atom and are left out
        ("C3H6_D3h", (9, 18, 0, 24)),
        # acetonitrile: the straight angle has three components, no torsion goes over it
        ("CH3CN", (5, 6, 3, 0)),
        ("H2O", (2, 1, 0, 0)),
        ("H", (0, 0, 0, 0)),
    ],
)
def test_every_coordinate_is_found_once(name: str, sizes: tuple[int, ...]) -> None:
    terms = terms_of(molecule(name))
    assert tuple(len(part) for part in terms) == sizes
    assert terms.size == sum(sizes)
    for part in (terms.bonds, terms.angles, terms.torsions):
        rows = [min(tuple(row), tuple(row[::-1])) for row in part.tolist()]
        assert len(set(rows)) == len(rows)
        assert all(len({*row}) == len(row) for row in rows)


def test_wrapping_takes_the_short_way() -> None:
    angle = torch.tensor([0.1, 3.0, math.pi + 0.2, -math.pi - 0.2, 12.0, -3 * math.pi], dtype=torch.float64)
    expected = [0.1, 3.0, -math.pi + 0.2, math.pi - 0.2, 12.0 - 4 * math.pi, -math.pi]
    torch.testing.assert_close(wrapped(angle), torch.tensor(expected, dtype=torch.float64))


def test_differences_of_torsions_wrap_and_others_do_not() -> None:
    q, pos, _ = batch()
    values = q.values(pos)
    sizes = [len(index) for index in q.index]
    shifted = values + 6.0
    difference = q.difference(shifted, values).split(sizes)
    for part in difference[:3]:
        torch.testing.assert_close(part, torch.full_like(part, 6.0))
    torch.testing.assert_close(difference[3], torch.full_like(difference[3], 6.0 - 2 * math.pi))


def numerical(q: InternalCoordinates, pos: Tensor, h: float = 1e-5) -> Tensor:
    """Return dq/dx ``[K, N, 3]`` by central differences."""
    columns = []
    for direction in torch.eye(pos.numel(), dtype=torch.float64).view(-1, *pos.shape):
        change = q.difference(q.values(pos + h * direction), q.values(pos - h * direction))
        columns.append(change / (2 * h))
    return torch.stack(columns, dim=1).view(-1, *pos.shape)


def test_gradients_are_finite_differences() -> None:
    q, pos, _ = batch()
    expected = numerical(q, pos)
    for k in (0, 20, 60, 100, len(expected) - 1):
        one = torch.zeros(len(expected), dtype=torch.float64)
        one[k] = 1.0
        torch.testing.assert_close(q.gradient_of_sum(one, pos), expected[k], rtol=0, atol=1e-8)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    total = torch.einsum("k,knx->nx", weights, expected)
    torch.testing.assert_close(q.gradient_of_sum(weights, pos), total, rtol=0, atol=1e-7)


def test_matrices_list_the_coordinates_of_each_structure() -> None:
    q, pos, counts = batch()
    weights = torch.linspace(0.5, 2, len(q.place), dtype=torch.float64)
    matrices = q.matrices(pos, weights)
    expected = weights.view(-1, 1, 1) * numerical(q, pos)
    start = 0
    for b, n in enumerate(counts):
        own = expected[q.structure == b][:, start : start + n]
        own = own[q.place[q.structure == b].argsort()]
        torch.testing.assert_close(matrices[b, : len(own), :n], own, rtol=0, atol=1e-7)
        assert not bool(matrices[b, len(own) :].any())
        assert not bool(matrices[b, :, n:].any())
        start += n
    listed = q.listed(weights)
    assert float(listed.sum()) == pytest.approx(float(weights.sum()))
    assert torch.equal(listed[0, : int((q.structure == 0).sum())].sort().values, weights[q.structure == 0])


@pytest.mark.parametrize(
    ("degrees", "sizes"),
    [(178.0, (3, 1, 3, 0)), (170.0, (3, 2, 0, 0)), (160.0, (3, 2, 0, 1))],
)
def test_what_counts_as_straight(degrees: float, sizes: tuple[int, ...]) -> None:
    angle = math.radians(degrees)
    chain = [[0.5, 1.0, 0.9], [0, 0, 0], [1.4, 0, 0], [1.4 - 1.4 * math.cos(angle), 1.4 * math.sin(angle), 0]]
    terms = find_terms(np.array(chain), np.array([[0, 1, 1], [1, 2, 1], [2, 3, 1]]))
    assert tuple(len(part) for part in terms) == sizes


def test_a_straight_angle_bends_alike_in_all_directions() -> None:
    pos = torch.tensor([[0.0, 0.0, -1.1], [0.0, 0.0, 0.0], [0.0, 0.0, 1.2]], dtype=torch.float64)
    terms = find_terms(pos.numpy(), np.array([[0, 1, 1], [1, 2, 1]]))
    assert [len(part) for part in terms] == [2, 0, 3, 0]
    q = InternalCoordinates([terms], [3])
    assert float(q.values(pos)[2:].norm()) < 1e-15
    for side in ([1.0, 0.0], [0.6, 0.8]):
        bent = pos.clone()
        bent[1, :2] = 0.05 * torch.tensor(side, dtype=torch.float64)
        angle = bond_angle(bent, torch.tensor([[0, 1, 2]]))[0]
        assert float(q.values(bent)[2:].norm()) == pytest.approx(2 * math.cos(float(angle) / 2), abs=1e-12)
        assert math.pi - float(angle) == pytest.approx(2 * math.cos(float(angle) / 2), rel=1e-3)
    assert float(q.straightened(q.values(bent))[2:].norm()) == 0
