"""Neighbour lists against ASE's, pair by pair, in and out of cells of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.geometry import minkowski_reduce
from ase.neighborlist import primitive_neighbor_list
from numpy.typing import NDArray

from ffpretrain.errors import UnsupportedInputError
from ffpretrain.neighbors import DENSE_LIMIT, neighbor_list

Array = NDArray[np.float64]


def rows(center: Array, neighbor: Array, vector: Array) -> Array:
    """Sort pairs, so that two lists can be compared."""
    table = np.column_stack([center, neighbor, np.round(vector, 7) + 0.0])
    return table[np.lexsort(table.T[::-1])]


def assert_same_as_ase(pos: Array, cutoff: float, cell: Array | None, pbc: list[bool]) -> int:
    box = np.eye(3) if cell is None else cell
    i, j, vector = primitive_neighbor_list("ijD", pbc, box, pos, cutoff, self_interaction=False)
    xyz = torch.tensor(pos)
    edges, shift = neighbor_list(xyz, cutoff, None if cell is None else torch.tensor(cell), pbc)
    ours = (xyz[edges[0]] + shift - xyz[edges[1]]).numpy()
    np.testing.assert_allclose(rows(edges[1].numpy(), edges[0].numpy(), ours), rows(i, j, vector), atol=1e-6)
    assert (edges[1].diff() >= 0).all(), "not sorted by centre"
    return len(i)


@pytest.mark.parametrize("n", [1, 2, 30, DENSE_LIMIT, DENSE_LIMIT + 1, 400])
def test_molecules(n: int) -> None:
    rng = np.random.default_rng(n)
    pos = rng.uniform(-1, 1, size=(n, 3)) * n ** (1 / 3) * [1.5, 1.0, 0.7] + [50.0, -30.0, 0.0]
    found = assert_same_as_ase(pos, 2.0, None, [False] * 3)
    assert found > 0 or n <= 2


@pytest.mark.parametrize("seed", range(24))
def test_random_cells(seed: int) -> None:
    """Skewed, left-handed, small and large cells; every mix of directions; atoms inside or far outside."""
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * rng.uniform(1.5, 6)
    while abs(np.linalg.det(cell)) < 9 or np.linalg.norm(minkowski_reduce(cell)[0], axis=1).min() < 1:
        cell = rng.normal(size=(3, 3)) * rng.uniform(1.5, 6)
    pbc = [bool(b) for b in np.unravel_index(seed % 8, (2, 2, 2))]
    inside = rng.uniform(0, 1, size=(rng.integers(1, 9), 3)) + rng.integers(-2, 3) * (seed % 2)
    assert_same_as_ase(inside @ cell, rng.uniform(1, 5), cell, pbc)


def test_small_triclinic_cell_where_atoms_see_their_own_images() -> None:
    cell = np.array([[2.6, 0.0, 0.0], [1.2, 2.4, 0.0], [-0.9, 0.8, 2.7]])
    pos = np.array([[0.1, 0.2, 0.3]])
    found = assert_same_as_ase(pos, 5.5, cell, [True] * 3)
    assert found > 30
    edges, shift = neighbor_list(torch.tensor(pos), 5.5, torch.tensor(cell), [True] * 3)
    assert (edges == 0).all() and (shift.norm(dim=1) > 2).all()


def test_many_atoms_in_a_cell() -> None:
    rng = np.random.default_rng(0)
    cell = np.array([[14.0, 0.0, 0.0], [3.0, 15.0, 0.0], [0.0, 2.0, 13.0]])
    assert_same_as_ase(rng.uniform(-1, 2, size=(260, 3)) @ cell, 3.0, cell, [True, True, False])


def test_slab_without_a_third_vector() -> None:
    cell = np.array([[3.0, 0.0, 0.0], [0.5, 3.2, 0.0], [0.0, 0.0, 0.0]])
    pos = np.array([[0.0, 0.0, 0.0], [1.5, 1.5, 2.0], [0.2, 0.1, 30.0]])
    completed = np.array([*cell[:2], [0.0, 0.0, 1.0]])
    i, *_ = primitive_neighbor_list("ijD", [True, True, False], completed, pos, 4.0)
    edges, _ = neighbor_list(torch.tensor(pos), 4.0, torch.tensor(cell), [True, True, False])
    assert edges.shape[1] == len(i) > 0


@pytest.mark.parametrize("pbc", [[False] * 3, [True] * 3])
def test_a_pair_at_the_cutoff_is_left_out(pbc: list[bool]) -> None:
    pos = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    cell = 20 * torch.eye(3, dtype=torch.float64)
    assert neighbor_list(pos, 3.0, cell, pbc)[0].shape[1] == 0
    assert neighbor_list(pos, 3.0 + 1e-9, cell, pbc)[0].shape[1] == 2


def test_types_follow_the_positions() -> None:
    pos = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) * 4
    for cell, pbc in ((None, [False] * 3), (6 * torch.eye(3), [True] * 3)):
        edges, shift = neighbor_list(pos.requires_grad_(True), 3.0, cell, pbc)
        assert edges.dtype == torch.int64 and shift.dtype == torch.float32
        assert not shift.requires_grad


@pytest.mark.parametrize(
    ("pos", "cell", "pbc", "message"),
    [
        ([[0.0, 0, 0]], None, [True] * 3, "periodic but has no cell"),
        ([[0.0, 0, 0]], [[3.0, 0, 0], [0, 0, 0], [0, 0, 3.0]], [True, True, True], "direction 1 is periodic"),
        ([[0.0, 0, 0]], [[3.0, 0, 0], [6.0, 0, 0], [0, 0, 3.0]], [True] * 3, "cell has no volume"),
        ([[1.0, 2, 3], [0, 0, 0], [1, 2, 3]], None, [False] * 3, "atoms 0 and 2 are at the same place"),
        ([[0.0, 0, 0], [3.0, 0, 0]], [[3.0, 0, 0], [0, 5, 0], [0, 0, 5]], [True] * 3, "atoms 0 and 1 are at"),
    ],
)
def test_refusals(
    pos: list[list[float]], cell: list[list[float]] | None, pbc: list[bool], message: str
) -> None:
    box = None if cell is None else torch.tensor(cell, dtype=torch.float64)
    with pytest.raises(UnsupportedInputError, match=message):
        neighbor_list(torch.tensor(pos, dtype=torch.float64), 3.5, box, pbc)


@pytest.mark.parametrize(
    ("cell", "pbc", "n", "message"),
    [
        (np.diag([0.02, 0.02, 0.02]), [True] * 3, 1, r"is 0\.02 Å from its own image.*check the units"),
        (np.diag([9.0, 0.9, 9.0]), [False, True, True], 1, r"is 0\.9 Å from its own image"),
        (np.diag([1.5, 1.5, 1.5]), [True] * 3, 9, r"has 3\.38 Å³ for 9 atoms.*check the units"),
    ],
)
def test_cells_too_small_for_atoms(cell: Array, pbc: list[bool], n: int, message: str) -> None:
    pos = np.random.default_rng(0).uniform(0, 3, (n, 3))
    with pytest.raises(UnsupportedInputError, match=message) as caught:
        neighbor_list(torch.tensor(pos), 5.0, torch.tensor(cell), pbc)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (1.808 * (1 - np.eye(3)), [True] * 3),  # copper
        (np.array([[2.29, 0, 0], [1.14, 1.98, 0], [0, 0, 3.58]]), [True] * 3),  # beryllium
        (np.diag([1.28, 0.5, 0.5]), [True, False, False]),  # a chain of carbon; other widths mean nothing
        (np.array([[2.5, 0, 0], [25.0, 2.5, 0], [0, 0, 2.5]]), [True] * 3),  # a cube by skewed vectors
    ],
)
def test_primitive_cells_stay(cell: Array, pbc: list[bool]) -> None:
    assert assert_same_as_ase(np.zeros((1, 3)), 5.0, cell, pbc) >= 6
