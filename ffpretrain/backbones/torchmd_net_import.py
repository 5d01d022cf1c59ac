"""Reads weights of TorchMD-Net's equivariant transformer: names, order of rows, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffpretrain.backbones.base import load_exactly
from ffpretrain.backbones.torchmd_et import TorchMDET
from ffpretrain.errors import ArtifactError
from ffpretrain.units import energy_unit as energy_unit_size
from ffpretrain.units import length_unit as length_unit_size

if TYPE_CHECKING:
    from ffpretrain.potential import Potential

#: what TorchMD-Net's ``create_model`` reads and the network depends on
_REQUIRED = (
    "model",
    "embedding_dimension",
    "num_layers",
    "num_heads",
    "num_rbf",
    "cutoff_upper",
    "max_z",
    "rbf_type",
    "activation",
    "attn_activation",
    "distance_influence",
    "neighbor_embedding",
    "output_model",
    "reduce_op",
)
#: option: values that our network is the same function for, and why others are refused
_SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "model": (("equivariant-transformer",), "only the equivariant transformer is read"),
    "output_model": (("Scalar",), "only the scalar (energy) output is read"),
    "rbf_type": (("expnorm",), "only exponential-normal radial functions exist here"),
    "activation": (("silu", "swish"), "only SiLU exists here"),
    "attn_activation": (("silu", "swish"), "only SiLU exists here"),
    "distance_influence": (("both",), "only filters on both keys and values exist here"),
    "neighbor_embedding": ((True,), "a network without neighbour embedding does not exist here"),
    "reduce_op": (("add", "sum"), "an energy that is a mean over atoms is not size-consistent"),
    "cutoff_lower": ((0, None), "a lower cutoff does not exist here"),
    "atom_filter": ((-1, None), "leaving atoms out of the energy does not exist here"),
    "box_vecs": ((None,), "the cell comes with each structure, not with the model"),
    "layernorm_on_vec": ((None, False, "whitened"), "only the whitened vector norm is read"),
    "output_model_noise": ((None,), "a denoising head is not part of a potential"),
}
_OPTIONAL_KEYS = {"mean", "std", "representation_model.distance.box"}
_ATTENTION = "representation_model.attention_layers"
_HEAD = "output_model.output_network"


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

    _check_hparams(hparams)
    energy, length = energy_unit_size(energy_unit), length_unit_size(length_unit)
    weights = {_current_name(key): value for key, value in state_dict.items()}
    whitened = hparams.get("layernorm_on_vec") == "whitened"
    layers, max_z = int(hparams["num_layers"]), int(hparams["max_z"])
    reference = _pop_reference(weights, hparams)
    _check_keys(weights, layers, whitened)
    backbone = TorchMDET(
        hidden=int(hparams["embedding_dimension"]),
        layers=layers,
        heads=int(hparams["num_heads"]),
        rbf=int(hparams["num_rbf"]),
        cutoff=float(hparams["cutoff_upper"]) * length,
        max_z=max_z,
        vector_cutoff=bool(hparams.get("vector_cutoff", False)),
        vec_norm="whitened" if whitened else "none",
    )
    potential = Potential(
        backbone,
        scale=_scalar(weights, "std", 1.0) * energy,
        shift=_scalar(weights, "mean", 0.0) * energy,
        reference_energies={z: e * energy for z, e in enumerate(reference) if 0 < z < max_z},
        elements=list(range(1, max_z)) if elements is None else list(elements),
    ).to(weights["representation_model.embedding.weight"].dtype)
    load_exactly(backbone, _backbone_weights(weights, backbone, whitened), "TorchMD-Net representation_model")
    load_exactly(potential.head, _head_weights(weights), "TorchMD-Net output_model")
    return potential.eval()


def _scalar(weights: Mapping[str, Tensor], key: str, default: float) -> float:
    return float(weights[key]) if key in weights else default


def _current_name(key: str) -> str:
    """Take off Lightning's prefix and rename what TorchMD-Net renamed in 2.0."""
    return re.sub(r"(output_network\.\d+\.update_net)\.(\d+)\.", r"\1.layers.\2.", key.removeprefix("model."))


def _check_hparams(hparams: Mapping[str, Any]) -> None:
    missing = [key for key in _REQUIRED if key not in hparams]
    if missing:
        raise ArtifactError(
            f"TorchMD-Net hparams lack {', '.join(missing)}; give the checkpoint's 'hyper_parameters'"
        )
    for key, (values, reason) in _SUPPORTED.items():
        if key in hparams and hparams[key] not in values:
            raise ArtifactError(f"TorchMD-Net model with {key}={hparams[key]!r} cannot be read: {reason}")


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
    found = [key for key in weights if re.fullmatch(r"prior_model\.(0\.)?atomref\.weight", key)]
    if len(found) != 1:
        raise ArtifactError("the TorchMD-Net state dict lacks the atomic reference energies its hparams name")
    # what the reference energies were before training changes nothing
    weights.pop(found[0].replace("atomref.weight", "initial_atomref"), None)
    return weights.pop(found[0]).flatten().double().tolist()


