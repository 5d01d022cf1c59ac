"""``ffpretrain md --engine openmm``: OpenMM's integrators move the atoms of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.datasets.sampling import fixed_atoms
from ffpretrain.errors import MissingDependencyError, UserError
from ffpretrain.md.calculator import FFCalculator
from ffpretrain.md.engines import EngineIntegrator, Motion
from ffpretrain.md.paths import Evaluation

try:
    import openmm
    from openmm.unit import angstrom, nanometer, picosecond
except ImportError as error:
    raise MissingDependencyError(
        f'OpenMM cannot be imported ({error}); pip install "ffpretrain[openmm]"'
    ) from error

_ANGSTROM_PER_NM = units.LENGTH_UNITS["nm"]
_FS_PER_PS = 1000.0


class OpenMMIntegrator(EngineIntegrator):
    """Velocity Verlet, or OpenMM's Langevin integrator (``LangevinMiddleIntegrator``).

    It runs on OpenMM's CUDA platform where the model is on a GPU and OpenMM has that platform, else on the
    Reference platform, which computes in double precision. The cell, which no ensemble here changes, is the
    model's affair: OpenMM sees atoms in a vacuum and wraps none.

    Velocities of the Langevin integrator are half a step behind, as OpenMM has them; their distribution is
    that of the temperature.
    """

    def __init__(self, ensemble: str, calculator: FFCalculator, *others: Any) -> None:
        super().__init__(ensemble, calculator, *others)
        self._runtime, self._familiarity = calculator.runtimes[0], calculator.familiarities[0]
        self._failure: UserError | None = None
        self._cached: tuple[NDArray[np.float64], Evaluation] | None = None
        self._held = fixed_atoms(self.atoms)
        held = set(self._held.tolist())
        system = openmm.System()
        for index, mass in enumerate(self.atoms.get_masses()):
            system.addParticle(0.0 if index in held else mass)
        system.addForce(openmm.PythonForce(self._energy_and_forces))
        integrator = self._langevin() if self.thermostatted else self._verlet()
        self._context = openmm.Context(system, integrator, self._platform())

    def load(self) -> Motion:
        """See :class:`~ffpretrain.md.engines.EngineIntegrator`."""
        self._context.setPositions(self.atoms.positions / _ANGSTROM_PER_NM)
        # OpenMM wants nm/ps
        scale = units.FS * _FS_PER_PS / _ANGSTROM_PER_NM
        self._context.setVelocities(self.atoms.get_velocities() * scale)
        return self._motion()

    def advance(self) -> Motion:
        """See :class:`~ffpretrain.md.engines.EngineIntegrator`."""
        try:
            self._context.getIntegrator().step(1)
        except openmm.OpenMMException:
            if self._failure is not None:
                raise self._failure from None
            raise
        return self._motion()

    def state(self) -> dict[str, Any]:
        """See :class:`~ffpretrain.md.integrators.Integrator`."""
        return {"checkpoint": self._context.createCheckpoint().hex()}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`~ffpretrain.md.integrators.Integrator`."""
        self._context.loadCheckpoint(bytes.fromhex(state["checkpoint"]))
        motion = self._motion()
        self.publish(motion._replace(positions=self.atoms.positions, momenta=self.atoms.get_momenta()))

    def _motion(self) -> Motion:
        state = self._context.getState(positions=True, velocities=True)
        positions = state.getPositions(asNumpy=True).value_in_unit(angstrom)
        velocities = state.getVelocities(asNumpy=True).value_in_unit(nanometer / picosecond)
        scale = _ANGSTROM_PER_NM / _FS_PER_PS / units.FS
        found = self._evaluate(positions)
        # those of OpenMM have been divided by ten and multiplied again
        positions[self._held] = self.atoms.positions[self._held]
        return Motion(
            positions,
            velocities * scale * self.atoms.get_masses()[:, None],
            float(found.energy or 0.0),
            np.array(found.forces),
            found.stress,
        )

    def _evaluate(self, positions: NDArray[np.float64]) -> Evaluation:
        """Evaluate positions ``[N, 3]`` Å, once: integrators ask again for those that a step ended with."""
        if self._cached is None or not np.array_equal(self._cached[0], positions):
            atoms = self.atoms
            found = self._runtime.evaluate(atoms.numbers, positions, atoms.cell.array, atoms.pbc)
            least = self._familiarity.min_distance
            if least is not None and found.shortest < least:
                moved = atoms.copy()
                moved.set_positions(positions, apply_constraint=False)
                self._familiarity.check_distance(found.shortest, moved)
            self._cached = positions.copy(), found
        return self._cached[1]

    def _energy_and_forces(self, state: openmm.State) -> tuple[float, NDArray[np.float64]]:
        """Return the energy in kJ/mol and forces ``[N, 3]`` in kJ/mol/nm of a state."""
        try:
            found = self._evaluate(state.getPositions(asNumpy=True).value_in_unit(angstrom))
        except UserError as error:
            self._failure = error  # OpenMM would make another kind of error of it
            raise
        scale = 1.0 / units.KJ_PER_MOL
        return float(found.energy or 0.0) * scale, np.array(found.forces) * (scale * _ANGSTROM_PER_NM)

    def _verlet(self) -> openmm.CustomIntegrator:
        """Return velocity Verlet: OpenMM's own has velocities of another time than its positions."""
        integrator = openmm.CustomIntegrator(self.timestep / units.FS / _FS_PER_PS)
        integrator.addComputePerDof("v", "v + 0.5 * dt * f / m")
        integrator.addComputePerDof("x", "x + dt * v")
        integrator.addComputePerDof("v", "v + 0.5 * dt * f / m")
        return integrator

    def _langevin(self) -> openmm.LangevinMiddleIntegrator:
        rate = self.friction_per_fs * _FS_PER_PS
        step = self.timestep / units.FS / _FS_PER_PS
        integrator = openmm.LangevinMiddleIntegrator(self.temperature, rate, step)
        # 0 would mean the clock
        integrator.setRandomNumberSeed(int(self.rng.integers(1, 2**31 - 1)))
        return integrator

    def _platform(self) -> openmm.Platform:
        names = {openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())}
        wanted = "CUDA" if self._runtime.device.type == "cuda" and "CUDA" in names else "Reference"
        return openmm.Platform.getPlatformByName(wanted)
