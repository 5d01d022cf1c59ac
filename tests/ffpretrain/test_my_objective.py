"""The example of an objective from outside: found by its entry point, and as good a citizen as the others."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from ffpretrain import plugins
from ffpretrain.artifacts import read_card
from ffpretrain.backbones import create_backbone
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Sample, batch_graphs
from ffpretrain.objectives import Objective, create_objective, list_objectives
from ffpretrain.objectives.matrix import all_pairs
from ffpretrain.recipes import load_recipe
from ffpretrain.testing import check_batching, check_rotation, random_molecule
from ffpretrain.training.run import train

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_objective"
NAME = "mass-weighted"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Install the example as pip would, but into a folder of its own and without a network."""
    source = tmp_path_factory.mktemp("source") / "my_objective"
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)
    program = (
        "import sys; from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel(sys.argv[1])"
    )
    made = subprocess.run(
        [sys.executable, "-c", program, str(site)], cwd=source, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    shutil.copy(source / "my_objective.py", site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        plugins._points.cache_clear()
        yield
        sys.modules.pop("my_objective", None)
    plugins._points.cache_clear()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(**options: object) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("painn", hidden=16, layers=2, cutoff=5.0).double()
        return create_objective(NAME, backbone=backbone, **options)


def test_it_is_not_there_before_it_is_installed() -> None:
    assert NAME not in list_objectives()
    with pytest.raises(ConfigError, match="unknown objective 'mass-weighted'"):
        make()


def test_the_entry_point_is_found(installed: None) -> None:
    assert NAME in list_objectives()
    objective = make(sigma=0.05)
    assert (objective.name, objective.sigma) == (NAME, 0.05)
    with pytest.raises(ConfigError, match="sigma=-1"):
        make(sigma=-1.0)
    with pytest.raises(ConfigError, match="has no option 'sgma'; did you mean 'sigma'"):
        make(sgma=0.1)


def test_light_atoms_are_displaced_further(installed: None) -> None:
    objective = make(sigma=0.1)
    graph = batch_graphs([random_molecule([1, 6, 8], 6, 5.0, seeded(1))] * 500)
    seen = []
    objective.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = objective(graph, seeded())
    moved = seen[0].pos - graph.pos
    for number, mass in ((1, 1.008), (6, 12.011), (8, 15.999)):
        own = moved[graph.z == number]
        wanted = 0.1 * math.sqrt(1.008 / mass)
        assert float(own.square().mean().sqrt()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * own.numel()))
    with torch.no_grad():
        for parameter in objective.noise_head.parameters():
            parameter.zero_()
    loss = float(objective(graph, seeded())["loss"].detach())
    assert loss == pytest.approx(float(terms["zero"]), rel=5 * math.sqrt(2 / (3 * len(graph.z))))
    assert float(terms["floor"]) == pytest.approx(6 / 18)


def test_its_field_is_the_score(installed: None) -> None:
    objective, graph = make(sigma=0.1), random_molecule([1, 6, 8], 7, 5.0, seeded(1))
    field = objective.potential(kT=0.02)
    predicted = objective.noise_head(objective.network.features(graph)).detach()
    masses = torch.tensor([{1: 1.008, 6: 12.011, 8: 15.999}[int(z)] for z in graph.z], dtype=torch.float64)
    sigma = 0.1 * (1.008 / masses).sqrt().unsqueeze(1)
    torch.testing.assert_close(field(graph)["forces"], -0.02 / sigma * predicted)
    check_rotation(field, graph)
    check_batching(field, [graph, random_molecule([1, 6, 8], 4, 5.0, seeded(2))])


def test_a_recipe_trains_it_on_every_backbone(installed: None, tmp_path: Path) -> None:
    cells = all_pairs([NAME])
    assert [pair[1] for pair, cell in cells.items() if not cell.works] == ["schnet"]
    recipe = load_recipe(
        "demo-pretrain",
        {
            "objective.name": NAME,
            "objective.options": {"sigma": 0.1},
            "model.backbone": {"name": "painn", "options": {"hidden": 16, "layers": 1}},
            "data.train": 20,
            "data.val": 4,
            "trainer.max_steps": 2,
            "trainer.val_every_steps": 1,
        },
    )
    card = read_card(train(recipe, tmp_path / "run", progress=False))
    assert card.objective is not None
    assert (card.objective.name, card.objective.options) == (NAME, {"sigma": 0.1})
    assert card.kind == "pretrained"  # no file can hold its own class of field
    assert card.errors["validation"].quantities["zero"].value == 1.0


def test_the_loss_of_a_structure_does_not_depend_on_its_batch(installed: None) -> None:
    objective, graphs = make(), [random_molecule([1, 6, 8], n, 5.0, seeded(n)) for n in (4, 8)]
    alone = [
        objective(Sample(g, {}, {"index": torch.tensor([i])}), seeded())["loss"].detach()
        for i, g in enumerate(graphs)
    ]
    both = objective(Sample(batch_graphs(graphs), {}, {"index": torch.tensor([0, 1])}), seeded())["loss"]
    torch.testing.assert_close(both.detach(), (4 * alone[0] + 8 * alone[1]) / 12)
