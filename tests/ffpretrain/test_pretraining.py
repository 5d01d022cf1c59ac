"""What all label-free objectives promise: references in closed form, symmetry, one result on every device."""

from __future__ import annotations

import math

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from ffpretrain.backbones import create_backbone
from ffpretrain.datasets.frames import Frame
from ffpretrain.graphs import Sample
from ffpretrain.noise import FrameGenerators
from ffpretrain.objectives import Objective, create_objective, list_objectives, objective_class
from ffpretrain.objectives.floors import describe
from ffpretrain.testing import random_rotation, randomize
from ffpretrain.training.data import collate, sample_from_frame

CUTOFF = 5.0
LABEL_FREE = [name for name in list_objectives() if not objective_class(name).needs_labels]
# without a straight angle, whose noise slide draws by components in space
MOLECULES = ("CH3CH2OH", "CH3CONH2", "trans-butane", "CH3NO2", "C5H5N", "isobutene", "HCOOCH3", "CH4")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, random: bool = True, **options: object) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=1, heads=2, rbf=8, cutoff=CUTOFF)
        objective = create_objective(name, backbone=backbone.double(), **options)
    if random:
        randomize(objective)
    return objective


def batch(copies: int = 1) -> Sample:
    frames = [
        Frame(numbers=atoms.numbers, positions=atoms.positions) for atoms in map(molecule, MOLECULES * copies)
    ]
    return collate([sample_from_frame(frame, CUTOFF, i) for i, frame in enumerate(frames)])


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {key: float(value.detach()) for key, value in terms.items()}


def silence(objective: Objective) -> None:
    """Make every prediction zero; what draws the noise stays."""
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if not name.startswith("noise_generator"):
                parameter.zero_()


# ---------------------------------------------------------------- references


@pytest.mark.parametrize("name", LABEL_FREE)
def test_predicting_nothing_costs_what_the_closed_form_says(name: str) -> None:
    objective, sample, n = make(name, random=False), batch(copies=6), 12
    silence(objective)
    runs = [values(objective(sample, seeded(s))) for s in range(n)]
    loss, zero = (torch.tensor([run[key] for run in runs], dtype=torch.float64) for key in ("loss", "zero"))
    error = float((loss - zero).std()) / math.sqrt(n)
    assert abs(float((loss - zero).mean())) <= 4 * error + 1e-9 * float(zero.mean())
    assert 4 * error < 0.1 * float(zero.mean())  # the test sees a deviation of a tenth
    assert all(0 <= run.get("floor", 0.0) < 0.7 * run["zero"] for run in runs)


def test_references_by_hand() -> None:
    sample = batch()
    counts = torch.bincount(sample.graph.batch).double()
    rigid = 6.0  # none of the eight molecules is linear
    pairs = float((counts * (counts - 1) / 2).mean())
    n = float(counts.mean())
    wanted = {
        "coord": {"zero": 1.0, "floor": rigid / (3 * n)},
        "georecon": {"zero": 4.5, "floor": 4.5 * rigid / (3 * n)},
        "denoisevae": {"zero": 3 * n, "floor": rigid, "kl_floor": 0.0},
        "se3-ddm": {"zero": pairs / 2, "floor": 0.286 * pairs / 2},
        "3d-emgp": {"inp_chance": math.log(50)},
    }
    for name, references in wanted.items():
        found = values(make(name)(sample, seeded()))
        for key, value in references.items():
            assert found[key] == pytest.approx(value, rel=1e-3), (name, key)
    found = values(make("3d-emgp")(sample, seeded()))
    assert found["zero"] == pytest.approx(found["efp_zero"] + 0.2 * math.log(50))
    atoms = make("denoisevae", reduction="mean")(sample, seeded())
    assert float(atoms["floor"]) == pytest.approx(3 * rigid / (3 * n))


def test_terms_are_described_beside_what_they_are_read_against() -> None:
    terms = {"efp": 12.3456, "loss": 12.7, "zero": 16.5, "efp_zero": 16.0, "inp": 2.0, "inp_chance": 2.3026}
    assert describe(terms) == (
        "loss 12.7 (zero predictor 16.5); efp 12.35 (zero predictor 16); inp 2 (chance 2.3)"
    )
    assert describe({"loss": 0.5, "zero": 1.0, "floor": 0.22222, "sigma": 3.0}) == (
        "loss 0.5 (zero predictor 1, floor 0.222)"
    )
    assert describe({"loss": 0.5, "denoise": 2.0}) == "loss 0.5"


# ---------------------------------------------------------------- symmetry


#: a mirror turns the sign of torsions, by which these draw
CHIRAL_NOISE = {"frad", "slide"}


@pytest.mark.parametrize(
    ("name", "mirror"),
    [(name, 1.0) for name in LABEL_FREE] + [(n, -1.0) for n in LABEL_FREE if n not in CHIRAL_NOISE],
)
def test_the_loss_does_not_change_when_structure_and_noise_turn_together(
    name: str, mirror: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, sample = make(name), batch()
    rotation = mirror * random_rotation(seeded(3))
    plain = values(objective(sample, seeded()))
    draw = FrameGenerators.normal

    def turned(self: FrameGenerators, *arguments: object, **options: object) -> Tensor:
        drawn = draw(self, *arguments, **options)  # type: ignore[arg-type]
        if drawn.shape[1] % 3:
            return drawn  # numbers, not vectors
        return (drawn.view(len(drawn), -1, 3) @ rotation.T.to(drawn)).view(drawn.shape)

    monkeypatch.setattr(FrameGenerators, "normal", turned)
    graph = sample.graph._replace(pos=sample.graph.pos @ rotation.T + 2.0)
    moved = values(objective(sample._replace(graph=graph), seeded()))
    assert moved == pytest.approx(plain, rel=1e-9)
    monkeypatch.undo()
    other = values(objective(sample._replace(graph=graph), seeded()))
    # the noise stayed and the structure turned; what slide draws are changes of bonds, angles and torsions
    assert (other["loss"] == pytest.approx(plain["loss"], rel=1e-9)) is (name == "slide")


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("name", LABEL_FREE)
def test_the_loss_of_a_structure_does_not_depend_on_its_batch(name: str) -> None:
    objective, samples = make(name), []
    for index, chosen in ((7, "CH3CH2OH"), (3, "CH3CONH2")):  # nine atoms each: means over either are alike
        atoms = molecule(chosen)
        frame = Frame(numbers=atoms.numbers, positions=atoms.positions)
        samples.append(sample_from_frame(frame, CUTOFF, index))
    alone = [values(objective(sample, seeded())) for sample in samples]
    for order in (samples, samples[::-1]):
        both = values(objective(collate(order), seeded()))
        assert both == pytest.approx({key: (alone[0][key] + alone[1][key]) / 2 for key in both}, rel=1e-9)
    other = values(objective(samples[0]._replace(extras={"index": torch.tensor([8])}), seeded()))
    assert other["loss"] != pytest.approx(alone[0]["loss"], rel=1e-9)


# ---------------------------------------------------------------- devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", LABEL_FREE)
def test_a_gpu_gives_the_loss_and_the_field_of_the_cpu(name: str) -> None:
    objective, sample = make(name), batch()
    here = values(objective(sample, seeded()))
    field = objective.potential()(sample.graph)["forces"]
    terms = objective.cuda()(sample.to("cuda"), seeded())
    terms["loss"].backward()
    assert values(terms) == pytest.approx(here, rel=1e-8)
    there = objective.potential()(sample.graph.to("cuda"))["forces"]
    torch.testing.assert_close(there.cpu(), field, rtol=1e-7, atol=1e-9 * float(field.abs().max()))
