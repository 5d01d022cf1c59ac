"""Objectives by name: what a network is trained for. To add one: a module and a line in ``_BUILT_IN``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ffpretrain.backbones import Backbone
from ffpretrain.errors import ConfigError, nearest
from ffpretrain.objectives.base import Objective
from ffpretrain.options import check_options
from ffpretrain.plugins import load_plugin, plugin_names
from ffpretrain.potential import Potential

__all__ = ["Objective", "create_objective", "list_objectives", "objective_class"]

_BUILT_IN = {
    "3d-emgp": "ffpretrain.objectives.emgp:EMGP",
    "coord": "ffpretrain.objectives.coord:Coord",
    "dens": "ffpretrain.objectives.dens:DeNS",
    "denoisevae": "ffpretrain.objectives.denoisevae:DenoiseVAE",
    "frad": "ffpretrain.objectives.frad:Frad",
    "georecon": "ffpretrain.objectives.georecon:GeoRecon",
    "ndem": "ffpretrain.objectives.ndem:NDeM",
    "se3-ddm": "ffpretrain.objectives.se3_ddm:SE3DDM",
    "slide": "ffpretrain.objectives.slide:SliDe",
    "supervised": "ffpretrain.objectives.supervised:Supervised",
}
_GROUP = "ffpretrain.objectives"


def list_objectives() -> list[str]:
    """Return the names of all objectives, those of plug-ins included."""
    return sorted({*_BUILT_IN, *plugin_names(_GROUP)})


def objective_class(name: str, options: Mapping[str, Any] | None = None) -> type[Objective]:
    """Return the class of an objective.

    Args:
        name: one of :func:`list_objectives`.
        options: its fields, where some of them ask for another class.

    Raises:
        ConfigError: no objective has this name.
    """
    cls: type[Objective]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        cls = getattr(importlib.import_module(module), attribute)
        return cls.variant(options or {})
    if name in plugin_names(_GROUP):
        cls = load_plugin(_GROUP, name)
        return cls.variant(options or {})
    raise ConfigError(f"unknown objective {name!r}{nearest(name, list_objectives())}")


def create_objective(
    name: str, *, backbone: Backbone | None = None, potential: Potential | None = None, **options: Any
) -> Objective:
    """Build an objective around a backbone or a potential.

    Args:
        name: one of :func:`list_objectives`.
        backbone: fresh or pretrained; an energy head is added where the objective needs one.
        potential: its backbone, head, scale and reference energies are used and trained.
        **options: the objective's own fields.

    Returns:
        The objective, in the precision and on the device of the network.

    Raises:
        ConfigError: an unknown name or option, a value of another type, both or neither of backbone and
            potential, or a backbone that cannot serve the objective.
    """
    cls = objective_class(name, options)
    if (backbone is None) == (potential is None):
        raise ConfigError(f"objective {name!r}: give exactly one of backbone= and potential=")
    check_options(f"objective {name!r}", cls.__init__, options, "potential")
    network = potential if potential is not None else Potential(backbone)  # type: ignore[arg-type]
    return cls(network, **options).to(network.scale.device, network.dtype)
