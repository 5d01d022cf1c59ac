"""The fast inertial relaxation engine, FIRE (Bitzek et al. 2006, Phys. Rev. Lett. 97, 170201).

The same steps as ASE's with its defaults; here all that decides the next step can be read and put back, so
that a relaxation that was stopped goes on as if it had not been, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ffpretrain.md.landscapes.surface import Array

# the paper's constants, ASE's time steps (in its unit of time with unit masses) and longest step
_LONGEST, _DT_MOST = 0.2, 1.0
_PATIENCE, _FASTER, _SLOWER = 5, 1.1, 0.5
_MIXING, _LESS_MIXING = 0.1, 0.99


@dataclass
class Fire:
    """The state between two steps.

    Attributes:
        velocity: of the shape of the positions; zero before the first step.
        dt: time step.
        mixing: share of the velocity that is turned into the forces' direction.
        downhill: steps since the velocity last pointed uphill.
    """

    velocity: Array
    dt: float = 0.1
    mixing: float = _MIXING
    downhill: int = 0

    def step(self, forces: Array) -> Array:
        """Return the displacement that follows from forces, Å, and move on.

        Args:
            forces: eV/Å, of the velocity's shape.
        """
        if self.velocity.any():
            power = float(np.vdot(forces, self.velocity))
            if power > 0:
                along = forces / np.linalg.norm(forces) * np.linalg.norm(self.velocity)
                self.velocity = (1 - self.mixing) * self.velocity + self.mixing * along
                if self.downhill > _PATIENCE:
                    self.dt = min(self.dt * _FASTER, _DT_MOST)
                    self.mixing *= _LESS_MIXING
                self.downhill += 1
            else:
                self.velocity = np.zeros_like(self.velocity)
                self.dt, self.mixing, self.downhill = self.dt * _SLOWER, _MIXING, 0
        self.velocity = self.velocity + self.dt * forces
        move = self.dt * self.velocity
        length = float(np.linalg.norm(move))
        return move if length <= _LONGEST else move * (_LONGEST / length)
