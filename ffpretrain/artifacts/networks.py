"""Which models a file can hold, how a card describes each, and how it is built again from the card."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from torch import nn

from ffpretrain._version import __version__
from ffpretrain.artifacts.card import ModelCard, printable
from ffpretrain.artifacts.upgrades import FORMAT_VERSION
from ffpretrain.backbones import Backbone, backbone_class, create_backbone
from ffpretrain.backbones.schnet import ShiftedSoftplusHead
from ffpretrain.direct import DirectPotential
from ffpretrain.errors import ArtifactError, UserError
from ffpretrain.heads import EnergyHead, VectorHead
from ffpretrain.objectives.fields import Learned
from ffpretrain.potential import Model, Potential, known_elements
from ffpretrain.property import PropertyHead, PropertyModel

#: heads of potentials
_ENERGY_HEADS: dict[str, type[EnergyHead]] = {"energy": EnergyHead, "schnet-energy": ShiftedSoftplusHead}
#: the two heads of a model whose forces are not the gradient of its energy
_DIRECT = "energy+vector"
_PROPERTY = "property"
#: what objectives learn without labels, by the name of its head
_LEARNED = {
    "vector": "ffpretrain.objectives.fields:DenoisingField",
    "pooled-energy": "ffpretrain.objectives.emgp:PooledPotential",
    "distance-score": "ffpretrain.objectives.se3_ddm:DistanceField",
}


def can_be_saved(model: nn.Module) -> bool:
    """Return whether a file can hold this class of model."""
    return type(model) in (Potential, DirectPotential, PropertyModel) or _is_learned(model)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the card's fields that the model decides.

    Raises:
        ArtifactError: a class, backbone or head that :func:`rebuild` could not make again.
    """
    if not (can_be_saved(model) and isinstance(model, Potential | DirectPotential | PropertyModel | Learned)):
        raise ArtifactError(
            f"only a potential or a learned field can be saved, not {type(model).__name__}; unwrap compiled "
            "modules first, or save the network that the objective trained"
        )
    backbone = model.backbone
    name = getattr(backbone, "name", None)
    if name is None or backbone_class(name) is not type(backbone):
        raise ArtifactError(
            f"backbone {type(backbone).__name__} has no name in the registry, so no file could rebuild it; "
            "register it under the entry points ffpretrain.backbones"
        )
    options = _as_json(backbone.config, f"the options of backbone {name!r}")
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "backbone": {"name": name, "options": options},
        "elements": model.elements,
        "cutoff": backbone.cutoff,
        **_describe(model),
    }


def _describe(model: Potential | DirectPotential | PropertyModel | Learned) -> dict[str, Any]:
    if isinstance(model, PropertyModel):
        return _describe_property(model)
    return _describe_learned(model) if isinstance(model, Learned) else _describe_potential(model)


def rebuild(card: ModelCard, where: str) -> Model:
    """Return the model a card describes, with weights that are to be replaced.

    Args:
        card: of a file.
        where: the file, for messages.

    Raises:
        ArtifactError: an unknown head, or a network that cannot be built.
    """
    if card.head.name not in {*_ENERGY_HEADS, *_LEARNED, _DIRECT, _PROPERTY}:
        raise ArtifactError(
            f"{where}: unknown head {card.head.name!r}; upgrade with: pip install -U ffpretrain"
        )
    try:
        # the fresh weights must not advance the caller's random numbers, nor land on their default device
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            backbone = create_backbone(card.backbone.name, **card.backbone.options)
            model = _rebuild(card, backbone)
    except UserError as error:
        raise ArtifactError(f"{where}: its network cannot be built: {printable(str(error))}") from error
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ArtifactError(
            f"{where}: its card describes no network ({printable(str(error))}); the file is damaged"
        ) from error
    if backbone.cutoff != card.cutoff:
        contradiction = f"cutoff {card.cutoff} and the backbone has {backbone.cutoff}"
    elif (card.kind in ("field", "direct", "property")) == model.conservative:
        contradiction = f"kind {card.kind!r} and head {card.head.name!r}"
    else:
        return model
    raise ArtifactError(
        f"{where}: the card says {contradiction}; the file contradicts itself: export it again"
    )


