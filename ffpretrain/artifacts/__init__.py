"""Model files: one ``.safetensors`` with the weights and, in its header, a JSON card that says the rest.

Reading a card needs no torch: the names that do are imported on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffpretrain.artifacts.card import (
    Component,
    MeasuredErrors,
    ModelCard,
    Parent,
    Quantity,
    ReferenceGeometry,
    TrainingData,
    TrainingRun,
    parse_card,
)
from ffpretrain.artifacts.files import card_of_bytes, card_of_file, file_sha256
from ffpretrain.artifacts.upgrades import FORMAT_VERSION

if TYPE_CHECKING:
    from ffpretrain.artifacts.weights import load_potential, make_card, resolve_device, save_potential

__all__ = [
    "Component",
    "FORMAT_VERSION",
    "MeasuredErrors",
    "ModelCard",
    "Parent",
    "Quantity",
    "ReferenceGeometry",
    "TrainingData",
    "TrainingRun",
    "file_sha256",
    "load_potential",
    "make_card",
    "parse_card",
    "read_card",
    "resolve_device",
    "save_potential",
]

_WITH_TORCH = {"load_potential", "make_card", "resolve_device", "save_potential"}


def read_card(model: str | Path) -> ModelCard:
    """Return the card of a named model or a model file, without torch and without reading the weights.

    A named model's checksum is verified as when it is loaded.

    Args:
        model: a name of :func:`~ffpretrain.zoo.list_models`, or a path.

    Raises:
        ArtifactError: an unknown name, or a file that is missing, damaged, of another kind or newer.
    """
    from ffpretrain import zoo

    path, name = zoo.locate(model)
    return card_of_file(path) if name is None else card_of_bytes(zoo.read_model(name), str(path))


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module("ffpretrain.artifacts.weights"), name)
    raise AttributeError(f"module 'ffpretrain.artifacts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_TORCH})
