"""Backbones by name. To add one: a module with a :class:`Backbone` subclass and a line in ``_BUILT_IN``."""

from __future__ import annotations

import importlib
from typing import Any

from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.errors import ConfigError, nearest
from ffpretrain.options import check_options
from ffpretrain.plugins import load_plugin, plugin_names

__all__ = ["Backbone", "Features", "backbone_class", "create_backbone", "list_backbones"]

_BUILT_IN = {
    "egnn": "ffpretrain.backbones.egnn:EGNN",
    "painn": "ffpretrain.backbones.painn:PaiNN",
    "schnet": "ffpretrain.backbones.schnet:SchNet",
    "torchmd-et": "ffpretrain.backbones.torchmd_et:TorchMDET",
}
_GROUP = "ffpretrain.backbones"


def list_backbones() -> list[str]:
    """Return the names of all backbones, those of plug-ins included."""
    return sorted({*_BUILT_IN, *plugin_names(_GROUP)})


def backbone_class(name: str) -> type[Backbone]:
    """Return the class of a backbone.

    Raises:
        ConfigError: no backbone has this name.
    """
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name in plugin_names(_GROUP):
        return load_plugin(_GROUP, name)
    raise ConfigError(f"unknown backbone {name!r}{nearest(name, list_backbones())}")


def create_backbone(name: str, **options: Any) -> Backbone:
    """Build a backbone with fresh weights, drawn from torch's global generator as every ``nn.Module`` does.

    Args:
        name: one of :func:`list_backbones`.
        **options: constructor arguments, such as ``hidden=128, layers=6, cutoff=5.0``.

    Raises:
        ConfigError: an unknown name or option, or a value of another type.
    """
    cls = backbone_class(name)
    check_options(f"backbone {name!r}", cls.__init__, options)
    return cls(**options)
