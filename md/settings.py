"""The settings of a simulation, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ffpretrain.errors import ConfigError, nearest
from ffpretrain.md.engines import ENGINES
from ffpretrain.md.integrators import ENSEMBLES
from ffpretrain.md.output import FORMATS

#: steps beyond which a run is a slip of the pen: 5 seconds of simulated time at 0.5 fs
MOST_STEPS = 10**13


@dataclass(frozen=True)
class Settings:
    """See :func:`ffpretrain.md.simulate` for what each means.

    Raises:
        ConfigError: a value out of range or of the wrong type.
    """

    ensemble: str
    temperature: float | None
    timestep: float
    steps: int
    friction: float
    seed: int
    minimize: bool
    interval: int
    log_interval: int
    restart_interval: int
    lost_distance: float | None
    format: str
    engine: str = "ase"

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise ConfigError(f"unknown ensemble {self.ensemble!r}{nearest(str(self.ensemble), ENSEMBLES)}")
        if self.engine not in ENGINES:
            raise ConfigError(f"unknown engine {self.engine!r}{nearest(str(self.engine), ENGINES)}")
        if self.ensemble not in ENGINES[self.engine].ensembles:
            known = " and ".join(ENGINES[self.engine].ensembles)
            raise ConfigError(f"engine {self.engine} has {known}, not {self.ensemble}; use engine ase for it")
        if self.format not in FORMATS:
            raise ConfigError(
                f"unknown trajectory format {self.format!r}{nearest(str(self.format), FORMATS)}"
            )
        for name in ("timestep", "friction"):
            _check_positive(name, getattr(self, name))
        if self.lost_distance is not None:
            _check_positive("lost_distance", self.lost_distance)
        for name, least in (
            ("steps", 0),
            ("seed", 0),
            ("interval", 1),
            ("log_interval", 1),
            ("restart_interval", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
            if value > MOST_STEPS:
                raise ConfigError(f"{name}={value:.3g} would never end; at most {MOST_STEPS:.0e}")
        if self.temperature is None:
            if self.ensemble != "nve":
                raise ConfigError(
                    f"{self.ensemble} needs a temperature; only nve can keep the structure's velocities"
                )
        elif not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be zero or a positive number, not {self.temperature}")
        elif self.temperature == 0 and self.ensemble != "nve":
            raise ConfigError(f"{self.ensemble} needs a temperature above zero; relax the structure instead")

    def identity(self) -> dict[str, Any]:
        """Return what must stay the same when a run is continued: all but its length."""
        kept = asdict(self)
        for name in ("steps", "lost_distance", "restart_interval"):
            del kept[name]
        return kept


def _check_positive(name: str, value: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.number)
        or not 0 < value < float("inf")
    ):
        raise ConfigError(f"{name} must be a positive number, not {value!r}")
