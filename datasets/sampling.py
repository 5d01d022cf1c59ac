"""Geometries of one structure: dynamics at a temperature, normal modes, Gaussian displacement.

A sampler gives one geometry after another, each draw from the generator it was given, and can say and take
back the state it is in, so that an interrupted series goes on as if it had not been.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.datasets.modes import normal_modes, wavenumbers
from ffpretrain.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from ase import Atoms

Positions = NDArray[np.float64]
Report = Callable[[str], None]


class EngineFailure(Exception):
    """The engine gave no energy or forces for one geometry; the sampler can go on with the next."""


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turn the errors by which an ASE calculator says that it failed into :class:`EngineFailure`."""
    from ase.calculators.calculator import CalculatorError

    try:
        yield
    except (CalculatorError, np.linalg.LinAlgError, FloatingPointError) as error:
        lines = str(error).strip().splitlines()
        raise EngineFailure(lines[0] if lines else type(error).__name__) from error


@dataclass(frozen=True)
class Sampling:
    """How geometries are made.

    Attributes:
        method: ``dynamics``, ``normal-modes`` or ``gaussian``.
        temperature: K, of the dynamics or of the Boltzmann distribution of the normal modes.
        timestep: fs, of the dynamics.
        spacing: fs between two geometries of the dynamics.
        equilibration: fs of dynamics before the first geometry.
        friction: 1/fs, of the Langevin thermostat.
        std: Å, standard deviation of each coordinate's Gaussian displacement.
        lowest_mode: 1/cm; normal modes below it are left out, for a harmonic picture of them is wrong.
    """

    method: str = "dynamics"
    temperature: float = 500.0
    timestep: float = 0.5
    spacing: float = 40.0
    equilibration: float = 2000.0
    friction: float = 0.01
    std: float = 0.05
    lowest_mode: float = 50.0

    def __post_init__(self) -> None:
        if self.method not in _SAMPLERS:
            raise ConfigError(f"unknown sampling method {self.method!r}{nearest(self.method, _SAMPLERS)}")
        for name in ("temperature", "timestep", "spacing", "friction", "std"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, not {value}")
        for name in ("equilibration", "lowest_mode"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be zero or a positive number, not {value}")
        if self.spacing < self.timestep:
            raise ConfigError(
                f"spacing ({self.spacing} fs) must be at least one timestep ({self.timestep} fs)"
            )

    def used(self) -> dict[str, Any]:
        """Return the method and those settings that it looks at."""
        chosen = asdict(self)
        return {name: chosen[name] for name in ("method", *_SAMPLERS[self.method].settings)}


class Sampler(ABC):
    """A series of geometries of ``atoms``.

    Args:
        atoms: the structure with its calculator attached; constrained atoms (``FixAtoms``) stay in place.
        sampling: the settings.
        rng: every draw comes from it.
        report: called with one line when something is worth knowing.
    """

    settings: tuple[str, ...] = ()

    def __init__(
        self, atoms: Atoms, sampling: Sampling, rng: np.random.Generator, report: Report = lambda line: None
    ) -> None:
        self.atoms = atoms.copy()
        self.atoms.calc = atoms.calc
        self.sampling = sampling
        self.rng = rng
        self.report = report
        self.free = np.ones(len(atoms), bool)
        self.free[fixed_atoms(atoms)] = False
        if not self.free.any():
            raise DataError("every atom is fixed: there is nothing to sample; free some atoms")

    @abstractmethod
    def next(self) -> Positions:
        """Return the next geometry, ``[N, 3]`` Å.

        Raises:
            EngineFailure: the engine failed on the way; calling again goes on.
        """

    def state(self) -> dict[str, Any]:
        """Return the state between two geometries as JSON-able values."""
        return {"rng": copy.deepcopy(self.rng.bit_generator.state)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that :meth:`state` returned."""
        self.rng.bit_generator.state = state["rng"]


class GaussianSampler(Sampler):
    """Independent normal displacements of every free coordinate around the structure given."""

    settings = ("std",)

    def next(self) -> Positions:
        """Return the structure plus displacements with standard deviation ``std`` Å."""
        noise = self.rng.standard_normal((len(self.atoms), 3)) * self.sampling.std
        return np.asarray(self.atoms.positions + noise * self.free[:, None])


class DynamicsSampler(Sampler):
    """Snapshots of Langevin dynamics (ASE's integrator), ``spacing`` fs apart after an equilibration.

    A structure that repeats in no direction and has no fixed atom is drawn back to its centre of mass, which
    diffuses freely under a Langevin thermostat; nothing that depends on the geometry alone changes by that.
    """

    settings = ("temperature", "timestep", "spacing", "equilibration", "friction")
    LONGEST_STEP = 1.0  # Å within one timestep: the atoms are flying apart

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._started = False
        self._good: tuple[Positions, Positions] | None = None
        self._start = self.atoms.positions.copy()
        self._floating = not self.atoms.pbc.any() and bool(self.free.all())

    def next(self) -> Positions:
        """Run to the next snapshot; after a failure, from the last good one with fresh velocities."""
        length = self.sampling.spacing
        if not self._started:
            self._thermalise(self._start)
            length += self.sampling.equilibration
        self._run(max(1, round(length / self.sampling.timestep)))
        self._started = True
        self._good = (self.atoms.positions.copy(), self.atoms.get_momenta())
        centre = self.atoms.get_center_of_mass() if self._floating else 0.0
        return np.asarray(self.atoms.positions - centre)

    def state(self) -> dict[str, Any]:
        """Return random state, positions and momenta."""
        if self._good is None:
            return super().state()
        positions, momenta = self._good
        return {**super().state(), "positions": positions.tolist(), "momenta": momenta.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a snapshot with its velocities and random state."""
        super().restore(state)
        if "positions" in state:
            self._good = (np.array(state["positions"]), np.array(state["momenta"]))
            self.atoms.set_positions(self._good[0], apply_constraint=False)
            self.atoms.set_momenta(self._good[1], apply_constraint=False)
            self._started = True

    def _thermalise(self, positions: Positions) -> None:
        """Put the atoms at ``positions`` with velocities of the Maxwell-Boltzmann distribution."""
        width = np.sqrt(self.atoms.get_masses() * units.KB * self.sampling.temperature)
        momenta = self.rng.standard_normal((len(self.atoms), 3)) * width[:, None] * self.free[:, None]
        self.atoms.set_positions(positions, apply_constraint=False)
        self.atoms.set_momenta(momenta, apply_constraint=False)

    def _run(self, steps: int) -> None:
        from ase.md.langevin import Langevin

        dynamics = Langevin(
            self.atoms,
            timestep=self.sampling.timestep * units.FS,
            temperature_K=self.sampling.temperature,
            friction=self.sampling.friction / units.FS,
            fixcm=False,  # holding the centre of mass does not sample the canonical distribution
            rng=self.rng,
        )
        for _ in range(steps):
            before = self.atoms.positions.copy()
            try:
                with engine_errors():
                    dynamics.step()
                moved = np.abs(self.atoms.positions - before).max()
                if not moved < self.LONGEST_STEP:
                    raise EngineFailure(f"an atom moved {moved:.3g} Å in one step; use a smaller timestep")
            except EngineFailure:
                self._thermalise(self._good[0] if self._good else self._start)
                raise


class NormalModeSampler(Sampler):
    """Classical Boltzmann displacements along the vibrational modes of the nearest minimum.

    The mass-weighted Hessian is built from central differences of the forces at the minimum, translations and
    rotations are projected out, and each normal coordinate (Å √amu) with angular frequency ω is drawn from a
    normal distribution with variance kT/ω². Imaginary modes and modes below ``lowest_mode`` are left out.
    """

    settings = ("temperature", "lowest_mode")
    STEP = 0.005  # Å, of the finite differences
    FMAX = 0.005  # eV/Å, where the minimisation stops

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._minimise()
        squared, modes = self._modes()
        numbers = wavenumbers(squared)
        kept = numbers > self.sampling.lowest_mode
        if not kept.any():
            raise DataError(
                f"no vibrational mode lies above {self.sampling.lowest_mode} 1/cm; lower lowest_mode"
            )
        if not kept.all():
            left = ", ".join(f"{number:.0f}" for number in numbers[~kept])
            self.report(f"left out modes at {left} 1/cm (negative: imaginary); sampling {kept.sum()} modes")
        self.squared, self.modes = squared[kept], modes[kept]

    def next(self) -> Positions:
        """Return the minimum plus one draw of all normal coordinates."""
        spread = np.sqrt(units.KB * self.sampling.temperature / self.squared)
        drawn = self.rng.standard_normal(len(spread)) * spread
        shift = np.einsum("k,kij->ij", drawn, self.modes) / np.sqrt(self.atoms.get_masses())[:, None]
        return np.asarray(self.atoms.positions + shift)

    def _modes(self) -> tuple[NDArray[np.float64], Positions]:
        try:
            with engine_errors():
                return normal_modes(self.atoms, self.STEP, self.free)
        except EngineFailure as error:
            raise DataError(f"the forces for the normal modes failed: {error}") from error

    def _minimise(self) -> None:
        from ase.optimize import BFGS

        try:
            with engine_errors():
                converged = BFGS(self.atoms, logfile=None).run(
                    fmax=self.FMAX, steps=100 + 20 * len(self.atoms)
                )
        except EngineFailure as error:
            raise DataError(f"the minimisation before the normal modes failed: {error}") from error
        if not converged:
            raise DataError(
                f"the minimisation did not reach {self.FMAX} eV/Å; start from a better structure or use "
                "the method 'dynamics'"
            )


_SAMPLERS: dict[str, type[Sampler]] = {
    "dynamics": DynamicsSampler,
    "normal-modes": NormalModeSampler,
    "gaussian": GaussianSampler,
}
METHODS = tuple(_SAMPLERS)


def create_sampler(
    atoms: Atoms, sampling: Sampling, rng: np.random.Generator, report: Report = lambda line: None
) -> Sampler:
    """Return the sampler for ``sampling.method``; see :class:`Sampler` for the arguments."""
    return _SAMPLERS[sampling.method](atoms, sampling, rng, report)


def fixed_atoms(atoms: Atoms) -> NDArray[np.int64]:
    """Return the indices of atoms held by ``FixAtoms``.

    Raises:
        DataError: the structure has another kind of constraint, which no frame could keep.
    """
    from ase.constraints import FixAtoms

    held: set[int] = set()
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            kind = type(constraint).__name__
            raise DataError(f"the structure has a {kind} constraint; only FixAtoms is understood: remove it")
        held.update(int(index) for index in constraint.get_indices())
    return np.array(sorted(held), np.int64)
