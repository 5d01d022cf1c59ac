"""A GPU gives the losses, gradients, fields and weights of the CPU: every objective, backbone and option."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from ase import Atoms
from ase.build import molecule

from ffpretrain import FFCalculator
from ffpretrain.backbones import create_backbone
from ffpretrain.objectives import Objective, create_objective, list_objectives
from ffpretrain.objectives.matrix import labelled_sample, small_backbone, try_pair
from ffpretrain.potential import Potential
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import randomize
from ffpretrain.training import train

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

#: options beside the defaults that make tensors in ways of their own
OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("3d-emgp", {"target": "gaussian", "langevin_steps": 3}),
    ("3d-emgp", {"target": "distance"}),
    ("coord", {"head": "energy-gradient", "rebuild_edges": False}),
    ("denoisevae", {"covariance": "full", "reduction": "mean"}),
    ("denoisevae", {"sigma_form": "softplus", "kl_dims": 1}),
    ("dens", {"probability": 1.0, "draw": "batch", "sigma_min": 0.01, "main_head": "direct"}),
    ("frad", {"dihedral_sigma_degrees": 30.0, "head": "energy-gradient"}),
    ("georecon", {"decoder": "message-passing", "noise_scale_factor": 1.5}),
    ("ndem", {"per_structure": True, "only_corrupted": True, "structure_ratio": 0.5}),
    ("ndem", {"batch_probability": 0.9, "detach_main": True, "main_head": "direct"}),
    ("se3-ddm", {"all_levels": True, "levels": 5, "mask_ratio": 0.3}),
    ("slide", {"derivative": "finite-difference", "directions": 4}),
    ("slide", {"directions": None, "head": "energy-gradient"}),
    ("supervised", {"energy_per_atom": True, "energy_loss": "huber", "main_head": "direct"}),
    ("supervised", {"property": "energy", "readout": "sum"}),
]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def compare(objective: Objective) -> None:
    """Check that loss, gradients and field of an objective on the GPU are those of the CPU."""
    sample = labelled_sample()
    here = objective(sample, seeded())
    here["loss"].backward()
    wanted = {
        key: p.grad.clone() for key, p in objective.network.backbone.named_parameters() if p.grad is not None
    }
    # a copy: of a supervised objective it is the network itself, which is to stay in training mode
    field = copy.deepcopy(objective.potential()).eval()(sample.graph)
    objective.zero_grad()
    objective.to(DEVICE)
    there = objective(sample.to(DEVICE), seeded())
    assert there["loss"].device.type == DEVICE
    there["loss"].backward()
    for key, value in here.items():
        torch.testing.assert_close(there[key].detach().cpu(), value.detach(), rtol=1e-8, atol=1e-12, msg=key)
    size = max(float(g.abs().max()) for g in wanted.values())
    found = dict(objective.network.backbone.named_parameters())
    for key, gradient in wanted.items():
        got = found[key].grad
        assert got is not None, key
        torch.testing.assert_close(got.cpu(), gradient, rtol=1e-6, atol=1e-9 * size)
    for key, value in copy.deepcopy(objective.potential()).eval()(sample.graph.to(DEVICE)).items():
        atol = 1e-9 * float(field[key].abs().max())
        torch.testing.assert_close(value.detach().cpu(), field[key].detach(), rtol=1e-7, atol=atol)


def build(name: str, backbone: str, **options: object) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = create_objective(name, backbone=small_backbone(backbone).double(), **options)
    randomize(objective)
    return objective


@pytest.mark.parametrize("backbone", ["egnn", "painn", "schnet", "torchmd-et"])
@pytest.mark.parametrize("name", list_objectives())
def test_every_pair(name: str, backbone: str) -> None:
    cell = try_pair(name, backbone, labelled_sample())
    if not cell.works:
        pytest.skip(cell.reason)
    compare(build(name, backbone, **cell.options))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_option(name: str, options: dict[str, object]) -> None:
    compare(build(name, "torchmd-et", **options))


def test_bonds_as_edge_types() -> None:
    sample = labelled_sample()
    numbers = sample.graph.z[: len(sample.graph.z) // 2].tolist()
    bonds = [[0, 1], [1, 2]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("egnn", hidden=16, layers=2, numbers=numbers, bonds=bonds).double()
        objective = create_objective("coord", backbone=backbone)
    randomize(objective)
    compare(objective)


@pytest.mark.parametrize("recipe", ["demo-pretrain", "demo-finetune"])
def test_training_ends_at_the_weights_of_the_cpu(recipe: str, tmp_path: Path) -> None:
    changes = {
        "model.backbone": {
            "name": "torchmd-et",
            "options": {"hidden": 16, "layers": 1, "heads": 2, "rbf": 8, "cutoff": 5.0},
        },
        "model.pretrained": None,
        "data.train": 16,
        "data.val": 4,
        "data.test": 4,
        "schedule.warmup_steps": 1,
        "trainer.max_steps": 6,
        "trainer.batch_size": 4,
        "trainer.val_every_steps": 3,
        "trainer.precision": "float64",
    }
    files = [
        train(load_recipe(recipe, {**changes, "trainer.accelerator": place}), tmp_path / str(i))
        for i, place in enumerate(("cpu", DEVICE))
    ]
    here, there = (safetensors.torch.load_file(file) for file in files)
    assert here.keys() == there.keys()
    for key, value in here.items():
        torch.testing.assert_close(there[key], value, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("cell", [None, [8.0, 9.0, 10.0]])
def test_the_calculator(cell: list[float] | None) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        potential = Potential(small_backbone("torchmd-et")).double().eval()
    randomize(potential)
    results = []
    for device in ("cpu", DEVICE):
        atoms: Atoms = molecule("CH3CH2OH")
        if cell is not None:
            atoms.set_cell(cell)
            atoms.pbc = True
        atoms.calc = FFCalculator(potential, device=device, dtype="float64", on_unfamiliar="ignore")
        results.append((atoms.get_potential_energy(), atoms.get_forces()))
        if cell is not None:
            results[-1] += (atoms.get_stress(),)
    for here, there in zip(*results, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-7, atol=1e-8)
