"""TorchMD-Net's names and orders: what a checkpoint must say, which keys it holds, and where they go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ffpretrain.backbones.torchmd_et import TorchMDET
from ffpretrain.errors import ArtifactError

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
)
#: option: values that our network is the same function for, and why others are refused
_SUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "model": (("equivariant-transformer",), "only the equivariant transformer is read"),
    "rbf_type": (("expnorm",), "only exponential-normal radial functions exist here"),
    "activation": (("silu", "swish"), "only SiLU exists here"),
    "attn_activation": (("silu", "swish"), "only SiLU exists here"),
    "distance_influence": (("both",), "only filters on both keys and values exist here"),
    "neighbor_embedding": ((True,), "a network without neighbour embedding does not exist here"),
    "cutoff_lower": ((0, None), "a lower cutoff does not exist here"),
    "atom_filter": ((-1, None), "leaving atoms out of the energy does not exist here"),
    "box_vecs": ((None,), "the cell comes with each structure, not with the model"),
    "layernorm_on_vec": ((None, False, "whitened"), "only the whitened vector norm is read"),
}
#: the same, of energies and of noise heads
ENERGY = {
    "output_model": (("Scalar",), "only the scalar (energy) output is read"),
    "reduce_op": (("add", "sum"), "an energy that is a mean over atoms is not size-consistent"),
    "output_model_noise": ((None,), "a denoising head is not part of a potential"),
}
NOISE = {
    "output_model_noise": (("VectorOutput",), "only noise that gated blocks predict is read"),
    "bond_length_scale": ((None, 0), "heads for the noise of bonds, angles and torsions are not read"),
}
BOX = "representation_model.distance.box"
_ATTENTION = "representation_model.attention_layers"
HEAD = "output_model.output_network"
NOISE_HEAD = "output_model_noise.output_network"
COUNT = "pos_normalizer.num_accumulations"
REFERENCE = re.compile(r"prior_model\.(0\.)?(atomref\.weight|initial_atomref)")
NORMALIZER = tuple(f"pos_normalizer.{name}" for name in ("acc_sum", "acc_squared_sum", "acc_count"))


def current_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off Lightning's prefix and rename what TorchMD-Net renamed in 2.0."""
    old = re.compile(r"(output_network\.\d+\.update_net)\.(\d+)\.")
    return {old.sub(r"\1.layers.\2.", k.removeprefix("model.")): value for k, value in state_dict.items()}


def check_hparams(hparams: Mapping[str, Any], more: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    """Refuse hyper-parameters that this package's network cannot represent.

    Args:
        hparams: of a checkpoint.
        more: options that matter for the head: :data:`ENERGY`, :data:`NOISE` or none.

    Raises:
        ArtifactError: one is missing or has a value that is not supported.
    """
    required = [*_REQUIRED, *(key for key in ("output_model", "reduce_op") if key in more)]
    missing = [key for key in required if key not in hparams]
    if missing:
        raise ArtifactError(
            f"TorchMD-Net hparams lack {', '.join(missing)}; give the checkpoint's 'hyper_parameters'"
        )
    for key, (values, reason) in {**_SUPPORTED, **more}.items():
        if key in hparams and hparams[key] not in values:
            raise ArtifactError(f"TorchMD-Net model with {key}={hparams[key]!r} cannot be read: {reason}")


def wanted_keys(backbone: TorchMDET, head: str | None) -> set[str]:
    """Return the keys of a representation and of a head of two gated blocks, or of none."""
    linear = ["neighbor_embedding.distance_proj", "neighbor_embedding.combine", "out_norm"]
    keys = {"embedding.weight", "neighbor_embedding.embedding.weight"}
    keys |= {"distance_expansion.means", "distance_expansion.betas"}
    keys |= {"out_norm_vec.weight"} if backbone.out_norm_vec is not None else set()
    for i in range(len(backbone.layers)):
        keys.add(f"attention_layers.{i}.vec_proj.weight")
        keys |= {f"vec_norms.{i}.weight"} if backbone.vec_norms is not None else set()
        parts = ("layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "dk_proj", "dv_proj")
        linear += [f"attention_layers.{i}.{part}" for part in parts]
    keys |= {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    wanted = {f"representation_model.{key}" for key in keys}
    for block in (0, 1) if head is not None else ():
        wanted |= {f"{head}.{block}.{name}.weight" for name in ("vec1_proj", "vec2_proj")}
        wanted |= {f"{head}.{block}.update_net.layers.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    return wanted


def check_keys(
    weights: Mapping[str, Tensor],
    backbone: TorchMDET,
    head: str | None,
    optional: set[str],
    more: Sequence[str] = (),
) -> None:
    """Refuse a state dict that is not whole, or holds more than the network.

    Args:
        weights: under :func:`current_names`.
        backbone: that is to take the weights.
        head: prefix of the head's keys, or None.
        optional: keys that may be there beside.
        more: keys that must be there beside.

    Raises:
        ArtifactError: keys are missing or left over (all are named), or the model has a box of its own.
    """
    wanted = wanted_keys(backbone, head) | set(more)
    extra = sorted(set(weights) - wanted - optional)
    if extra:
        raise ArtifactError(
            f"the TorchMD-Net state dict has keys with no place here: {', '.join(extra)}; take them out if "
            "the model does not depend on them"
        )
    missing = sorted(wanted - set(weights))
    if missing:
        raise ArtifactError(f"the TorchMD-Net state dict lacks {', '.join(missing)}")
    box = weights.get(BOX)
    if box is not None and bool((box != 0).any()):
        raise ArtifactError("the TorchMD-Net model holds a periodic box; the cell comes with each structure")


def backbone_weights(weights: Mapping[str, Tensor], backbone: TorchMDET) -> dict[str, Tensor]:
    """Return the weights of a representation by the names and in the order of ours."""
    prefix = "representation_model"
    ours = {
        "embedding.weight": weights[f"{prefix}.embedding.weight"],
        "basis.means": weights[f"{prefix}.distance_expansion.means"],
        "basis.betas": weights[f"{prefix}.distance_expansion.betas"],
        "neighbor_embedding.embedding.weight": weights[f"{prefix}.neighbor_embedding.embedding.weight"],
    }
    if backbone.out_norm_vec is not None:
        ours["out_norm_vec.weight"] = weights[f"{prefix}.out_norm_vec.weight"]
    for i in range(len(backbone.vec_norms or ())):
        ours[f"vec_norms.{i}.weight"] = weights[f"{prefix}.vec_norms.{i}.weight"]
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


def head_weights(weights: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """Return the weights of :data:`HEAD` or :data:`NOISE_HEAD` by the names of ours."""
    ours = {"first.vec_proj.weight": weights[f"{head}.0.vec2_proj.weight"]}
    for number, name in enumerate(("first", "second")):
        ours[f"{name}.norm_proj.weight"] = weights[f"{head}.{number}.vec1_proj.weight"]
        for kind in ("weight", "bias"):
            ours[f"{name}.hidden.{kind}"] = weights[f"{head}.{number}.update_net.layers.0.{kind}"]
            ours[f"{name}.out.{kind}"] = weights[f"{head}.{number}.update_net.layers.2.{kind}"]
    # of the last block, row 0 is the scalar and row 1 scales the vector that 1.vec2_proj makes
    vector = head == NOISE_HEAD
    if vector:
        ours["second.vec_proj.weight"] = weights[f"{head}.1.vec2_proj.weight"]
    for kind in ("weight", "bias"):
        ours[f"second.out.{kind}"] = (
            ours[f"second.out.{kind}"][1:] if vector else ours[f"second.out.{kind}"][:1]
        )
    return ours