def _wanted_keys(layers: int, whitened: bool) -> set[str]:
    linear = ["neighbor_embedding.distance_proj", "neighbor_embedding.combine", "out_norm"]
    keys = {"embedding.weight", "neighbor_embedding.embedding.weight"}
    keys |= {"distance_expansion.means", "distance_expansion.betas"}
    keys |= {"out_norm_vec.weight"} if whitened else set()
    for i in range(layers):
        keys.add(f"attention_layers.{i}.vec_proj.weight")
        parts = ("layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "dk_proj", "dv_proj")
        linear += [f"attention_layers.{i}.{part}" for part in parts]
    keys |= {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    wanted = {f"representation_model.{key}" for key in keys}
    for block in (0, 1):
        wanted |= {f"{_HEAD}.{block}.{name}.weight" for name in ("vec1_proj", "vec2_proj")}
        wanted |= {f"{_HEAD}.{block}.update_net.layers.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    return wanted


def _check_keys(weights: Mapping[str, Tensor], layers: int, whitened: bool) -> None:
    wanted = _wanted_keys(layers, whitened)
    extra = sorted(set(weights) - wanted - _OPTIONAL_KEYS)
    if extra:
        raise ArtifactError(
            f"the TorchMD-Net state dict has keys with no place here: {', '.join(extra)}; take them out if "
            "the energy does not depend on them"
        )
    missing = sorted(wanted - set(weights))
    if missing:
        raise ArtifactError(f"the TorchMD-Net state dict lacks {', '.join(missing)}")
    box = weights.get("representation_model.distance.box")
    if box is not None and bool((box != 0).any()):
        raise ArtifactError("the TorchMD-Net model holds a periodic box; the cell comes with each structure")


def _backbone_weights(
    weights: Mapping[str, Tensor], backbone: TorchMDET, whitened: bool
) -> dict[str, Tensor]:
    prefix = "representation_model"
    ours = {
        "embedding.weight": weights[f"{prefix}.embedding.weight"],
        "basis.means": weights[f"{prefix}.distance_expansion.means"],
        "basis.betas": weights[f"{prefix}.distance_expansion.betas"],
        "neighbor_embedding.embedding.weight": weights[f"{prefix}.neighbor_embedding.embedding.weight"],
    }
    if whitened:
        ours["out_norm_vec.weight"] = weights[f"{prefix}.out_norm_vec.weight"]
    for kind in ("weight", "bias"):
        ours[f"out_norm.{kind}"] = weights[f"{prefix}.out_norm.{kind}"]
        ours[f"neighbor_embedding.filter.{kind}"] = weights[
            f"{prefix}.neighbor_embedding.distance_proj.{kind}"
        ]
        ours[f"neighbor_embedding.combine.{kind}"] = weights[f"{prefix}.neighbor_embedding.combine.{kind}"]
        for i in range(len(backbone.layers)):
            layer = {
                name: weights[f"{_ATTENTION}.{i}.{name}.{kind}"]
                for name in ("layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "dk_proj", "dv_proj")
            }
            values = _value_blocks(layer["v_proj"], backbone.heads, first=i == 0)
            filters = _value_blocks(layer["dv_proj"], backbone.heads, first=i == 0)
            out = layer["o_proj"] if i else layer["o_proj"][-backbone.n_features :]
            ours[f"layers.{i}.norm.{kind}"] = layer["layernorm"]
            ours[f"layers.{i}.mix.{kind}"] = torch.cat([layer["q_proj"], layer["k_proj"], values])
            ours[f"layers.{i}.filters.{kind}"] = torch.cat([layer["dk_proj"], filters])
            ours[f"layers.{i}.out.{kind}"] = out
    for i in range(1, len(backbone.layers)):
        ours[f"layers.{i}.vec_proj.weight"] = weights[f"{_ATTENTION}.{i}.vec_proj.weight"]
    return ours


def _value_blocks(rows: Tensor, heads: int, first: bool) -> Tensor:
    """Reorder the rows of a value projection, which TorchMD-Net keeps head by head as (x, vector, direction).

    Returns:
        All heads' rows of ``x``, then of ``direction``, then of ``vector``; the first layer has no vectors,
        so that its last block is left out.
    """
    if rows.shape[0] % (3 * heads):
        raise ArtifactError(
            f"TorchMD-Net: a value projection of {rows.shape[0]} rows does not fit {heads} heads"
        )
    by_head = rows.unflatten(0, (heads, 3, -1))
    x, vector, direction = (by_head[:, i].flatten(0, 1) for i in range(3))
    return torch.cat([x, direction] if first else [x, direction, vector])


def _head_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours = {"first.vec_proj.weight": weights[f"{_HEAD}.0.vec2_proj.weight"]}
    for number, name in enumerate(("first", "second")):
        ours[f"{name}.norm_proj.weight"] = weights[f"{_HEAD}.{number}.vec1_proj.weight"]
        for kind in ("weight", "bias"):
            ours[f"{name}.hidden.{kind}"] = weights[f"{_HEAD}.{number}.update_net.layers.0.{kind}"]
            ours[f"{name}.out.{kind}"] = weights[f"{_HEAD}.{number}.update_net.layers.2.{kind}"]
    # the energy is row 0; row 1 scales the vector that nothing reads, and so does 1.vec2_proj
    for kind in ("weight", "bias"):
        ours[f"second.out.{kind}"] = ours[f"second.out.{kind}"][:1]
    return ours
