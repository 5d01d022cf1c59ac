"""Training: from a recipe to a model file. The names below are imported on first use; they need torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffpretrain.training.config import Recipe
    from ffpretrain.training.run import Run, fit, prepare, train

__all__ = ["Recipe", "Run", "fit", "prepare", "train"]

_HOMES = {"Recipe": "config", "Run": "run", "fit": "run", "prepare": "run", "train": "run"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ffpretrain.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ffpretrain.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
