"""What moves the atoms of a run: ASE's integrators, or an engine with positions and velocities of its own."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.typing import NDArray

from ffpretrain.datasets.sampling import fixed_atoms
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md.batch_model import BatchModel
from ffpretrain.md.calculator import FFCalculator
from ffpretrain.md.integrators import ENSEMBLES, Integrator

if TYPE_CHECKING:
    from ase import Atoms

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Engine:
    """What an engine can do in a run; the rest is refused before anything is written.

    Attributes:
        ensembles: names of :data:`~ffpretrain.md.integrators.ENSEMBLES`.
        place: module and class of its :class:`EngineIntegrator`; empty for ASE's integrators.
        fixed_atoms: it can hold atoms fixed.
        some_directions: it takes structures of which only some directions repeat.
    """

    ensembles: tuple[str, ...]
    place: str = ""
    fixed_atoms: bool = False
    some_directions: bool = False


ENGINES: dict[str, Engine] = {
    "ase": Engine(tuple(ENSEMBLES), fixed_atoms=True, some_directions=True),
    "openmm": Engine(
        ("nve", "nvt-langevin"),
        "ffpretrain.md.openmm_engine:OpenMMIntegrator",
        fixed_atoms=True,
        some_directions=True,
    ),
    "torchmd": Engine(("nve", "nvt-langevin"), "ffpretrain.md.torchmd:TorchMDIntegrator"),
    "torch-sim": Engine(("nve", "nvt-langevin"), "ffpretrain.md.torchsim:TorchSimIntegrator"),
}


class Motion(NamedTuple):
    """Where an engine is after a step.

    Attributes:
        positions: ``[N, 3]`` Å, not wrapped into the cell.
        momenta: ``[N, 3]`` in ASE's units.
        energy: potential energy in eV.
        forces: ``[N, 3]`` eV/Å.
        stress: ``[3, 3]`` eV/Å³, or None.
    """

    positions: Array
    momenta: Array
    energy: float
    forces: Array
    stress: Array | None = None


class EngineIntegrator(Integrator, ABC):
    """Moves ``atoms`` by an engine and hands its energy and forces on as their calculator's results.

    Args:
        ensemble: ``nve`` or ``nvt-langevin``.
        calculator: the model; the engine shares its runtime.
        others: those of :class:`~ffpretrain.md.integrators.Integrator`.
    """

    def __init__(self, ensemble: str, calculator: FFCalculator, *others: Any) -> None:
        super().__init__(*others)
        self.calculator, self.friction_per_fs = calculator, float(others[3])
        self.thermostatted = self.rotation_is_free = ensemble == "nvt-langevin"
        self.conserves = not self.thermostatted
        if self.thermostatted:
            # the noise of these engines moves the centre of mass as well
            self.dof = 3 * (len(self.atoms) - len(fixed_atoms(self.atoms)))

    @abstractmethod
    def load(self) -> Motion:
        """Take positions and momenta from the atoms; return them with energy and forces."""

    @abstractmethod
    def advance(self) -> Motion:
        """Do one step."""

    def begin(self) -> None:
        """See :class:`~ffpretrain.md.integrators.Integrator`."""
        self.publish(self.load())

    def step(self) -> None:
        """See :class:`~ffpretrain.md.integrators.Integrator`."""
        self.publish(self.advance())

    def publish(self, motion: Motion) -> None:
        """Put a step into the atoms."""
        self.atoms.set_positions(motion.positions, apply_constraint=False)
        self.atoms.set_momenta(motion.momenta, apply_constraint=False)
        labels: dict[str, Any] = {"energy": motion.energy, "free_energy": motion.energy}
        labels["forces"] = motion.forces
        if motion.stress is not None:
            labels["stress"] = motion.stress.ravel()[[0, 4, 8, 5, 2, 1]]
        self.atoms.calc = SinglePointCalculator(self.atoms, **labels)


class TorchIntegrator(EngineIntegrator):
    """An engine whose state is two tensors, and whose noise comes from torch's own generators.

    Those are put aside while it steps: it draws from a stream of its own, which the restart file holds.
    """

    def __init__(self, ensemble: str, calculator: FFCalculator, *others: Any) -> None:
        super().__init__(ensemble, calculator, *others)
        runtime = calculator.runtimes[0]
        self.device = runtime.device
        self.model = BatchModel(runtime, calculator.familiarities[0], own_molecules_only=False)
        seed = int(self.rng.integers(2**63))
        self._random = torch.Generator(self.device).manual_seed(seed).get_state()

    @abstractmethod
    def raw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions and velocities or momenta as the engine holds them."""

    @abstractmethod
    def set_raw(self, positions: torch.Tensor, velocities: torch.Tensor) -> Motion:
        """Put them in place and evaluate the forces."""

    def motion(self, positions: Array, momenta: Array) -> Motion:
        """Return a step with what the model last said."""
        last = self.model.last
        repeats = last.stress is not None and all(self.atoms.pbc)
        return Motion(
            positions,
            momenta,
            float(last.energy[0]),
            last.forces.cpu().numpy().copy(),
            last.stress[0].cpu().numpy() if repeats and last.stress is not None else None,
        )

    @contextmanager
    def own_noise(self) -> Iterator[None]:
        """Let torch's generator be this run's inside the block, and what it was after it."""
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            if cuda:
                torch.cuda.set_rng_state(self._random, self.device)
            else:
                torch.set_rng_state(self._random)
            yield
            self._random = torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()

    def state(self) -> dict[str, Any]:
        """See :class:`~ffpretrain.md.integrators.Integrator`."""
        positions, velocities = (t.cpu().tolist() for t in self.raw())
        noise = self._random.cpu().numpy().tobytes().hex()
        return {"positions": positions, "velocities": velocities, "noise": noise}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`~ffpretrain.md.integrators.Integrator`."""
        self._random = torch.frombuffer(bytearray.fromhex(state["noise"]), dtype=torch.uint8)
        raw = (torch.tensor(state[key], dtype=torch.float64) for key in ("positions", "velocities"))
        motion = self.set_raw(*(tensor.to(self.device) for tensor in raw))
        # the atoms are where the restart file put them, to the last bit
        self.publish(motion._replace(positions=self.atoms.positions, momenta=self.atoms.get_momenta()))


def make_integrator(
    engine: str, ensemble: str, atoms: Atoms, calculator: BaseCalculator, *options: Any
) -> Integrator:
    """Return what moves the atoms of a run.

    Args:
        engine: one of :data:`ENGINES`.
        ensemble: one that the engine has.
        atoms: with the calculator attached; moved in place.
        calculator: evaluates the structure.
        *options: timestep in fs, temperature in K, friction in 1/fs and the random generator.

    Raises:
        ConfigError: the engine needs a single model of this package.
        UnsupportedInputError: the structure has what the engine cannot do.
        MissingDependencyError: the engine's package is not installed.
    """
    able = ENGINES[engine]
    if not able.place:
        return ENSEMBLES[ensemble](atoms, *options)
    if not isinstance(calculator, FFCalculator) or len(calculator.runtimes) > 1:
        raise ConfigError(
            f"engine {engine} runs one model of this package, no committee and no other calculator; use "
            "engine ase for those"
        )
    if len(fixed_atoms(atoms)) and not able.fixed_atoms:
        raise UnsupportedInputError(f"engine {engine} cannot hold atoms fixed; use engine ase")
    if any(atoms.pbc) and not all(atoms.pbc) and not able.some_directions:
        raise UnsupportedInputError(
            f"engine {engine} needs a structure that repeats in all directions or in none; use engine ase"
        )
    module, name = able.place.split(":")
    integrator: type[EngineIntegrator] = getattr(importlib.import_module(module), name)
    return integrator(ensemble, calculator, atoms, *options)
