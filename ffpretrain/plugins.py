"""Entry points through which other packages add backbones, objectives and datasets."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def plugin_names(group: str) -> list[str]:
    """Return the names that installed packages registered in an entry-point group."""
    return sorted(_points(group))


def load_plugin(group: str, name: str) -> Any:
    """Import and return what a plug-in registered under a name."""
    return _points(group)[name].load()
