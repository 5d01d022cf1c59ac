"""The model under examination, its structure, and the calculators that evaluate it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ffpretrain.datasets.structures import read_structure
from ffpretrain.errors import ConfigError, DataError, UnsupportedInputError
from ffpretrain.graphs import Graph, graph_from_atoms
from ffpretrain.md.calculator import FFCalculator, Model, load_model
from ffpretrain.md.runtime import CompileOption, Runtime
from ffpretrain.md.unfamiliar import Familiarity

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.artifacts import ModelCard


class Subject:
    """A model and one structure it is examined on.

    Args:
        model: a name, a model file or a potential.
        structure: a file or ``ase.Atoms``; None takes the model's own reference geometry.
        device: as for :class:`~ffpretrain.FFCalculator`.
        dtype: precision of the dynamics.
        compile: whether the dynamics are compiled.
        seed: of every random draw.

    Attributes:
        exact: calculator in float64, never compiled.
        working: calculator as simulations use it.
        atoms: the structure, without calculator.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: a committee, a model without energies, or an unknown option.
        DataError: no structure, one with constraints, or one that cannot be read.
        UnsupportedInputError: the model cannot evaluate the structure.
        NonFiniteError: its energy or forces are not finite.
    """

    def __init__(
        self,
        model: Model,
        structure: Atoms | str | os.PathLike[str] | None = None,
        device: str = "auto",
        dtype: str = "float32",
        compile: CompileOption = "auto",
        seed: int = 0,
    ) -> None:
        if isinstance(model, list | tuple):
            raise ConfigError("one model is validated at a time, not a committee; give a name or a file")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed must be a whole number of at least 0, not {seed!r}")
        potential = load_model(model)
        self.seed = seed
        self.card: ModelCard | None = getattr(potential, "card", None)
        # engines get the potential itself: a file may be replaced while a validation runs
        self.source = potential
        # what is unfamiliar about the structure is said once, below
        self.exact = FFCalculator(potential, device, "float64", False, "ignore")
        self.working = FFCalculator(potential, device, dtype, compile, "ignore")
        own = self.card.name if self.card is not None else type(potential).__name__
        self.name: str = own if isinstance(model, nn.Module) else os.fspath(model)
        self.atoms = self._structure(structure)
        self._refuse_unusable()

    @property
    def runtime(self) -> Runtime:
        """The runtime of the dynamics."""
        return self.working.runtimes[0]

    @property
    def potential(self) -> nn.Module:
        """The model in float64 and eval mode, on the device."""
        return self.exact.runtimes[0].model

    @property
    def cutoff(self) -> float:
        """Largest distance of two neighbours in Å."""
        return self.runtime.cutoff

    @property
    def periodic(self) -> bool:
        """Whether the structure repeats (then in all three directions)."""
        return bool(self.atoms.pbc.any())

    def displaced(self, count: int, std: float) -> list[Atoms]:
        """Return copies of the structure with Gaussian displacements of ``std`` Å, drawn by the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        frames = []
        for _ in range(count):
            frame = self.atoms.copy()
            drawn = torch.randn(len(frame), 3, generator=generator, dtype=torch.float64)
            frame.positions += std * drawn.numpy()
            frames.append(frame)
        return frames

    def graph(self, atoms: Atoms) -> Graph:
        """Return a structure's graph on the model's device."""
        return graph_from_atoms(atoms, self.cutoff).to(self.runtime.device)

    def _structure(self, structure: Atoms | str | os.PathLike[str] | None) -> Atoms:
        if structure is not None:
            return read_structure(structure)[0]
        if self.card is None or self.card.reference_geometry is None:
            raise DataError("the model has no reference geometry of its own; give a structure")
        return self.card.reference_geometry.to_atoms()

    def _refuse_unusable(self) -> None:
        """Refuse what cannot be examined, before anything is run or written."""
        atoms = self.atoms
        if atoms.constraints:
            raise DataError("validation moves every atom; remove the structure's constraints")
        if atoms.pbc.any() and not atoms.pbc.all():
            raise UnsupportedInputError(
                "only molecules and structures that repeat in all three directions are validated; set "
                "atoms.pbc to True or False"
            )
        if len(atoms) < 2:
            raise DataError("a single atom has no forces to examine; give a structure of at least two")
        atoms.calc = None
        self.exact.calculate(atoms)
        if "energy" not in self.exact.results or "forces" not in self.exact.results:
            raise ConfigError("the model has no energy or no forces; validate needs a potential")
        familiarity = Familiarity(self.card, "warn")
        familiarity.check_structure(atoms)
        distances = atoms.get_all_distances(mic=True)[np.triu_indices(len(atoms), 1)]
        familiarity.check_distance(float(distances.min()), atoms)


def spread_of(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Return the largest absolute value; infinite where one is not finite, so that no comparison passes."""
    return float(np.abs(values).max()) if np.isfinite(values).all() else float("inf")
