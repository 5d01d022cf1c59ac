"""The four ensembles: what moves the atoms, what it conserves, and what a continued run must know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.md.velocities import degrees_of_freedom, kinetic_energy

if TYPE_CHECKING:
    from ase import Atoms


class Integrator(ABC):
    """Moves ``atoms`` one step at a time.

    Args:
        atoms: with momenta and a calculator; moved in place.
        timestep: fs.
        temperature: K, of the thermostat.
        friction: 1/fs, rate at which the thermostat acts.
        rng: every draw comes from it.

    Attributes:
        dof: degrees of freedom that share the kinetic energy.
        conserves: whether potential, kinetic and bath energy have a constant sum.
    """

    rotation_is_free: bool = False
    conserves: bool = True

    def __init__(
        self, atoms: Atoms, timestep: float, temperature: float, friction: float, rng: np.random.Generator
    ) -> None:
        self.atoms, self.rng = atoms, rng
        self.timestep, self.rate = timestep * units.FS, friction / units.FS
        self.temperature = temperature
        self.dof = degrees_of_freedom(atoms, self.rotation_is_free)

    def begin(self) -> None:  # noqa: B027 (ASE's integrators read the atoms at each step)
        """Start from the positions and momenta the atoms have now; called once, before the first step."""

    @abstractmethod
    def step(self) -> None:
        """Advance positions and momenta by one timestep."""

    def bath_energy(self) -> float:
        """Return what has to be added to the total energy for a constant sum, in eV."""
        return 0.0

    def state(self) -> dict[str, Any]:
        """Return the thermostat's own variables as JSON-able values; by default it has none."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that :meth:`state` returned; by default there is nothing in it."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state of its own, but was given {sorted(state)}")


class VelocityVerlet(Integrator):
    """Constant energy (ASE's velocity Verlet)."""

    def __init__(self, *args: Any) -> None:
        from ase.md.verlet import VelocityVerlet as Dynamics

        super().__init__(*args)
        self._dynamics = Dynamics(self.atoms, timestep=self.timestep)

    def step(self) -> None:
        """See :class:`Integrator`."""
        self._dynamics.step()


class Langevin(Integrator):
    """Langevin dynamics (ASE's integrator, Vanden-Eijnden and Ciccotti 2006, eq. 23).

    The centre of mass is held by ASE's ``FixCom`` constraint: the ``fixcm`` option of the integrator itself
    does not sample the canonical distribution. Rotation is thermalised.
    """

    rotation_is_free = True
    conserves = False

    def __init__(self, *args: Any) -> None:
        from ase.constraints import FixCom
        from ase.md.langevin import Langevin as Dynamics

        super().__init__(*args)
        if not self.atoms.constraints:
            self.atoms.set_constraint(FixCom())
        self._dynamics = Dynamics(
            self.atoms,
            timestep=self.timestep,
            temperature_K=self.temperature,
            friction=self.rate,
            fixcm=False,
            rng=self.rng,
        )

    def step(self) -> None:
        """See :class:`Integrator`."""
        self._dynamics.step()


