"""Reports: one HTML page that says what a model is, how it was trained, and how far it can be trusted.

``write_report`` is imported on first use: it loads what trains, which the pages of landscapes do without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffpretrain.report.build import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("ffpretrain.report.build"), name)
    raise AttributeError(f"module 'ffpretrain.report' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