def _rebuild(card: ModelCard, backbone: Backbone) -> Model:
    if card.head.name in _LEARNED:
        cls = _learned_class(card.head.name)
        network = Model(backbone, nn.Identity(), known_elements(card.elements, backbone))
        factor = card.energy_scale if card.force_scale is None else card.force_scale
        head = cls.head_class(backbone.n_features, **card.head.options)
        return cls(network, head, factor, card)
    if card.head.name == _PROPERTY:
        return _rebuild_property(card, backbone)
    direct = card.head.name == _DIRECT
    head_class = EnergyHead if direct else _ENERGY_HEADS[card.head.name]
    head = head_class(backbone.n_features, backbone.has_vectors, **card.head.options)
    potential = Potential(
        backbone,
        head,
        scale=card.energy_scale,
        shift=card.energy_shift,
        reference_energies=card.reference_energies,
        elements=card.elements,
        card=card,
    )
    return DirectPotential(potential, VectorHead(backbone.n_features), card) if direct else potential


def _describe_potential(potential: Potential | DirectPotential) -> dict[str, Any]:
    own: dict[str, Any] = {}
    heads = [name for name, cls in _ENERGY_HEADS.items() if cls is type(potential.head)]
    if isinstance(potential, DirectPotential):
        for head, wanted in ((potential.head, EnergyHead), (potential.force_head, VectorHead)):
            if type(head) is not wanted:
                raise _unknown_head(head, [_DIRECT])
        heads, own = [_DIRECT], {"kind": "direct"}
    if not heads:
        raise _unknown_head(potential.head, list(_ENERGY_HEADS))
    known = potential.elements
    return {
        **own,
        "head": {"name": heads[0], "options": {}},
        "energy_scale": potential.scale.item(),
        "energy_shift": potential.shift.item(),
        "force_scale": None,
        "reference_energies": {
            z: e for z, e in enumerate(potential.reference.tolist()) if z in known or e != 0.0
        },
    }


def _describe_learned(model: Learned) -> dict[str, Any]:
    if type(model.head) is not model.head_class:
        raise _unknown_head(model.head, [model.head_name])
    factor = model.factor.item()
    return {
        "kind": "potential" if model.conservative else "field",
        "head": {"name": model.head_name, "options": model.head_options()},
        "energy_scale": factor if model.conservative else 1.0,
        "energy_shift": 0.0,
        "force_scale": None if model.conservative else factor,
        "reference_energies": {},
    }


def _describe_property(model: PropertyModel) -> dict[str, Any]:
    if type(model.head) is not PropertyHead:
        raise _unknown_head(model.head, [_PROPERTY])
    return {
        "kind": "property",
        "head": {"name": _PROPERTY, "options": model.options()},
        "energy_scale": 1.0,
        "energy_shift": 0.0,
        "force_scale": None,
        "reference_energies": {},
    }


def _rebuild_property(card: ModelCard, backbone: Backbone) -> PropertyModel:
    options: dict[str, Any] = dict(card.head.options)
    head = PropertyHead(backbone.n_features, backbone.has_vectors, options.pop("readout", "none"))
    options["reference"] = {int(z): value for z, value in options.get("reference", {}).items()}
    return PropertyModel(backbone, head, known_elements(card.elements, backbone), card=card, **options)


def _is_learned(model: nn.Module) -> bool:
    name = getattr(model, "head_name", None)
    return name in _LEARNED and type(model) is _learned_class(name)


def _learned_class(head: str) -> type[Learned]:
    module, _, attribute = _LEARNED[head].partition(":")
    return getattr(importlib.import_module(module), attribute)


def _unknown_head(head: nn.Module, known: list[str]) -> ArtifactError:
    return ArtifactError(f"a {type(head).__name__} cannot be saved; known heads: {', '.join(known)}")


def _as_json(value: Any, what: str) -> Any:
    """Return a value as JSON would read it back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{what} cannot be written as JSON ({error}); use plain numbers and text"
        ) from error
