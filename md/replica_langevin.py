"""Langevin dynamics of many copies of one structure at once, each at its own temperature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ffpretrain import units

#: positions ``[R, N, 3]`` Å to energies ``[R]`` eV and forces ``[R, N, 3]`` eV/Å
Forces = Callable[[Tensor], tuple[Tensor, Tensor]]
#: positions ``[R, N, 3]`` Å to which copies may take them, bool ``[R]``
Guard = Callable[[Tensor], Tensor]


class ReplicaLangevin:
    """Moves R copies of a structure by one step of BAOAB at a time (Leimkuhler and Matthews 2013, AMRX 34).

    Half a kick, half a drift, the exact solution of friction and noise for a whole step, half a drift, half
    a kick: one evaluation of the forces for each step. In a harmonic potential it samples positions exactly,
    whatever the timestep; without friction it is velocity Verlet. All 3N degrees of freedom are thermalised,
    so the temperature is twice the kinetic energy over 3N kB.

    A copy whose new positions the guard refuses, or whose energy or forces are not finite there, stops: it
    goes back to the positions before the step and stays. The others do not notice.

    Args:
        forces: evaluates all copies.
        masses: ``[N]`` amu.
        positions: ``[R, N, 3]`` Å, float64.
        velocities: ``[R, N, 3]`` Å/(Å √(amu/eV)); see :func:`maxwell_boltzmann`.
        temperatures: ``[R]`` K.
        timestep: fs.
        friction: 1/fs.
        generator: on the CPU; every draw comes from it.
        guard: None lets positions be whatever they are.
        alive: bool ``[R]``, copies that had not stopped in an earlier part of the run; None for all.

    Attributes:
        positions: ``[R, N, 3]`` Å.
        velocities: ``[R, N, 3]``.
        energy: ``[R]`` eV at the positions.
        attempted: ``[R, N, 3]`` Å, where the last step wanted to go.
        alive: bool ``[R]``, copies that have not stopped.
    """

    def __init__(
        self,
        forces: Forces,
        masses: Tensor,
        positions: Tensor,
        velocities: Tensor,
        temperatures: Tensor,
        timestep: float,
        friction: float,
        generator: torch.Generator,
        guard: Guard | None = None,
        alive: Tensor | None = None,
    ) -> None:
        self._evaluate, self._guard, self._generator = forces, guard, generator
        self.positions, self.velocities = positions.clone(), velocities.clone()
        self.attempted = self.positions
        self.temperatures, self.masses = temperatures, masses
        self._time = timestep * units.FS
        self._per_mass = (1.0 / masses).view(1, -1, 1)
        self._keep = float(torch.exp(torch.tensor(-friction * timestep, dtype=torch.float64)))
        width = (units.KB * temperatures.view(-1, 1, 1) * self._per_mass).sqrt()
        self._noise = width * (1.0 - self._keep**2) ** 0.5
        self.energy, self._forces = forces(self.positions)
        finite = _finite(self.energy, self._forces)
        self.alive = finite if alive is None else finite & alive
        self._stop()

    def step(self) -> Tensor:
        """Advance every living copy by one timestep.

        Returns:
            Which copies stopped in this step, bool ``[R]``.
        """
        half = 0.5 * self._time
        before = self.positions
        v = self.velocities + half * self._per_mass * self._forces
        x = before + half * v
        noise = torch.randn(v.shape, generator=self._generator, dtype=torch.float64).to(v.device)
        v = self._keep * v + self._noise * noise
        x = x + half * v
        self.attempted = x
        ok = torch.isfinite(x).flatten(1).all(1)
        if self._guard is not None:
            ok = ok & self._guard(x)
        ok = ok & self.alive
        x = torch.where(ok.view(-1, 1, 1), x, before)
        energy, forces = self._evaluate(x)
        ok = ok & _finite(energy, forces)
        stopped = self.alive & ~ok
        self.energy = torch.where(ok, energy, self.energy)
        self._forces = forces
        self.velocities = v + half * self._per_mass * forces
        self.positions = torch.where(ok.view(-1, 1, 1), x, before)
        self.alive = ok
        self._stop()
        return stopped

    def temperature(self) -> Tensor:
        """Return the kinetic temperature of each copy, ``[R]`` K."""
        twice = (self.velocities.square() * self.masses.view(1, -1, 1)).sum((1, 2))
        return twice / (3 * len(self.masses) * units.KB)

    def _stop(self) -> None:
        """Take velocities and forces from the copies that have stopped."""
        stopped = ~self.alive.view(-1, 1, 1)
        self.velocities = self.velocities.masked_fill(stopped, 0.0)
        self._forces = self._forces.masked_fill(stopped, 0.0)


def maxwell_boltzmann(masses: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """Draw velocities ``[R, N, 3]`` of the Maxwell-Boltzmann distribution, in ASE's unit √(eV/amu).

    Args:
        masses: ``[N]`` amu.
        temperatures: ``[R]`` K.
        generator: on the CPU.
    """
    drawn = torch.randn(len(temperatures), len(masses), 3, generator=generator, dtype=torch.float64)
    width = (units.KB * temperatures.view(-1, 1, 1) / masses.view(1, -1, 1)).sqrt()
    return drawn.to(masses.device) * width


def _finite(energy: Tensor, forces: Tensor) -> Tensor:
    return torch.isfinite(energy) & torch.isfinite(forces).flatten(1).all(1)
