"""Dynamics, adapters and validation: a trained potential in motion.

The names below are imported on first use, so that a command which needs none of them starts quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffpretrain.md.calculator import FFCalculator
    from ffpretrain.md.landscapes import landscape
    from ffpretrain.md.runtime import Runtime
    from ffpretrain.md.simulation import SimulationResult, simulate
    from ffpretrain.md.spectrum import Spectrum, velocity_spectrum
    from ffpretrain.md.validation import validate
    from ffpretrain.md.without_energy import forces_only

_LAZY = {
    "FFCalculator": "ffpretrain.md.calculator",
    "Runtime": "ffpretrain.md.runtime",
    "SimulationResult": "ffpretrain.md.simulation",
    "Spectrum": "ffpretrain.md.spectrum",
    "landscape": "ffpretrain.md.landscapes",
    "forces_only": "ffpretrain.md.without_energy",
    "simulate": "ffpretrain.md.simulation",
    "validate": "ffpretrain.md.validation",
    "velocity_spectrum": "ffpretrain.md.spectrum",
}

__all__ = [
    "FFCalculator",
    "Runtime",
    "SimulationResult",
    "Spectrum",
    "forces_only",
    "landscape",
    "simulate",
    "validate",
    "velocity_spectrum",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ffpretrain.md' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
