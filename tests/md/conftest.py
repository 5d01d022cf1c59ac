"""Small potentials and molecules for the tests of dynamics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from torch import Tensor

from ffpretrain.artifacts import ModelCard, make_card, save_potential
from ffpretrain.backbones import create_backbone
from ffpretrain.graphs import Graph
from ffpretrain.potential import Potential

REFERENCE = {1: -13.6, 6: -1030.0, 8: -2040.0}


@pytest.fixture(scope="session")
def build_potential() -> Callable[..., Potential]:
    """Make an untrained potential with seeded weights for H, C and O."""

    def build(seed: int = 0, name: str = "torchmd-et", **options: Any) -> Potential:
        sizes = {"hidden": 16, "layers": 1, "heads": 2, "rbf": 8} if name == "torchmd-et" else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            backbone = create_backbone(name, **{**sizes, **options})
            return Potential(backbone, scale=0.5, reference_energies=REFERENCE).eval()

    return build


@pytest.fixture(scope="session")
def potential(build_potential: Callable[..., Potential]) -> Potential:
    """An untrained potential."""
    return build_potential()


@pytest.fixture
def ethanol() -> Atoms:
    return molecule("CH3CH2OH")


@pytest.fixture
def crystal() -> Atoms:
    """Four atoms in a skewed cell that is smaller than the cutoff."""
    positions = [[0.0, 0.0, 0.0], [1.1, 0.0, 0.0], [0.0, 1.3, 0.2], [3.6, 0.2, 1.0]]
    cell = [[4.0, 0.0, 0.3], [0.5, 3.7, 0.0], [0.0, 0.2, 4.2]]
    return Atoms("CHOH", positions=positions, cell=cell, pbc=True)


@pytest.fixture
def with_card(potential: Potential) -> Callable[..., Potential]:
    """Give the untrained potential a card that says it was trained on ethanol."""

    def attach(**fields: Any) -> Potential:
        card = make_card(potential, "tiny", **{"compositions": ["C2H6O"], **fields})
        twin = Potential(
            potential.backbone, potential.head, scale=0.5, reference_energies=REFERENCE, card=card
        )
        return twin.eval()

    return attach


@pytest.fixture
def model_file(tmp_path: Path, potential: Potential, ethanol: Atoms) -> Path:
    """An untrained potential on disk, with ethanol as its reference geometry."""
    geometry = {"numbers": ethanol.numbers.tolist(), "positions": ethanol.positions.tolist()}
    card: ModelCard = make_card(
        potential, "tiny", compositions=["C2H6O"], level_of_theory="none", reference_geometry=geometry
    )
    return save_potential(potential, tmp_path / "models" / "tiny.safetensors", card)


class Springs(Calculator):
    """A spring between every two atoms: smooth, invariant, bound at any temperature, and quick."""

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012

    def __init__(self, atoms: Atoms, stiffness: float = 5.0) -> None:
        super().__init__()
        self.rest, self.stiffness = atoms.get_all_distances(), stiffness

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        vector = self.atoms.positions[:, None] - self.atoms.positions[None]
        distance = np.sqrt((vector**2).sum(-1)) + np.eye(len(vector))
        stretch = (distance - self.rest) * (1 - np.eye(len(vector)))
        energy = 0.25 * self.stiffness * (stretch**2).sum()
        forces = -self.stiffness * (vector * (stretch / distance)[..., None]).sum(1)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


@pytest.fixture
def springs() -> Callable[[Atoms], Springs]:
    return Springs


@pytest.fixture
def methane() -> tuple[Atoms, Calculator]:
    """Methane at rest, and springs that hold it together."""
    atoms = molecule("CH4")
    return atoms, Springs(atoms)


class Morse(torch.nn.Module):
    """A Morse potential between every two atoms within a cutoff: bound, smooth, invariant and quick.

    Args:
        depth: eV, of a pair with a heavy atom; one of two hydrogens is a tenth as deep.
        smooth: False cuts it off where it is not zero.
    """

    def __init__(self, depth: float = 4.5, cutoff: float = 4.0, smooth: bool = True) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.depth = torch.nn.Parameter(torch.tensor(depth))
        self.smooth = smooth

    def energy(self, pos: Tensor, graph: Graph) -> Tensor:
        neighbor, center = graph.edge_index
        r = (pos[neighbor] + graph.edge_shift - pos[center]).norm(dim=1)
        hydrogens = (graph.z[neighbor] == 1) & (graph.z[center] == 1)
        depth, rest = torch.where(hydrogens, 0.1, 1.0) * self.depth, torch.where(hydrogens, 1.8, 1.1)
        x = ((r - 2.0) / (self.cutoff - 2.0)).clamp(0.0, 1.0)
        switch = 1 - x**3 * (10 - 15 * x + 6 * x**2) if self.smooth else 1.0
        pair = depth * ((1 - torch.exp(-1.8 * (r - rest))) ** 2 - 1) * switch
        return pos.new_zeros(graph.n_graphs).index_add(0, graph.batch[center], 0.5 * pair.to(pos.dtype))

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        differentiable = self.training and torch.is_grad_enabled()
        with torch.enable_grad():
            pos = graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_(True)
            energy = self.energy(pos, graph)
            (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=differentiable)
        forces = self.field(pos, -gradient)
        return {"energy": energy, "forces": forces}

    def field(self, pos: Tensor, forces: Tensor) -> Tensor:
        """Return the forces; a subclass may spoil them."""
        return forces


@pytest.fixture(scope="session")
def morse() -> type[Morse]:
    return Morse
