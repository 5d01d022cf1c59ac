"""At which wavenumbers a structure moves: the power spectrum of its velocities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.errors import ConfigError, NonFiniteError

Array = NDArray[np.float64]


class Spectrum(NamedTuple):
    """How twice the kinetic energy is spread over wavenumbers.

    Attributes:
        wavenumber: 1/cm, evenly spaced from 0, ``[K]``.
        density: eV per 1/cm ``[K]``. Its integral is the mean of ``sum m v^2``; at equilibrium each vibration
            has kT, so an integral over a band, divided by kT, is the number of vibrations in it.
    """

    wavenumber: Array
    density: Array

    def energy(self, low: float = 0.0, high: float = np.inf) -> float:
        """Return twice the kinetic energy between two wavenumbers in 1/cm, eV."""
        chosen = (self.wavenumber >= low) & (self.wavenumber < high)
        return float(self.density[chosen].sum() * self.wavenumber[1])


def velocity_spectrum(velocities: Array, masses: Array, timestep: float) -> Spectrum:
    """Return the mass-weighted power spectrum of velocities along a trajectory.

    It is the Fourier transform of the velocity autocorrelation function (Wiener and Khinchin), over a Hann
    window, which keeps strong bands from leaking into weak ones. Peaks stand where an infrared or Raman
    spectrum has them, anharmonic shifts included; heights are kinetic energy and not intensities, for which
    dipoles would be needed.

    Args:
        velocities: Å/fs, ``[T, N, 3]``; best at constant energy, since a thermostat broadens the bands.
        masses: amu ``[N]``.
        timestep: fs between two entries; nothing beyond ``1 / (2 c timestep)`` is seen (16,678 1/cm at 1 fs).

    Raises:
        ConfigError: fewer than 16 entries, shapes that do not fit, or a timestep that is not above zero.
        NonFiniteError: a velocity is not finite.
    """
    v, m = np.asarray(velocities, dtype=np.float64), np.asarray(masses, dtype=np.float64)
    if v.ndim != 3 or v.shape[2] != 3 or m.shape != v.shape[1:2]:
        raise ConfigError(f"velocities must be [T, N, 3] and masses [N], not {v.shape} and {m.shape}")
    if len(v) < 16:
        raise ConfigError(f"a spectrum of {len(v)} entries says nothing; give at least 16")
    if not 0 < timestep < float("inf"):
        raise ConfigError(f"timestep={timestep} must be above zero; give it in fs")
    if not np.isfinite(v).all():
        raise NonFiniteError("a velocity of the trajectory is not finite; check the dynamics")
    window = np.hanning(len(v) + 2)[1:-1]
    # eV: ASE's unit of time makes m v^2 an energy
    weighted = v * np.sqrt(m)[:, None] / units.FS * window[:, None, None]
    power = (np.abs(np.fft.rfft(weighted, axis=0)) ** 2).sum((1, 2))
    # negative frequencies are folded onto positive ones; the first has none, nor the last of an even T
    power[1 : None if len(v) % 2 else -1] *= 2
    wavenumber = np.asarray(np.fft.rfftfreq(len(v), timestep) / units.SPEED_OF_LIGHT, dtype=np.float64)
    # Parseval: the sum over wavenumbers is the window's mean of sum m v^2
    density = power / (len(v) * np.square(window).sum() * wavenumber[1])
    return Spectrum(wavenumber, density)
