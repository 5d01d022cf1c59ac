"""Every backbone passes the whole kit of ffpretrain.testing, and options are refused with a clear error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from pydantic import TypeAdapter

from ffpretrain import testing
from ffpretrain.backbones import Backbone, backbone_class, create_backbone, list_backbones
from ffpretrain.backbones.radial import GaussianBasis
from ffpretrain.errors import ConfigError

SMALL: dict[str, dict[str, Any]] = {
    "torchmd-et": {"hidden": 16, "layers": 2, "heads": 4, "rbf": 8},
    "painn": {"hidden": 16, "layers": 2, "rbf": 8},
    "egnn": {"hidden": 16, "layers": 2},
    "schnet": {"hidden": 16, "layers": 2, "filters": 12, "rbf": 8},
}
VARIANTS = [
    ("torchmd-et", {"layers": 1, "heads": 1, "trainable_rbf": False}),
    ("painn", {"layers": 1, "shared_filters": True}),
    ("painn", {"layers": 3, "shared_filters": True, "trainable_rbf": True}),
    ("egnn", {"layers": 1, "attention": False}),
    ("egnn", {"layers": 3, "update_positions": True}),
    ("schnet", {"layers": 1}),
]


def build(name: str, **options: Any) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_backbone(name, **{"cutoff": 4.0, "max_z": 10, **SMALL[name], **options})


@pytest.mark.parametrize("check", testing.CHECK_NAMES)
@pytest.mark.parametrize("name", sorted(SMALL))
def test_kit(name: str, check: str) -> None:
    testing.run_check(check, build(name))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_kit_on_variants(name: str, options: dict[str, Any]) -> None:
    testing.check_all(build(name, **options), seed=1)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_second_derivatives_are_finite_in_single_precision(name: str) -> None:
    potential = testing.potential_of(build(name)).float()
    for graph in testing.symmetric_molecules([6, 1], potential.cutoff).values():
        testing.check_second_derivatives(potential, graph)
        testing.check_second_derivatives(testing.DenseModel(potential), graph)


def test_without_vector_cutoff_the_energy_jumps_and_nothing_else_breaks() -> None:
    """Why ``vector_cutoff=False``, TorchMD-Net's default, is not the default here."""
    backbone = build("torchmd-et", vector_cutoff=False)
    potential = testing.potential_of(backbone)
    with pytest.raises(testing.SymmetryError, match="energy jumps") as error:
        testing.check_smoothness(potential, [6, 1, 8])
    assert float(str(error.value).split("jumps by ")[1].split()[0]) > 1e-3
    for name, check in testing.checks(potential).items():
        if name != "smoothness":
            check()
    assert not backbone.smooth and build("torchmd-et").smooth


def test_whitened_vectors_break_rotations() -> None:
    """Why ``vec_norm="whitened"`` is for reading published weights only."""
    potential = testing.potential_of(build("torchmd-et", vec_norm="whitened"))
    graph = testing.random_molecule([6, 1, 8], 8, 4.0, torch.Generator().manual_seed(0))
    with pytest.raises(testing.SymmetryError, match="rotation: energy differs"):
        testing.check_rotation(potential, graph, tolerance=1e-4)
    testing.check_translation(potential, graph)
    testing.check_forces(potential, graph)


def test_all_built_in_backbones_are_tested_here() -> None:
    assert set(list_backbones()) >= set(SMALL)
    built_in = {name for name in list_backbones() if not _is_plugin(name)}
    assert built_in == set(SMALL), "add the new backbone to SMALL"


def _is_plugin(name: str) -> bool:
    from ffpretrain.plugins import plugin_names

    return name in plugin_names("ffpretrain.backbones")


@pytest.mark.parametrize("name", sorted(SMALL))
def test_config_rebuilds_the_backbone(name: str) -> None:
    backbone = build(name)
    again = create_backbone(name, **backbone.config)
    again.load_state_dict(backbone.state_dict())
    graph = testing.random_molecule([1, 8], 5, backbone.cutoff, torch.Generator().manual_seed(3))
    assert torch.equal(backbone(graph).scalars, again(graph).scalars)
    assert (again.n_features, again.max_z, again.cutoff) == (16, 10, 4.0)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_same_seed_same_weights(name: str) -> None:
    first, second = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pain", {}, "unknown backbone 'pain'; did you mean 'painn'"),
        ("painn", {"hiden": 8}, "'painn' has no option 'hiden'; did you mean 'hidden'"),
        ("painn", {"layers": 0}, "painn: layers=0 must be above zero"),
        ("painn", {"cutoff": -1.0}, "painn: cutoff=-1.0 must be above zero"),
        ("painn", {"rbf": 1}, "rbf=1: Gaussian"),
        ("egnn", {"hidden": -1}, "egnn: hidden=-1 must be above zero"),
        ("egnn", {"numbers": [1, 1]}, "give both numbers .* and bonds .*, or neither"),
        ("egnn", {"bonds": [[0, 1]]}, "give both numbers .* and bonds .*, or neither"),
        ("egnn", {"numbers": [], "bonds": []}, "give its atomic numbers"),
        ("egnn", {"numbers": [1, 1], "bonds": [[0, 2]]}, r"bonds: \[0, 2\] does not join two of the 2 atoms"),
        ("egnn", {"numbers": [1, 1], "bonds": [[1, 1]]}, r"bonds: \[1, 1\] does not join"),
        ("egnn", {"numbers": [1, 1], "bonds": [[-1, 1]]}, r"bonds: \[-1, 1\] does not join"),
        ("egnn", {"numbers": [1, 1], "bonds": [[0]]}, r"bonds: \[0\] does not join"),
        ("schnet", {"filters": 0}, "schnet: filters=0 must be above zero"),
        ("schnet", {"rbf": 1}, "rbf=1: Gaussian"),
        ("torchmd-et", {"hidden": 20, "heads": 8}, "hidden=20 is not a multiple of heads=8"),
        ("torchmd-et", {"heads": 0}, "torchmd-et: heads=0 must be above zero"),
        ("torchmd-et", {"vec_norm": "white"}, "unknown vec_norm 'white'"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backbone(name, **options)


def test_gaussian_basis_peaks_at_its_centres() -> None:
    basis = GaussianBasis(5, 4.0)
    values = basis(torch.tensor([0.0, 1.0, 2.5]))
    assert values[0, 0] == 1 and values[1, 1] == 1
    assert values[2, 2] == values[2, 3] == pytest.approx(2.718281828 ** (-1 / 8))


def test_the_example_of_the_documentation_passes() -> None:
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    if not page.is_file():
        pytest.skip("needs a checkout")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        if "class Simple" in block or "def test_symmetry" in block:
            exec(compile(block, str(page), "exec"), names)
    for check in testing.CHECK_NAMES:
        names["test_symmetry"](check)


@pytest.mark.parametrize("name", list_backbones())
def test_annotations_of_options_can_be_checked(name: str) -> None:
    hints = get_type_hints(backbone_class(name).__init__)
    assert hints and all(TypeAdapter(hint) for key, hint in hints.items() if key != "return")
