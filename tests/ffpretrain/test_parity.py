"""The backbones are the functions that TorchMD-Net and SchNetPack have: recorded weights and outputs.

The fixtures in data/ are written by benchmarks/peers/make_fixtures.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from torch import Tensor

from ffpretrain import units
from ffpretrain.backbones.painn import from_schnetpack
from ffpretrain.backbones.torchmd_et import from_torchmd_net
from ffpretrain.backbones.vector_norm import WhitenedNorm
from ffpretrain.errors import ArtifactError, DataError
from ffpretrain.graphs import Graph, batch_graphs, build_graph
from ffpretrain.potential import Potential

DATA = Path(__file__).parent / "data"
ET = ["et_vector_cutoff", "et_published"]
PAINN = ["painn", "painn_shared_filters"]


class Fixture:
    """Weights, structures, recorded outputs and hyper-parameters of one file."""

    def __init__(self, name: str) -> None:
        with safe_open(DATA / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.hparams: dict[str, Any] = json.loads(file.metadata()["fixture"])["hparams"]
        self.weights = {k[8:]: v.double() for k, v in tensors.items() if k.startswith("weights.")}
        self.out = {k[4:]: v for k, v in tensors.items() if k.startswith("out.")}
        self.z, self.pos, self.batch = tensors["z"], tensors["pos"], tensors["batch"]

    def graph(self, cutoff: float) -> Graph:
        masks = [self.batch == i for i in self.batch.unique()]
        return batch_graphs([build_graph(self.z[m], self.pos[m], cutoff) for m in masks])

    def potential(self, **changes: Any) -> Potential:
        return from_torchmd_net(self.weights, {**self.hparams, **changes})


def close(got: Tensor, want: Tensor, rtol: float = 1e-10) -> bool:
    """Whether two tensors agree to rtol of the largest entry; the tolerance asked for is 1e-5."""
    return bool((got - want).abs().max() <= rtol * want.abs().max())


@pytest.mark.parametrize("name", ET)
def test_torchmd_net_energies_forces_and_features(name: str) -> None:
    fixture = Fixture(name)
    potential = fixture.potential()
    graph = fixture.graph(potential.cutoff)
    out, features = potential(graph), potential.features(graph)
    mean = fixture.weights["mean"]
    assert close(out["energy"] - mean, fixture.out["energy"] - mean)
    assert close(out["forces"], fixture.out["forces"])
    assert close(features.scalars, fixture.out["scalars"])
    assert close(features.vectors, fixture.out["vectors"])
    assert potential.dtype == torch.float64 and not potential.training


def test_published_variant_uses_mean_and_std() -> None:
    potential = Fixture("et_published").potential()
    assert (float(potential.shift), float(potential.scale)) == (-406757.625, 12.375)
    assert not potential.backbone.smooth


def test_torchmd_net_in_float32() -> None:
    fixture = Fixture("et_vector_cutoff")
    potential = from_torchmd_net({k: v.float() for k, v in fixture.weights.items()}, fixture.hparams)
    assert potential.dtype == torch.float32
    assert close(potential(fixture.graph(potential.cutoff))["forces"], fixture.out["forces"], rtol=1e-4)


def test_lightning_prefix_and_names_before_2_0() -> None:
    fixture = Fixture("et_vector_cutoff")
    old = {f"model.{k.replace('update_net.layers.', 'update_net.')}": v for k, v in fixture.weights.items()}
    del old["model.representation_model.distance.box"]
    potential = from_torchmd_net(old, fixture.hparams)
    assert close(potential(fixture.graph(potential.cutoff))["energy"], fixture.out["energy"])


def test_torchmd_net_units() -> None:
    """Weights of a program that works in nm and kcal/mol: same structure, numbers in other units."""
    fixture = Fixture("et_published")
    hparams = {**fixture.hparams, "cutoff_upper": fixture.hparams["cutoff_upper"] / 10}
    potential = from_torchmd_net(fixture.weights, hparams, energy_unit="kcal/mol", length_unit="nm")
    plain = fixture.potential()
    graph = fixture.graph(plain.cutoff)
    # alpha and cutoff scale with the length unit, so the network sees the same numbers
    assert potential.cutoff == pytest.approx(plain.cutoff)
    assert close(potential(graph)["energy"], plain(graph)["energy"] * units.KCAL_PER_MOL)
    assert close(potential(graph)["forces"], plain(graph)["forces"] * units.KCAL_PER_MOL)
    with pytest.raises(DataError, match="unknown energy unit 'kcals'"):
        from_torchmd_net(fixture.weights, fixture.hparams, energy_unit="kcals")


def test_only_what_multiplies_zeros_is_left_out() -> None:
    fixture = Fixture("et_vector_cutoff")
    backbone, head = fixture.potential().backbone, fixture.potential().head
    f, k = backbone.n_features, fixture.hparams["num_rbf"]
    ours = sum(v.numel() for module in (backbone, head) for v in module.state_dict().values())
    theirs = sum(v.numel() for v in fixture.weights.values())
    first_layer = f * (f + 1) + f * (k + 1) + 2 * f * (f + 1) + 3 * f * f
    last_block = f // 2 + (f // 2 + 1)
    mean_std_box = 1 + 1 + 9
    assert theirs - ours == first_layer + last_block + mean_std_box


def test_every_other_weight_changes_the_energy() -> None:
    fixture = Fixture("et_vector_cutoff")
    graph = fixture.graph(4.0)
    unused = {
        "representation_model.attention_layers.0.vec_proj.weight",
        "output_model.output_network.1.vec2_proj.weight",
        "representation_model.distance.box",
    }
    for key, value in fixture.weights.items():
        if key in unused:
            continue
        changed = from_torchmd_net({**fixture.weights, key: value * 1.01 + 0.01}, fixture.hparams)
        assert not close(changed(graph, forces=False)["energy"], fixture.out["energy"], rtol=1e-7), key


def test_atomic_reference_prior() -> None:
    fixture = Fixture("et_published")
    reference = torch.linspace(-300.0, 0.0, 10, dtype=torch.float64).view(-1, 1)
    weights = {
        **fixture.weights,
        "prior_model.0.atomref.weight": reference,
        "prior_model.0.initial_atomref": reference,
    }
    hparams = {**fixture.hparams, "prior_model": ["Atomref"], "prior_args": [{"max_z": 10}]}
    potential = from_torchmd_net(weights, hparams, elements=[1, 6, 7, 8, 9])
    graph = fixture.graph(potential.cutoff)
    expected = fixture.out["energy"].index_add(0, graph.batch, reference[graph.z, 0])
    assert torch.allclose(potential(graph)["energy"], expected, rtol=0, atol=1e-8)
    assert potential.elements == [1, 6, 7, 8, 9]
    hparams["prior_args"] = [{"max_z": 10, "enable": False}]
    with pytest.raises(ArtifactError, match="switched off"):
        from_torchmd_net(weights, hparams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tensornet"}, "model='tensornet'.*only the equivariant transformer"),
        ({"rbf_type": "gauss"}, "rbf_type='gauss'"),
        ({"distance_influence": "keys"}, "distance_influence='keys'"),
        ({"activation": "ssp"}, "activation='ssp'"),
        ({"attn_activation": "tanh"}, "attn_activation='tanh'"),
        ({"cutoff_lower": 0.5}, "cutoff_lower=0.5"),
        ({"neighbor_embedding": False}, "neighbor_embedding=False"),
        ({"reduce_op": "mean"}, "reduce_op='mean'.*size-consistent"),
        ({"prior_model": ["ZBL"]}, "prior_model=.'ZBL'."),
        ({"output_model": "DipoleMoment"}, "output_model='DipoleMoment'"),
        ({"atom_filter": 1}, "atom_filter=1"),
        ({"layernorm_on_vec": "other"}, "layernorm_on_vec='other'"),
        ({"num_layers": 2}, "keys with no place here: .*attention_layers.2"),
        ({"num_layers": 4}, "lacks .*attention_layers.3"),
        ({"num_rbf": 9}, r"basis.means has shape \(8,\) where .* \(9,\)"),
        ({"embedding_dimension": 32, "num_heads": 32}, "48 rows does not fit 32 heads"),
        ({"layernorm_on_vec": "whitened"}, "lacks representation_model.out_norm_vec.weight"),
    ],
)
def test_torchmd_net_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as error:
        Fixture("et_vector_cutoff").potential(**changes)
    assert "\n" not in str(error.value)


def test_torchmd_net_unmatched_keys_are_named() -> None:
    fixture = Fixture("et_vector_cutoff")
    with pytest.raises(ArtifactError, match=r"no place here: output_model_noise.w, pos_normalizer.s;"):
        from_torchmd_net(
            {**fixture.weights, "output_model_noise.w": torch.ones(1), "pos_normalizer.s": torch.ones(1)},
            fixture.hparams,
        )
    with pytest.raises(ArtifactError, match=r"lack num_heads; give"):
        from_torchmd_net(fixture.weights, {k: v for k, v in fixture.hparams.items() if k != "num_heads"})
    box = {"representation_model.distance.box": 20 * torch.eye(3)}
    with pytest.raises(ArtifactError, match="periodic box"):
        from_torchmd_net({**fixture.weights, **box}, fixture.hparams)


def test_whitened_norm_is_the_inverse_root_of_the_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = WhitenedNorm(16).double()
    norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    vec = torch.randn(5, 3, 16, generator=generator, dtype=torch.float64)
    for atom, got in zip(vec.numpy(), norm(vec).detach().numpy(), strict=True):
        centered = atom - atom.mean(axis=1, keepdims=True)
        covariance = centered @ centered.T / 16 + 1e-5 * np.diag([1.0, 2.0, 3.0])
        root = scipy.linalg.inv(scipy.linalg.sqrtm(covariance + 1e-5 * np.eye(3)))
        np.testing.assert_allclose(got, root @ centered * norm.weight.detach().numpy(), rtol=1e-9)


def test_whitened_weights_are_read() -> None:
    fixture = Fixture("et_published")
    weights = {**fixture.weights, "representation_model.out_norm_vec.weight": torch.full((16,), 1.5)}
    potential = from_torchmd_net(weights, {**fixture.hparams, "layernorm_on_vec": "whitened"})
    graph = fixture.graph(potential.cutoff)
    norm = WhitenedNorm(16).double()
    norm.weight.data.fill_(1.5)
    assert close(potential.features(graph).vectors, norm(fixture.out["vectors"]))
    assert close(potential.features(graph).scalars, fixture.out["scalars"])


@pytest.mark.parametrize("prefix", ["", "representation.", "model.representation."])
@pytest.mark.parametrize("name", PAINN)
def test_schnetpack_representation(name: str, prefix: str) -> None:
    fixture = Fixture(name)
    model = from_schnetpack({prefix + k: v for k, v in fixture.weights.items()})
    graph = fixture.graph(model.cutoff)
    pos = graph.pos.clone().requires_grad_(True)
    scalars, vectors = model(graph._replace(pos=pos))
    assert close(scalars, fixture.out["scalars"])
    assert close(vectors, fixture.out["vectors"])
    gradient = torch.autograd.grad(scalars.sum() + vectors.square().sum(), pos)[0]
    assert close(gradient, fixture.out["gradient"])
    assert model.config["shared_filters"] == fixture.hparams["shared_filters"]


def test_schnetpack_refusals() -> None:
    weights = Fixture("painn").weights
    with pytest.raises(ArtifactError, match=r"cannot hold: output_modules.0.weight; give the state dict"):
        from_schnetpack({**weights, "output_modules.0.weight": torch.ones(1)})
    with pytest.raises(ArtifactError, match=r"missing: interactions.1.interatomic_context_net.0.bias"):
        from_schnetpack(
            {k: v for k, v in weights.items() if k != "interactions.1.interatomic_context_net.0.bias"}
        )
    with pytest.raises(ArtifactError, match=r"context_in.weight has shape \(8, 16\) where"):
        key = "interactions.0.interatomic_context_net.0.weight"
        from_schnetpack({**weights, key: weights[key][:8]})
    with pytest.raises(ArtifactError, match=r"radial_basis.freqs"):
        renamed = {k: v for k, v in weights.items() if not k.startswith("radial_basis")}
        from_schnetpack({**renamed, "radial_basis.freqs": torch.ones(8)})