class Bussi(Integrator):
    """Stochastic velocity rescaling (ASE's integrator, Bussi et al. 2007), with time constant 1/friction.

    ASE counts 3N degrees of freedom; the right number is set after it is made.
    """

    def __init__(self, *args: Any) -> None:
        from ase.md.bussi import Bussi as Dynamics

        super().__init__(*args)
        self._dynamics = Dynamics(
            self.atoms,
            timestep=self.timestep,
            temperature_K=self.temperature,
            taut=1.0 / self.rate,
            rng=self.rng,
        )
        self._dynamics.ndof = self.dof
        self._dynamics.target_kinetic_energy = 0.5 * self.dof * units.KB * self.temperature

    def step(self) -> None:
        """See :class:`Integrator`."""
        self._dynamics.step()

    def bath_energy(self) -> float:
        """Return the heat given to the thermostat, in eV."""
        return -float(self._dynamics.transferred_energy)

    def state(self) -> dict[str, Any]:
        """See :class:`Integrator`."""
        return {"transferred_energy": float(self._dynamics.transferred_energy)}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`Integrator`."""
        self._dynamics.transferred_energy = state["transferred_energy"]


class NoseHooverChain(Integrator):
    """Nosé-Hoover chain of three thermostats (Martyna, Tuckerman, Tobias and Klein 1996, eq. 28-34).

    The chain acts for half a step before and after velocity Verlet, factorised in third-order Suzuki-Yoshida
    sub-steps. Its masses are ``Q_1 = g kT / friction²`` and ``Q_j = kT / friction²``. Own code, because ASE's
    couples to 3N degrees of freedom whatever is conserved, which makes small molecules too hot.
    """

    LENGTH = 3
    #: sums to 1; Yoshida 1990
    WEIGHTS = (1 / (2 - 2 ** (1 / 3)), 1 - 2 / (2 - 2 ** (1 / 3)), 1 / (2 - 2 ** (1 / 3)))

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kt = units.KB * self.temperature
        self._mass = np.full(self.LENGTH, self._kt / self.rate**2)
        self._mass[0] *= self.dof
        self._position = np.zeros(self.LENGTH)
        self._velocity = np.zeros(self.LENGTH)
        self._masses = self.atoms.get_masses()

    def step(self) -> None:
        """See :class:`Integrator`."""
        atoms, half = self.atoms, 0.5 * self.timestep
        momenta = self._thermostat(atoms.get_momenta()) + half * atoms.get_forces(md=True)
        atoms.set_positions(atoms.get_positions() + self.timestep * momenta / self._masses[:, None])
        momenta = momenta + half * atoms.get_forces(md=True)
        atoms.set_momenta(self._thermostat(momenta))

    def bath_energy(self) -> float:
        """Return kinetic and potential energy of the chain, in eV."""
        potential = self._kt * (self.dof * self._position[0] + self._position[1:].sum())
        return float(potential + 0.5 * (self._mass * self._velocity**2).sum())

    def state(self) -> dict[str, Any]:
        """See :class:`Integrator`."""
        return {"position": self._position.tolist(), "velocity": self._velocity.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`Integrator`."""
        self._position = np.array(state["position"])
        self._velocity = np.array(state["velocity"])

    def _thermostat(self, momenta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Let the chain act on momenta ``[N, 3]`` for half a timestep."""
        twice_kinetic = 2.0 * kinetic_energy(momenta, self._masses)
        scale = 1.0
        for weight in self.WEIGHTS:
            span = 0.5 * weight * self.timestep
            for j in reversed(range(self.LENGTH)):
                self._kick(j, 0.5 * span, scale**2 * twice_kinetic)
            scale *= float(np.exp(-span * self._velocity[0]))
            self._position += span * self._velocity
            for j in range(self.LENGTH):
                self._kick(j, 0.5 * span, scale**2 * twice_kinetic)
        return momenta * scale

    def _kick(self, j: int, span: float, twice_kinetic: float) -> None:
        """Accelerate thermostat ``j`` for a time ``span``, under the friction of the next one."""
        if j == 0:
            force = twice_kinetic - self.dof * self._kt
        else:
            force = self._mass[j - 1] * self._velocity[j - 1] ** 2 - self._kt
        drag = 1.0
        if j + 1 < self.LENGTH:
            drag = float(np.exp(-0.5 * span * self._velocity[j + 1]))
        self._velocity[j] = (self._velocity[j] * drag + span * force / self._mass[j]) * drag


ENSEMBLES: dict[str, type[Integrator]] = {
    "nvt-langevin": Langevin,
    "nvt-bussi": Bussi,
    "nvt-nose-hoover": NoseHooverChain,
    "nve": VelocityVerlet,
}
