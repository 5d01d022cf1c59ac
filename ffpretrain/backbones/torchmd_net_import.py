"""Reads weights of TorchMD-Net's equivariant transformer and of the forks that add a denoising head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from ffpretrain.backbones.base import load_exactly
from ffpretrain.backbones.torchmd_et import TorchMDET
from ffpretrain.backbones.torchmd_net_names import (
    BOX,
    COUNT,
    ENERGY,
    HEAD,
    NOISE,
    NOISE_HEAD,
    NORMALIZER,
    REFERENCE,
    backbone_weights,
    check_hparams,
    check_keys,
    current_names,
    head_weights,
    wanted_keys,
)
from ffpretrain.errors import ArtifactError
from ffpretrain.heads import VectorHead
from ffpretrain.units import energy_unit as energy_unit_size
from ffpretrain.units import length_unit as length_unit_size

if TYPE_CHECKING:
    from ffpretrain.potential import Potential

#: what can be read of a model
Part = Literal["energy", "noise", "backbone"]


class Denoiser(NamedTuple):
    """What a checkpoint of a denoising run holds.

    Attributes:
        backbone: in the precision of the weights.
        head: predicts normalised displacements.
        unit: Å per unit of the head's output, for each axis ``[3]``.
        mean: Å, that the normaliser takes off, ``[3]``.
    """

    backbone: TorchMDET
    head: VectorHead
    unit: Tensor
    mean: Tensor


def convert(
    state_dict: Mapping[str, Tensor],
    hparams: Mapping[str, Any],
    *,
    energy_unit: str = "eV",
    length_unit: str = "angstrom",
    elements: Sequence[int] | None = None,
) -> Potential:
    """See :func:`ffpretrain.backbones.torchmd_et.from_torchmd_net`."""
    from ffpretrain.potential import Potential

    check_hparams(hparams, ENERGY)
    energy, length = energy_unit_size(energy_unit), length_unit_size(length_unit)
    weights, max_z = current_names(state_dict), int(hparams["max_z"])
    reference = _pop_reference(weights, hparams)
    backbone = _empty_backbone(hparams, length, _whitened(hparams))
    check_keys(weights, backbone, HEAD, {"mean", "std", BOX})
    backbone = _filled(backbone, weights)
    potential = Potential(
        backbone,
        scale=_scalar(weights, "std", 1.0) * energy,
        shift=_scalar(weights, "mean", 0.0) * energy,
        reference_energies={z: e * energy for z, e in enumerate(reference) if 0 < z < max_z},
        elements=list(range(1, max_z)) if elements is None else list(elements),
    ).to(backbone.dtype)
    load_exactly(potential.head, head_weights(weights, HEAD), "TorchMD-Net output_model")
    return potential.eval()


def convert_denoiser(
    state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any], *, length_unit: str = "angstrom"
) -> Denoiser:
    """Read the denoising head that forks of TorchMD-Net add ("pre-training via denoising", Frad).

    Their loss compares the head with ``(noise - mean) / std``, both running statistics over all noise seen,
    for each axis; so ``std * head + mean`` is the displacement.

    Args:
        state_dict: as for :func:`convert`, without the keys of the energy.
        hparams: likewise.
        length_unit: of the positions the weights were trained on.

    Raises:
        ArtifactError: as :func:`convert`, or a normaliser that has seen no noise.
        DataError: unknown unit.
    """
    check_hparams(hparams, NOISE)
    length, weights = length_unit_size(length_unit), current_names(state_dict)
    backbone = _empty_backbone(hparams, length, _whitened(hparams, noise=True))
    check_keys(weights, backbone, NOISE_HEAD, {BOX, COUNT}, NORMALIZER)
    backbone = _filled(backbone, weights)
    head = VectorHead(backbone.n_features).to(backbone.dtype)
    load_exactly(head, head_weights(weights, NOISE_HEAD), "TorchMD-Net output_model_noise")
    total, squares, count = (weights[key].double() for key in NORMALIZER)
    if not float(count) > 0:
        raise ArtifactError("the TorchMD-Net model's pos_normalizer has seen no noise; train it first")
    mean = total / count
    unit = (squares / count - mean.square()).clamp_min(0).sqrt()
    return Denoiser(backbone, head.eval(), unit * length, mean * length)


def convert_backbone(
    state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any], *, length_unit: str = "angstrom"
) -> TorchMDET:
    """Read the representation alone, whatever stood on it.

    Args:
        state_dict: as for :func:`convert`, without the keys of any head.
        hparams: likewise.
        length_unit: of the positions the weights were trained on.

    Raises:
        ArtifactError: as :func:`convert`.
        DataError: unknown unit.
    """
    check_hparams(hparams, {})
    weights = current_names(state_dict)
    backbone = _empty_backbone(hparams, length_unit_size(length_unit), _whitened(hparams))
    check_keys(weights, backbone, None, {BOX})
    return _filled(backbone, weights)


def unmatched_keys(state_dict: Mapping[str, Tensor], hparams: Mapping[str, Any], part: Part) -> list[str]:
    """Return the keys that reading a part of a model would refuse.

    Args:
        state_dict: of the part.
        hparams: of the whole model.
        part: what :func:`convert`, :func:`convert_denoiser` or :func:`convert_backbone` is to read.

    Raises:
        ArtifactError: hyper-parameters missing.
    """
    check_hparams(hparams, {})
    backbone = _empty_backbone(hparams, 1.0, _whitened(hparams, noise=part == "noise"))
    head = {"energy": HEAD, "noise": NOISE_HEAD, "backbone": None}[part]
    optional = {BOX, *(("mean", "std") if part == "energy" else ())}
    if part == "noise":
        optional |= {*NORMALIZER, COUNT}
    keys = set(state_dict) - wanted_keys(backbone, head) - optional
    return sorted(key for key in keys if part != "energy" or not REFERENCE.fullmatch(key))


def _whitened(hparams: Mapping[str, Any], noise: bool = False) -> bool:
    """Return whether vectors are normalised, by `seperate_noise` before the noise head alone."""
    return hparams.get("layernorm_on_vec") == "whitened" or (noise and bool(hparams.get("seperate_noise")))


def _filled(backbone: TorchMDET, weights: Mapping[str, Tensor]) -> TorchMDET:
    """Return the backbone with TorchMD-Net's weights, in their precision and in eval mode."""
    backbone.to(weights["representation_model.embedding.weight"].dtype)
    load_exactly(backbone, backbone_weights(weights, backbone), "TorchMD-Net representation_model")
    return backbone.eval()


