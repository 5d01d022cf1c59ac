"""From another program's checkpoint to a model of this package: which kind it is, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ffpretrain.artifacts import Component, ModelCard, Parent, TrainingData, TrainingRun, make_card
from ffpretrain.backbones.torchmd_et import from_torchmd_net
from ffpretrain.backbones.torchmd_net_import import (
    Part,
    convert_backbone,
    convert_denoiser,
    unmatched_keys,
)
from ffpretrain.backbones.torchmd_net_names import current_names
from ffpretrain.errors import ArtifactError, ConfigError
from ffpretrain.lightning_file import LightningCheckpoint
from ffpretrain.objectives.fields import DEFAULT_TEMPERATURE, DenoisingField, force_scale
from ffpretrain.potential import Model, Potential, known_elements
from ffpretrain.units import KB, length_unit

Kind = Literal["auto", "potential", "field", "pretrained"]
_PARTS: dict[str, Part] = {"potential": "energy", "field": "noise", "pretrained": "backbone"}
#: largest relative difference between the three axes of a noise normaliser that is taken for chance
_ISOTROPY = 0.05
#: what QM9 models may predict and be a potential
_QM9_ENERGY = "energy_U0"

_NOISE_PARTS = ("output_model_noise.", "pos_normalizer.")
_ENERGY_PARTS = ("output_model.", "prior_model.", "mean", "std")


@dataclass
class Imported:
    """A model and the account of where it comes from.

    Attributes:
        model: in eval mode.
        card: of the model.
        left_out: why each weight that was not read does not count, by its key.
        unmatched: weights that have no place in the model and were dropped because that was asked for.
        notes: what a user should know, one line each.
    """

    model: Model
    card: ModelCard
    left_out: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_torchmd_net(
    checkpoint: LightningCheckpoint,
    *,
    length: str | None,
    energy: str | None = None,
    kind: Kind = "auto",
    elements: Sequence[int] | None = None,
    name: str | None = None,
    level_of_theory: str | None = None,
    temperature: float | None = None,
    allow_unmatched: bool = False,
) -> Imported:
    """Turn a checkpoint of TorchMD-Net's equivariant transformer, or of its forks, into a model.

    Args:
        checkpoint: as read.
        length: unit of the positions it was trained on.
        energy: unit of the energies; only, and then always, for a potential.
        kind: ``auto`` takes a field where a denoising head was all that was trained, else a potential.
        elements: atomic numbers of the training data; None accepts all that the embedding holds.
        name: in the card; None takes the file's.
        level_of_theory: of the labels.
        temperature: K, sets the energy scale of a field, and does not apply to others; None takes 300 K.
        allow_unmatched: drop weights that have no place in the model.

    Raises:
        ConfigError: a unit is missing or does not apply, or a temperature that is not above zero.
        ArtifactError: a network that cannot be represented, or weights missing or left over.
        DataError: an unknown unit.
    """
    hparams, weights = dict(checkpoint.hparams), current_names(checkpoint.state_dict)
    weights = {key: _at_least_float32(value) for key, value in weights.items()}
    chosen = _kind_of(checkpoint, weights) if kind == "auto" else kind
    _check_units(checkpoint, chosen, length, energy, level_of_theory)
    if temperature is not None and chosen != "field":
        raise ConfigError(f"{checkpoint.path}: becomes a {chosen}; --temperature is of fields only")
    part = _PARTS[chosen]
    left_out = _set_aside(weights, hparams, part)
    unmatched = unmatched_keys(weights, hparams, part) if allow_unmatched else []
    for key in unmatched:
        del weights[key]
    notes = _notes(hparams, elements)
    fields: dict[str, Any] = {"level_of_theory": level_of_theory}
    if chosen == "field":
        kelvin = DEFAULT_TEMPERATURE if temperature is None else temperature
        model: Model = _field(weights, hparams, str(length), elements, kelvin, notes)
        fields |= {"temperature": kelvin, "objective": _objective(hparams, str(length))}
    elif chosen == "potential":
        _refuse_properties(checkpoint)
        model = from_torchmd_net(
            weights, hparams, energy_unit=str(energy), length_unit=str(length), elements=elements
        )
    else:
        model = _to_start_from(weights, hparams, str(length), elements)
        fields["kind"] = "pretrained"
    card = make_card(model, name or checkpoint.path.stem, **fields, **_provenance(checkpoint))
    return Imported(model, card, left_out, unmatched, notes)


def _kind_of(checkpoint: LightningCheckpoint, weights: dict[str, Tensor]) -> Literal["potential", "field"]:
    """Return what was trained: a noise head alone, or an energy, with a noise head beside it or not."""
    hparams = checkpoint.hparams
    denoises = hparams.get("output_model_noise") is not None and any(
        key.startswith(_NOISE_PARTS[0]) for key in weights
    )
    energies = float(hparams.get("energy_weight", hparams.get("y_weight", 1.0)) or 0.0) > 0
    forces = bool(hparams.get("derivative")) and float(hparams.get("force_weight", 1.0) or 0.0) > 0
    labelled = not hparams.get("denoising_only") and (energies or forces)
    return "potential" if labelled or not denoises else "field"


def _check_units(
    checkpoint: LightningCheckpoint,
    kind: str,
    length: str | None,
    energy: str | None,
    level_of_theory: str | None,
) -> None:
    needs = {"--length-unit": length} | ({"--energy-unit": energy} if kind == "potential" else {})
    missing = [option for option, value in needs.items() if value is None]
    if missing:
        raise ConfigError(
            f"{checkpoint.path}: becomes a {kind}, and a checkpoint does not say its units; give "
            f"{' and '.join(missing)} of the data it was trained on, such as angstrom and eV"
        )
    for option, value in {"--energy-unit": energy, "--level-of-theory": level_of_theory}.items():
        if kind != "potential" and value is not None:
            raise ConfigError(f"{checkpoint.path}: becomes a {kind}, which has no energy; leave out {option}")


def _refuse_properties(checkpoint: LightningCheckpoint) -> None:
    dataset, target = (checkpoint.hparams.get(key) for key in ("dataset", "dataset_arg"))
    if str(dataset).startswith("QM9") and target != _QM9_ENERGY:
        raise ArtifactError(
            f"{checkpoint.path}: predicts {target!r} of QM9, which is no potential energy; take its backbone "
            "alone (--kind pretrained)"
        )


def _set_aside(weights: dict[str, Tensor], hparams: dict[str, Any], part: Part) -> dict[str, str]:
    """Take the weights that a part does not depend on out of ``weights``; return why, by key."""
    reasons: dict[tuple[str, ...], str] = {}
    if part != "energy":
        reasons[_ENERGY_PARTS] = "belongs to the energy or property, which is not taken over"
    if part != "noise":
        norm = ("representation_model.out_norm_vec.",) if hparams.get("seperate_noise") else ()
        reasons[(*_NOISE_PARTS, *norm)] = "belongs to the noise head, which is not taken over"
        hparams["output_model_noise"] = None
    found = {key: reason for parts, reason in reasons.items() for key in weights if key.startswith(parts)}
    for key in found:
        del weights[key]
    return found


def _to_start_from(
    weights: dict[str, Tensor], hparams: dict[str, Any], length: str, elements: Sequence[int] | None
) -> Potential:
    """Return the backbone with a fresh energy head, which means nothing before it is trained."""
    backbone = convert_backbone(weights, hparams, length_unit=length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        potential = Potential(backbone, elements=None if elements is None else list(elements))
    return potential.to(backbone.dtype).eval()


def _field(
    weights: dict[str, Tensor],
    hparams: dict[str, Any],
    length: str,
    elements: Sequence[int] | None,
    temperature: float,
    notes: list[str],
) -> DenoisingField:
    """Return the denoising head as forces: ``-(kT / sigma^2)`` times the displacement it predicts."""
    found = convert_denoiser(weights, hparams, length_unit=length)
    unit = float(found.unit.square().mean().sqrt())
    spread = float((found.unit - unit).abs().max()) / unit
    if not spread <= _ISOTROPY:
        raise ArtifactError(
            f"the noise normaliser differs between the axes by {100 * spread:.0f} %, so its head gives no "
            "field that turns with the molecule; take the backbone alone (--kind pretrained)"
        )
    sigma = float(hparams.get("position_noise_scale") or 0.0) * length_unit(length)
    if not sigma > 0:
        raise ArtifactError(
            "hyper-parameter position_noise_scale says no size of the noise; it must be above 0"
        )
    notes.append(
        f"the head's unit is {unit:.5f} Å, the mean over the axes of its normaliser, which differ by "
        f"{100 * spread:.2g} %; its mean of {float(found.mean.abs().max()):.2g} Å is left out"
    )
    notes.append(
        f"forces are those of noise of {sigma:g} Å at {temperature:g} K; relaxed structures have no "
        "temperature, and it only sets the unit"
    )
    backbone = found.backbone
    accepted = range(1, backbone.max_z) if elements is None else elements
    network = Model(backbone, nn.Identity(), known_elements(accepted, backbone))
    factor = unit * force_scale(KB * temperature, sigma)
    return DenoisingField(network, found.head, factor).eval()


def _objective(hparams: dict[str, Any], length: str) -> Component:
    """Return what the denoising head was trained for."""
    options: dict[str, Any] = {"sigma": float(hparams["position_noise_scale"]) * length_unit(length)}
    name = "coord"
    if float(hparams.get("dihedral_angle_noise_scale") or 0.0) > 0:
        name = "frad"
        options["dihedral_sigma_degrees"] = float(hparams["dihedral_angle_noise_scale"])
    return Component(name=name, options=options)


def _notes(hparams: dict[str, Any], elements: Sequence[int] | None) -> list[str]:
    notes = []
    if elements is None:
        notes.append(
            "a checkpoint does not say its elements, so all that the embedding holds are accepted, trained "
            "or not; give --elements"
        )
    if hparams.get("max_num_neighbors"):
        notes.append(
            f"the source kept at most {hparams['max_num_neighbors']} neighbours an atom, here all within the "
            "cutoff count: larger neighbourhoods give other numbers"
        )
    if not hparams.get("vector_cutoff"):
        notes.append("vector_cutoff is off, as published: the energy jumps where an atom crosses the cutoff")
    if hparams.get("layernorm_on_vec") or not hparams.get("md17", True):
        notes.append("vectors are normalised in a way that depends a little on the orientation, as published")
    return notes


def _provenance(checkpoint: LightningCheckpoint) -> dict[str, Any]:
    hparams = checkpoint.hparams
    data = "/".join(str(hparams[key]) for key in ("dataset", "dataset_arg") if hparams.get(key))
    return {
        "description": f"imported from the TorchMD-Net checkpoint {checkpoint.path.name}",
        "training_data": [TrainingData(name=data)] if data else [],
        "training": TrainingRun(steps=checkpoint.step),
        "parents": [Parent(name=checkpoint.path.name, sha256=checkpoint.sha256)],
    }


def _at_least_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
