"""The weights of a network in the order in which the native evaluation reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ffpretrain.backbones.painn import Interaction, PaiNN
from ffpretrain.backbones.torchmd_et import EquivariantAttention, TorchMDET
from ffpretrain.heads import EnergyHead, GatedBlock
from ffpretrain.potential import Potential

#: largest sizes the native code has room for
MAX_HIDDEN, MAX_HEADS = 1024, 64
#: number of each backbone in module.cpp
KINDS: dict[type[nn.Module], int] = {TorchMDET: 0, PaiNN: 1}


def unsupported(model: nn.Module, lanes: int) -> str | None:
    """Return why the native code cannot evaluate a model, or None where it can.

    Args:
        model: any module.
        lanes: numbers in one vector register, in the model's precision.
    """
    if not isinstance(model, Potential) or type(model.backbone) not in KINDS:
        return "only potentials with the backbones torchmd-et and painn are evaluated natively"
    backbone, config = model.backbone, model.backbone.config
    if type(model.head) is not EnergyHead:
        return "the head is not the plain energy head"
    normed = config.get("layer_norms") or getattr(backbone, "out_norm_vec", None) is not None
    if normed or not backbone.smooth:
        return "vector_cutoff is off, or the vectors are normalised"
    if config.get("shared_filters"):
        return "the layers share their filters"
    if config["hidden"] % (2 * lanes) or config["hidden"] > MAX_HIDDEN or config.get("heads", 1) > MAX_HEADS:
        return (
            f"hidden is not a multiple of {2 * lanes}, or exceeds {MAX_HIDDEN}, or heads exceed {MAX_HEADS}"
        )
    return None


def flatten(potential: Potential) -> NDArray[np.floating]:
    """Return all weights of a supported potential, one after the other, in its precision."""
    backbone, head = potential.backbone, potential.head
    found = _torchmd_et(backbone) if isinstance(backbone, TorchMDET) else _painn(cast(PaiNN, backbone))
    found += [*_gated(head.first), *_gated(head.second)]
    return torch.cat([w.detach().to("cpu").flatten() for w in found]).numpy()


def _torchmd_et(backbone: TorchMDET) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [backbone.basis.means, backbone.basis.betas, backbone.embedding.weight]
    found.append(backbone.neighbor_embedding.embedding.weight)
    found += _linear(backbone.neighbor_embedding.filter) + _linear(backbone.neighbor_embedding.combine)
    for i, layer in enumerate(cast(Iterable[EquivariantAttention], backbone.layers)):
        found += [layer.norm.weight, layer.norm.bias]
        found += _linear(layer.mix) + _linear(layer.filters) + _linear(layer.out)
        # what a first layer may have for input vectors is not used here: a potential is given none
        if i > 0 and layer.vec_proj is not None:
            found += _linear(layer.vec_proj)
    return [*found, backbone.out_norm.weight, backbone.out_norm.bias]


def _painn(backbone: PaiNN) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [backbone.basis.centers, backbone.basis.widths, backbone.embedding.weight]
    found += _linear(backbone.filters)
    for layer in cast(Iterable[Interaction], backbone.layers):
        for part in (layer.context_in, layer.context_out, layer.vec_proj, layer.update_in, layer.update_out):
            found += _linear(part)
    return found


def _linear(layer: nn.Linear) -> list[torch.Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


def _gated(module: nn.Module) -> list[torch.Tensor]:
    block = cast(GatedBlock, module)
    projections = [block.norm_proj] if block.vec_proj is None else [block.norm_proj, block.vec_proj]
    return [w for layer in (*projections, block.hidden, block.out) for w in _linear(layer)]
