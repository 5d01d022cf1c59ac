"""SchNet (Schütt et al., NeurIPS 2017): continuous-filter convolutions of scalar features.

The same function as the representation of PyTorch Geometric's ``SchNet``, which, like SchNetPack and unlike
the paper, multiplies the filters by the cosine cutoff; that makes the energy smooth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffpretrain.backbones.base import Backbone, Features, check_positive, load_exactly
from ffpretrain.backbones.radial import GaussianBasis, cosine_cutoff
from ffpretrain.errors import ArtifactError, ConfigError
from ffpretrain.heads import EnergyHead
from ffpretrain.pairs import Pairs
from ffpretrain.units import energy_unit as energy_unit_size
from ffpretrain.units import length_unit as length_unit_size

if TYPE_CHECKING:
    from ffpretrain.potential import Potential


def shifted_softplus(x: Tensor) -> Tensor:
    """Return ``ln(exp(x) / 2 + 1 / 2)``, which is 0 at 0 (the paper, section 4.1)."""
    return functional.softplus(x) - math.log(2.0)


class SchNet(Backbone):
    """Continuous-filter convolutional network; registry name ``schnet``. It has no vector features.

    Args:
        hidden: features F.
        layers: number of interaction blocks.
        filters: features of the convolution.
        rbf: number of radial functions, Gaussians.
        cutoff: Å.
        max_z: size of the element embedding; atomic numbers run from 1 to ``max_z - 1``.

    Raises:
        ConfigError: a size or the cutoff is not positive.
    """

    name: ClassVar[str] = "schnet"
    has_vectors: ClassVar[bool] = False

    def __init__(
        self,
        hidden: int = 128,
        layers: int = 6,
        filters: int = 128,
        rbf: int = 50,
        cutoff: float = 5.0,
        max_z: int = 100,
    ) -> None:
        check_positive("schnet", hidden=hidden, layers=layers, filters=filters, cutoff=cutoff, max_z=max_z)
        config = {
            "hidden": hidden,
            "layers": layers,
            "filters": filters,
            "rbf": rbf,
            "cutoff": cutoff,
            "max_z": max_z,
        }
        super().__init__(cutoff, hidden, max_z, config)
        self.embedding = nn.Embedding(max_z, hidden)
        self.basis = GaussianBasis(rbf, cutoff)
        self.layers = nn.ModuleList(Interaction(hidden, filters, rbf) for _ in range(layers))

    def encode(self, z: Tensor, pairs: Pairs, initial: Features | None = None) -> Features:
        """See :class:`~ffpretrain.backbones.base.Backbone`."""
        x, _ = self.with_initial(self.embedding(z), initial)
        weight, basis = cosine_cutoff(pairs.distance, self.cutoff), self.basis(pairs.distance)
        if pairs.other is not None:
            weight = weight * pairs.other
        for layer in self.layers:
            x = x + layer(x, pairs, basis, weight.unsqueeze(-1))
        return Features(x, None)


class Interaction(nn.Module):
    """One interaction block: a filter for each pair, the convolution, and two layers on atoms (Fig. 2).

    Args:
        hidden: features F.
        filters: features of the convolution.
        rbf: number of radial functions K.
    """

    def __init__(self, hidden: int, filters: int, rbf: int) -> None:
        super().__init__()
        self.filter_in = nn.Linear(rbf, filters)
        self.filter_out = nn.Linear(filters, filters)
        self.conv_in = nn.Linear(hidden, filters, bias=False)
        self.conv_out = nn.Linear(filters, hidden)
        self.out = nn.Linear(hidden, hidden)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, pairs: Pairs, basis: Tensor, weight: Tensor) -> Tensor:
        """Return what ``x [N, F]`` gains, given radial functions ``[P, K]`` and the cutoff ``[P, 1]``."""
        filters = self.filter_out(shifted_softplus(self.filter_in(basis))) * weight
        total = pairs.sum(pairs.neighbor(self.conv_in(x)) * filters)
        return self.out(shifted_softplus(self.conv_out(total)))


class ShiftedSoftplusHead(EnergyHead):
    """Atomic energies as SchNet's own output network has them: a shifted softplus in the place of SiLU.

    Args:
        n_features: F of the backbone.
        has_vectors: must be false.

    Raises:
        ConfigError: the backbone has vector features, which this head would not read.
    """

    def __init__(self, n_features: int, has_vectors: bool = False) -> None:
        if has_vectors:
            raise ConfigError("SchNet's energy head reads no vector features; use the usual energy head")
        super().__init__(n_features, False)

    def forward(self, features: Features) -> Tensor:
        """Return atomic energies ``[N]`` in the network's own unit."""
        return self.second(shifted_softplus(self.first(features.scalars))).squeeze(-1)


