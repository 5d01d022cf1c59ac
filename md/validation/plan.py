"""How much is run: the two levels, or a plan of one's own."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ffpretrain.errors import ConfigError, nearest

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class Plan:
    """Lengths of the parts that take time.

    Attributes:
        name: for the report.
        nve_ps: ps of dynamics at constant energy.
        stability_ps: ps of each replica.
        replicas: at each temperature.
        temperatures: K, of the replicas.
        relabelled: frames of the model's own trajectory to compare with a reference calculator.
        nve_temperature: K, of the velocities at the start.
        timestep: fs.
        friction: 1/fs, of the replicas' thermostat.

    Raises:
        ConfigError: a value out of range.
    """

    name: str
    nve_ps: float
    stability_ps: float
    replicas: int
    relabelled: int
    temperatures: tuple[float, ...] = (300.0, 500.0)
    nve_temperature: float = 300.0
    timestep: float = 0.5
    friction: float = 0.01

    def __post_init__(self) -> None:
        for name in ("nve_ps", "stability_ps", "nve_temperature", "timestep", "friction"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, not {value}")
        for name in ("replicas", "relabelled"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not self.temperatures or not all(math.isfinite(t) and t > 0 for t in self.temperatures):
            raise ConfigError(f"temperatures must be positive numbers, not {self.temperatures}")
        for name in ("nve_steps", "stability_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.split('_')[0]}_ps is shorter than one step of {self.timestep} fs")

    @property
    def nve_steps(self) -> int:
        """Steps of the dynamics at constant energy."""
        return round(1000 * self.nve_ps / self.timestep)

    @property
    def stability_steps(self) -> int:
        """Steps of each replica."""
        return round(1000 * self.stability_ps / self.timestep)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON gives it back."""
        return {**asdict(self), "temperatures": list(self.temperatures)}


PLANS: dict[str, Plan] = {
    "quick": Plan("quick", nve_ps=5.0, stability_ps=5.0, replicas=4, relabelled=40),
    "full": Plan("full", nve_ps=50.0, stability_ps=100.0, replicas=8, relabelled=200),
}


def plan_of(level: str | Plan) -> Plan:
    """Return the plan of a level.

    Raises:
        ConfigError: no such level.
    """
    if isinstance(level, Plan):
        return level
    if level not in PLANS:
        raise ConfigError(f"unknown level {level!r}{nearest(str(level), PLANS)}")
    return PLANS[level]