def _empty_backbone(hparams: Mapping[str, Any], length: float, whitened: bool) -> TorchMDET:
    return TorchMDET(
        hidden=int(hparams["embedding_dimension"]),
        layers=int(hparams["num_layers"]),
        heads=int(hparams["num_heads"]),
        rbf=int(hparams["num_rbf"]),
        cutoff=float(hparams["cutoff_upper"]) * length,
        max_z=int(hparams["max_z"]),
        trainable_rbf=bool(hparams.get("trainable_rbf", True)),
        vector_cutoff=bool(hparams.get("vector_cutoff", False)),
        vec_norm="whitened" if whitened else "none",
        # only Frad's code has this option, and without it that code normalises after every layer
        layer_norms=not hparams.get("md17", True),
    )


def _scalar(weights: Mapping[str, Tensor], key: str, default: float) -> float:
    return float(weights[key]) if key in weights else default


def _pop_reference(weights: dict[str, Tensor], hparams: Mapping[str, Any]) -> list[float]:
    """Take the energies of TorchMD-Net's atomic reference prior out of the weights; no prior gives none."""
    prior = hparams.get("prior_model") or []
    listed = prior if isinstance(prior, (list, tuple)) else [prior]
    names = [name for entry in listed for name in (entry if isinstance(entry, Mapping) else [entry])]
    if not names:
        return []
    if names not in (["Atomref"], ["LearnableAtomref"]):
        raise ArtifactError(f"TorchMD-Net prior_model={prior!r} cannot be read: only a single Atomref can")
    options = hparams.get("prior_args") or {}
    for entry in options if isinstance(options, (list, tuple)) else [options]:
        if not entry.get("enable", True):
            raise ArtifactError(
                "this TorchMD-Net model's atomic reference energies are switched off; set enable to True in "
                "hparams['prior_args'] for total energies, or take the prior out of hparams and state dict"
            )
    found = [key for key in weights if REFERENCE.fullmatch(key) and key.endswith("atomref.weight")]
    if len(found) != 1:
        raise ArtifactError("the TorchMD-Net state dict lacks the atomic reference energies its hparams name")
    # what the reference energies were before training changes nothing
    weights.pop(found[0].replace("atomref.weight", "initial_atomref"), None)
    return weights.pop(found[0]).flatten().double().tolist()
