"""Force fields that learn from noise and from labels, and run where chemists run their simulations.

The names below are imported on first use, so that ``import ffpretrain`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ffpretrain import _layout
from ffpretrain._version import __version__

_layout.install()

if TYPE_CHECKING:
    from ffpretrain.artifacts import load_potential
    from ffpretrain.md.calculator import FFCalculator
    from ffpretrain.zoo import list_models

_LAZY = {
    "FFCalculator": "ffpretrain.md.calculator",
    "load_potential": "ffpretrain.artifacts",
    "list_models": "ffpretrain.zoo",
}

__all__ = ["FFCalculator", "__version__", "list_models", "load_potential"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ffpretrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