def from_pyg(
    model: Any,
    *,
    energy_unit: str = "eV",
    length_unit: str = "angstrom",
    elements: Sequence[int] | None = None,
) -> Potential:
    """Return a potential with the weights of PyTorch Geometric's ``SchNet``.

    The model and not its state dict is asked for, because that lacks its cutoff, mean, standard deviation
    and read-out. All neighbours within the cutoff count here, ``max_num_neighbors`` does not exist.

    Args:
        model: a ``torch_geometric.nn.models.SchNet`` that predicts energies as sums over atoms.
        energy_unit: of its predictions.
        length_unit: of the positions it was trained on.
        elements: atomic numbers of the training data; None accepts all that the embedding holds.

    Returns:
        The potential in eval mode, in the precision of the weights. What the model adds to each atom's
        energy, its mean and ``atomref``, becomes its reference energy.

    Raises:
        ArtifactError: another model, or one that predicts something else than a sum over atoms.
        DataError: unknown unit.
    """
    from torch_geometric.nn import aggr, models

    from ffpretrain.potential import Potential

    if type(model) is not models.SchNet:
        raise ArtifactError(f"a {type(model).__name__} is not PyTorch Geometric's SchNet; give one")
    if model.dipole or not isinstance(model.readout, aggr.SumAggregation):
        raise ArtifactError("this SchNet predicts a dipole or a mean; only sums over atoms can be read")
    length = length_unit_size(length_unit)
    scale, reference = _energies(model, energy_unit_size(energy_unit))
    backbone = SchNet(
        hidden=model.hidden_channels,
        layers=model.num_interactions,
        filters=model.num_filters,
        rbf=model.num_gaussians,
        cutoff=float(model.cutoff) * length,
        max_z=len(reference) + 1,
    )
    head = ShiftedSoftplusHead(model.hidden_channels)
    chosen = list(reference) if elements is None else list(elements)
    potential = Potential(backbone, head, scale=scale, reference_energies=reference, elements=chosen)
    potential.to(model.embedding.weight.dtype)
    load_exactly(backbone, _backbone_weights(model, length), "PyTorch Geometric SchNet")
    load_exactly(head, _named_weights(model, _HEAD, model.act.shift), "PyTorch Geometric SchNet")
    return potential.eval()


def _energies(model: Any, unit: float) -> tuple[float, dict[int, float]]:
    """Return what multiplies the network's energies, and what is added for an atom of each element, in eV.

    Args:
        model: PyTorch Geometric's.
        unit: of its predictions in eV.
    """
    unit *= 1.0 if model.scale is None else float(model.scale)
    mean, std = (0.0, 1.0) if None in (model.mean, model.std) else (float(model.mean), float(model.std))
    added = [0.0] * len(model.embedding.weight)
    if model.atomref is not None:
        added = model.atomref.weight.detach().double().flatten().tolist()
    return std * unit, {z: (mean + added[z]) * unit for z in range(1, len(added))}


_LAYER = {
    "filter_in": "mlp.0",
    "filter_out": "mlp.2",
    "conv_in": "conv.lin1",
    "conv_out": "conv.lin2",
    "out": "lin",
}
_HEAD = {"first": "lin1", "second": "lin2"}
#: layers that read a shifted softplus
_AFTER_SOFTPLUS = ("mlp.2", "lin", "lin2")


def _named_weights(module: Any, names: Mapping[str, str], shift: float) -> dict[str, Tensor]:
    """Return weights of PyTorch Geometric's layers by our names.

    Args:
        module: of the model.
        names: ours and theirs.
        shift: of their softplus, ln 2 rounded to single precision; the difference goes into the biases.
    """
    ours = {}
    for own, name in names.items():
        for key, value in module.get_submodule(name).state_dict().items():
            ours[f"{own}.{key}"] = value
        if name in _AFTER_SOFTPLUS:
            rows = ours[f"{own}.weight"].sum(1)
            ours[f"{own}.bias"] = ours[f"{own}.bias"] + (math.log(2.0) - shift) * rows
    return ours


def _backbone_weights(model: Any, length: float) -> dict[str, Tensor]:
    """Return the weights of PyTorch Geometric's representation by our names, radial functions in Å."""
    centers = model.distance_expansion.offset * length
    # it keeps -1 / (2 width^2) as a number of its own
    width = (-0.5 / model.distance_expansion.coeff) ** 0.5 * length
    ours = {
        "embedding.weight": model.embedding.weight.detach(),
        "basis.centers": centers,
        "basis.widths": torch.full_like(centers, width),
    }
    for i, block in enumerate(model.interactions):
        named = _named_weights(block, _LAYER, model.act.shift)
        ours |= {f"layers.{i}.{name}": value for name, value in named.items()}
    return ours
