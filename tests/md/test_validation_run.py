"""Replicas, distances, own frames, and a validation as a whole: its files, resuming, the command."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed
from ase.calculators.lj import LennardJones
from torch import Tensor, nn

from ffpretrain import FFCalculator, cli, load_potential, units
from ffpretrain.datasets import DatasetMetadata, Frame, InMemoryDataset
from ffpretrain.datasets.engines import open_engine
from ffpretrain.datasets.store import write_store
from ffpretrain.errors import ConfigError, DataError, MissingDependencyError, UserError
from ffpretrain.graphs import Graph
from ffpretrain.md import validate
from ffpretrain.md.stability import StabilityCheck
from ffpretrain.md.validation import (
    Plan,
    conservation,
    engines,
    examination,
    plan,
    relabel,
    stability,
    subject,
)
from ffpretrain.md.validation.distances import (
    BIN,
    Distances,
    boltzmann_weights,
    centres,
    density,
    distances_of,
    effective_number,
    mean_absolute_error,
    reweighted_counts,
    sampling_error,
)
from ffpretrain.md.validation.relabel import check_own_frames
from ffpretrain.md.validation.replica_run import COUNTED, ReplicaRun, read_kept
from ffpretrain.md.validation.result import Check
from ffpretrain.md.validation.stability import (
    check_distances,
    check_stability,
    failed_frames,
    make_replicas,
    run_replicas,
    too_little_sampling,
)
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.training_data import TrainingFrames, read_frames
from ffpretrain.potential import Potential

Model = type[nn.Module]
Build = Callable[..., Potential]
TEMPERATURES = (300.0, 500.0)
SHORT = Plan("short", nve_ps=0.02, stability_ps=0.03, replicas=2, relabelled=6)


def run(model: nn.Module, path: Path, plan: Plan = SHORT, data: TrainingFrames | None = None) -> ReplicaRun:
    examined = Subject(model, molecule("CH4"), "cpu", "float64")
    replicas = make_replicas(examined, plan, TEMPERATURES)
    return run_replicas(examined, replicas, plan, TEMPERATURES, data, path, progress=False)


def frames_of(atoms: Atoms, count: int, std: float = 0.03, shift: float = 0.0) -> TrainingFrames:
    rng = np.random.default_rng(0)
    positions = atoms.positions * (1 + shift) + rng.normal(0, std, (count, len(atoms), 3))
    return TrainingFrames("made up", positions, True, 500.0, distances_of(positions, len(atoms)), None)


# replicas


def test_replicas_of_a_bound_molecule_are_stable(morse: Model, tmp_path: Path) -> None:
    done = run(morse(), tmp_path / "replicas.npz")
    check = check_stability(done, TEMPERATURES, "here")
    assert check.status == "passed", check.summary
    assert check.measured["first_failure"] is None and check.measured["replicas"] == 4
    assert [row["temperature"] for row in check.measured["by_temperature"]] == [300.0, 500.0]
    assert done.step == 60
    kept = read_kept(tmp_path / "replicas.npz")
    assert [(frame.replica, frame.step) for frame in kept] == [(k % 4, 10 * (k + 1)) for k in range(6)]


def test_a_weak_bond_breaks_and_is_reported_with_its_time(morse: Model, tmp_path: Path) -> None:
    plan = replace(SHORT, stability_ps=0.2, temperatures=(300.0, 500.0))
    done = run(morse(depth=0.02), tmp_path / "replicas.npz", plan)
    check = check_stability(done, TEMPERATURES, "here")
    first = check.measured["first_failure"]
    assert check.status == "missed" and "bond C0-H" in first["cause"] and "long, allowed" in first["cause"]
    assert first["step"] == min(failure["step"] for failure in done.failures) > 0
    assert first["time"] == pytest.approx(first["step"] * 0.5e-3)
    assert sum(row["failed"] for row in check.measured["by_temperature"]) == len(done.failures)
    atoms = molecule("CH4")
    frame = failed_frames(atoms, done.failures)[0]
    lengths = frame.get_distances(0, range(1, 5))
    assert lengths.max() > 2 * 1.08 and frame.info["step"] == first["step"]


def test_atoms_that_fall_onto_one_another_are_found(morse: Model, tmp_path: Path) -> None:
    def attraction(pos: Tensor, graph: Graph) -> Tensor:
        neighbor, center = graph.edge_index
        r = (pos[neighbor] - pos[center]).norm(dim=1)
        return pos.new_zeros(graph.n_graphs).index_add(0, graph.batch[center], 10 * r.square())

    class Collapse(morse):  # type: ignore[valid-type,misc]
        def energy(self, pos: Tensor, graph: Graph) -> Tensor:
            return attraction(pos, graph)

    done = run(Collapse(), tmp_path / "replicas.npz")
    assert check_stability(done, TEMPERATURES, "").status == "missed"
    assert "Å apart, allowed" in done.failures[0]["cause"]


def test_a_force_that_is_not_finite_stops_a_replica(morse: Model, tmp_path: Path) -> None:
    class Hole(morse):  # type: ignore[valid-type,misc]
        def field(self, pos: Tensor, forces: Tensor) -> Tensor:
            return torch.where((pos.norm(dim=1) > 1.2).unsqueeze(1), torch.nan, forces)

    done = run(Hole(), tmp_path / "replicas.npz", replace(SHORT, stability_ps=0.2))
    check = check_stability(done, TEMPERATURES, "")
    assert check.status == "missed"
    assert check.measured["first_failure"]["cause"] == "energy or forces are not finite"


def test_a_run_that_is_continued_equals_one_that_was_not(
    morse: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(morse(), tmp_path / "whole.npz")
    half = run(morse(), tmp_path / "half.npz", replace(SHORT, stability_ps=0.015, relabelled=3))
    assert half.step == 30
    joined = run(morse(), tmp_path / "half.npz")
    assert joined.step == 60
    assert torch.equal(joined.motion.positions, whole.motion.positions)
    assert torch.equal(joined.motion.velocities, whole.motion.velocities)
    assert [k[:2] for k in joined.kept] == [k[:2] for k in whole.kept]
    np.testing.assert_array_equal(joined.kept[-1].positions, whole.kept[-1].positions)


def test_replicas_that_failed_stay_where_they_are_when_a_run_goes_on(morse: Model, tmp_path: Path) -> None:
    plan = replace(SHORT, stability_ps=0.2)
    whole = run(morse(depth=0.02), tmp_path / "whole.npz", plan)
    first, last = whole.failures[0]["step"], whole.failures[-1]["step"]
    assert first < last, "the test needs replicas that fail one after another"
    run(morse(depth=0.02), tmp_path / "half.npz", replace(plan, stability_ps=5e-4 * (first + 1)))
    joined = run(morse(depth=0.02), tmp_path / "half.npz", plan)
    assert joined.failures == whole.failures
    assert torch.equal(joined.motion.positions, whole.motion.positions)


def test_counts_and_temperatures_leave_out_the_beginning(morse: Model, tmp_path: Path) -> None:
    data = frames_of(molecule("CH4"), 50)
    done = run(morse(), tmp_path / "replicas.npz", data=data)
    counted = sum(step % COUNTED == 0 for step in range(13, 61))  # of 60 steps, a fifth is left out
    assert done.distances.counts.sum(1).tolist() == [10 * counted] * 4
    assert done.averaged.tolist() == [48] * 4
    means = done.mean_temperatures()
    assert np.all(means > 50) and np.all(means < 1500)


def test_replicas_start_from_frames_of_the_data(morse: Model, tmp_path: Path) -> None:
    data = frames_of(molecule("CH4"), 50)
    plan = replace(SHORT, stability_ps=0.0005)
    starts = run(morse(), tmp_path / "replicas.npz", plan, data).motion.positions.numpy()
    nearest = np.abs(starts[:, None] - data.positions[None]).max(axis=(2, 3))
    assert nearest.min(1).max() < 0.05 and len(set(nearest.argmin(1).tolist())) == 4


# distances


def test_h_of_r_is_a_normalised_histogram() -> None:
    rng = np.random.default_rng(0)
    positions = rng.normal(0, 1.5, (40, 6, 3))
    counts = distances_of(positions, 6)
    i, j = np.triu_indices(6, 1)
    every = np.linalg.norm(positions[:, i] - positions[:, j], axis=2).ravel()
    want, _ = np.histogram(every, np.arange(counts.shape[1] + 1) * BIN, density=True)
    np.testing.assert_allclose(density(counts.sum(0)), want, atol=1e-12)
    assert density(counts.sum(0)).sum() * BIN == pytest.approx(1.0)
    assert float((centres() * want).sum() * BIN) == pytest.approx(every.mean(), abs=BIN / 2)
    counter = Distances(6, 2)
    counter.add(torch.tensor(positions[:2]))
    counter.add(torch.tensor(positions[2:4]), torch.tensor([True, False]))
    assert counter.counts.sum(1).tolist() == [30, 15]


def test_the_error_is_the_integral_of_the_difference() -> None:
    """Two normal distributions whose means are d widths apart: 2 erf(d / √8)."""
    r, width = centres(), 0.5
    one, other = (np.exp(-0.5 * ((r - m) / width) ** 2) / width / math.sqrt(2 * math.pi) for m in (5.0, 5.4))
    assert mean_absolute_error(one, other) == pytest.approx(2 * math.erf(0.8 / math.sqrt(8)), rel=1e-3)
    assert mean_absolute_error(one, one) == 0
    apart = np.eye(len(r))[[10, 100]] / BIN
    assert mean_absolute_error(*apart) == pytest.approx(2.0)


def test_the_sampling_error_is_that_of_a_perfect_sample() -> None:
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(50))
    estimates, errors = [], []
    for _ in range(60):
        counts = rng.multinomial(400, truth, size=4)
        estimates.append(sampling_error(counts))
        errors.append(mean_absolute_error(density(counts.sum(0)), truth / BIN))
    assert np.mean(estimates) == pytest.approx(np.mean(errors), rel=0.05)
    assert sampling_error(counts[:1]) is None


def test_distances_as_in_the_data_pass_and_others_miss(morse: Model, tmp_path: Path) -> None:
    done = run(morse(), tmp_path / "replicas.npz", data=frames_of(molecule("CH4"), 50))
    counts = done.distances.counts[1::2].numpy()
    same = TrainingFrames("own", np.zeros((1, 5, 3)), True, 500.0, counts, None)
    check = check_distances(done, TEMPERATURES, same)
    assert check.status == "passed" and check.measured["hr_mae"] == 0
    other = frames_of(molecule("CH4"), 200, shift=0.1)
    check = check_distances(done, TEMPERATURES, other)
    assert check.status == "missed" and check.measured["hr_mae"] > 0.5
    assert sum(check.series["data"]) * BIN == pytest.approx(1.0)
    assert check_distances(done, TEMPERATURES, None).status == "not run"


@pytest.mark.parametrize(
    ("error", "perfect", "nothing"),
    [(0.06, 0.055, True), (0.06, 0.04, False), (0.3, 0.055, False), (0.08, 0.07, True)],
)
def test_a_miss_that_a_perfect_model_would_share_decides_nothing(
    error: float, perfect: float, nothing: bool
) -> None:
    assert too_little_sampling(error, perfect) is nothing


def test_few_frames_of_the_same_ensemble_do_not_decide(morse: Model, tmp_path: Path) -> None:
    """Two disjoint samples of one distribution, each so small that they differ by more than the threshold."""
    done = run(morse(), tmp_path / "replicas.npz", data=frames_of(molecule("CH4"), 50))
    rng = np.random.default_rng(3)
    hot = torch.arange(len(done.temperatures)) % 2 == 1
    truth = np.zeros(done.distances.bins)
    truth[40:90] = 1 / 50
    for replica in np.flatnonzero(hot.numpy()):
        done.distances.counts[replica] = torch.tensor(rng.multinomial(5_000, truth))
    few = TrainingFrames("few", np.zeros((1, 5, 3)), True, 500.0, rng.multinomial(6_000, truth, size=2), None)
    check = check_distances(done, TEMPERATURES, few)
    assert check.measured["hr_mae"] > 0.05 and check.measured["of_a_perfect_model"] > 0.05
    assert check.status == "undecided" and "sample more" in check.summary


def test_training_frames_are_those_of_the_molecule(morse: Model, tmp_path: Path) -> None:
    methane, water = molecule("CH4"), molecule("H2O")
    stretched = methane.copy()
    stretched.set_distance(0, 1, 1.5, fix=0)
    frames = [methane, water, stretched]
    for frame in frames:
        frame.calc = FFCalculator(morse(), "cpu")
        frame.get_forces()
    ase.io.write(tmp_path / "data.extxyz", frames)
    examined = Subject(morse(), methane, "cpu")
    found = read_frames([tmp_path / "data.extxyz"], examined, 500.0, ())
    assert len(found.positions) == 2 and found.ordered
    assert found.longest is not None and found.longest[0] == pytest.approx(1.5)
    assert found.longest[1] == pytest.approx(methane.get_distance(0, 2))
    with pytest.raises(DataError, match="no frame is of H3N"):
        read_frames([tmp_path / "data.extxyz"], Subject(morse(), molecule("NH3"), "cpu"), 500.0, ())
    other_order = Subject(morse(), methane[[1, 0, 2, 3, 4]], "cpu")
    turned = read_frames([tmp_path / "data.extxyz"], other_order, 500.0, ())
    assert not turned.ordered and turned.longest is None


def pair_frames(n: int, mean: float, width: float, seed: int) -> np.ndarray:
    """Return positions of a diatomic molecule whose distance is normally distributed, ``[n, 2, 3]``."""
    positions = np.zeros((n, 2, 3))
    positions[:, 1, 0] = np.random.default_rng(seed).normal(mean, width, n)
    return positions


def test_reweighted_distances_are_those_of_the_other_ensemble() -> None:
    """Two springs of one stiffness at different lengths: normal distributions, one moved to the other."""
    kT, stiffness, rest, moved = 0.04, 8.0, 3.0, 3.06
    width = math.sqrt(kT / stiffness)
    truth = np.exp(-0.5 * ((centres() - moved) / width) ** 2) / width / math.sqrt(2 * math.pi)
    errors: dict[str, list[float]] = {"smooth": [], "frames": [], "none": [], "perfect": []}
    for seed in range(20):
        positions = pair_frames(1000, rest, width, seed)
        r = positions[:, 1, 0]
        excess = 0.5 * stiffness * ((r - moved) ** 2 - (r - rest) ** 2)
        others = np.random.default_rng(200 + seed).normal(0, 1.2 * kT, 1000)  # what other coordinates add
        weights = boltzmann_weights(excess + others, kT)
        found = {
            "smooth": reweighted_counts(positions, weights),
            "frames": np.bincount((r / BIN).astype(int), weights=weights, minlength=len(truth)),
            "none": distances_of(positions, 2).sum(0),
            "perfect": distances_of(pair_frames(1000, moved, width, 100 + seed), 2).sum(0),
        }
        for name, counts in found.items():
            errors[name].append(mean_absolute_error(density(counts), truth))
    mean = {name: float(np.mean(values)) for name, values in errors.items()}
    assert mean["none"] > 4 * mean["perfect"]
    assert mean["smooth"] < 0.8 * mean["frames"]
    assert mean["smooth"] < 0.3 * mean["none"]
    # a rest moved by 0.85 widths leaves exp(-0.85^2) of the frames
    only = boltzmann_weights(excess, kT)
    assert effective_number(only) == pytest.approx(1000 * math.exp(-((0.06 / width) ** 2)), rel=0.2)
    # a constant difference of energies changes nothing
    np.testing.assert_allclose(boltzmann_weights(excess + 1e4, kT), only, rtol=1e-6)
    # weights that depend on this distance alone are met exactly, for their logarithm is a parabola
    exact = np.bincount((r / BIN).astype(int), weights=only, minlength=len(truth))
    np.testing.assert_allclose(reweighted_counts(positions, only), exact, atol=1e-4)
    still = np.zeros((30, 2, 3))
    still[:, 1, 0] = 1.0
    assert reweighted_counts(still, np.linspace(0.5, 1.5, 30)).max() == 30


def test_frames_that_say_what_they_were_sampled_with_are_reweighted(morse: Model, tmp_path: Path) -> None:
    methane, kT = molecule("CH4"), units.KB * 500.0
    examined, rng = Subject(morse(), methane, "cpu"), np.random.default_rng(3)
    made = []
    for _ in range(200):
        positions = methane.positions + rng.normal(0, 0.05, (5, 3))
        # the frames' own energies favour short C-H bonds, by which the labels' ensemble is shorter
        lengths = np.linalg.norm(positions[1:] - positions[0], axis=1).sum()
        made.append(
            Frame(methane.numbers, positions, energy=20 * kT * lengths, properties={"sampling_energy": 0.0})
        )
    metadata = DatasetMetadata("sampled", properties={"sampling_energy": "eV"})
    write_store(tmp_path / "sampled.h5", InMemoryDataset(made, metadata))
    found = read_frames([tmp_path / "sampled.h5"], examined, 500.0, ())
    assert found.ensemble is not None and 10 < found.ensemble.effective < 150
    plain, other = density(found.counts.sum(0)), density(found.ensemble.counts)
    bonds = centres() < 1.4
    mean = [float((centres() * h)[bonds].sum() / h[bonds].sum()) for h in (plain, other)]
    assert mean[1] < mean[0] - 0.02
    assert found.ensemble.halves.sum() == pytest.approx(200 * 10) == found.ensemble.counts.sum()
    done = run(morse(), tmp_path / "replicas.npz", data=found)
    check = check_distances(done, TEMPERATURES, found)
    own = done.distances.density(torch.arange(4) % 2 == 1)
    assert check.measured["hr_mae"] == pytest.approx(mean_absolute_error(own, other))
    assert check.measured["hr_mae_as_sampled"] == pytest.approx(mean_absolute_error(own, plain))
    assert check.measured["reweighted"] and "reweighted to the ensemble of their labels" in check.summary
    # too few for a fit, or frames that do not say it, are taken as they are
    few = InMemoryDataset(made[:10], metadata)
    silent = InMemoryDataset([replace(frame, properties={}) for frame in made], DatasetMetadata("silent"))
    for name, frames in (("few", few), ("silent", silent)):
        write_store(tmp_path / f"{name}.h5", frames)
        assert read_frames([tmp_path / f"{name}.h5"], examined, 500.0, ()).ensemble is None


def test_the_frames_of_revised_md17_are_not_from_the_ensemble_of_their_labels(shared_data: Path) -> None:
    file = shared_data / "rmd17" / "rmd17_aspirin_train_01.npz"
    examined = Subject(load_potential("ndem-aspirin"), None, "cpu")
    found = read_frames([file], examined, 500.0, ())
    assert found.ensemble is not None and 150 < found.ensemble.effective < 350
    as_sampled, other = density(found.counts.sum(0)), density(found.ensemble.counts)
    noise = sampling_error(found.ensemble.halves)
    assert noise is not None and noise < 0.03
    # a model whose dynamics gave the labels' ensemble exactly would miss the threshold as sampled
    assert mean_absolute_error(as_sampled, other) > 0.055


# own frames


def own_frames(count: int = 3) -> list[Atoms]:
    frames = []
    for place in range(count):
        frame = molecule("CH4")
        frame.rattle(0.05, seed=place)
        frame.info["temperature"] = TEMPERATURES[place % 2]
        frames.append(frame)
    return frames


def test_errors_on_own_frames_are_those_against_the_reference(morse: Model, tmp_path: Path) -> None:
    examined, frames = Subject(morse(), molecule("CH4"), "cpu"), own_frames()
    check = check_own_frames(examined, frames, "lj", tmp_path / "labels.npz", False)
    forces, energies = [], []
    for frame in frames:
        frame.calc = LennardJones()
        forces.append(examined.exact.get_forces(frame) - frame.get_forces())
        energies.append(examined.exact.get_potential_energy(frame) - frame.get_potential_energy())
    m = check.measured
    assert check.status == "reported"
    assert m["forces_mae"] == pytest.approx(np.abs(forces).mean())
    assert m["forces_rmse"] == pytest.approx(np.sqrt(np.square(forces).mean()))
    assert m["energy_mae"] == pytest.approx(np.abs(energies - np.mean(energies)).mean())
    assert m["by_temperature"][1]["forces_mae"] == pytest.approx(np.abs(forces[1]).mean())
    assert (m["frames"], m["frames_failed"], m["level_of_theory"]) == (3, 0, "Lennard-Jones")


def test_labels_computed_before_are_kept_and_failures_counted(
    morse: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined, frames, asked = Subject(morse(), molecule("CH4"), "cpu"), own_frames(), []
    engine = open_engine("lj")

    class Picky(LennardJones):
        def calculate(self, atoms: Any = None, *args: Any) -> None:
            asked.append(atoms.positions.copy())
            if len(asked) == 2:
                raise CalculationFailed("no convergence")
            if len(asked) == 3:
                raise KeyboardInterrupt
            super().calculate(atoms, *args)

    monkeypatch.setattr(relabel, "open_engine", lambda *a, **k: replace(engine, calculator=Picky()))
    path = tmp_path / "labels.npz"
    with pytest.raises(KeyboardInterrupt):
        check_own_frames(examined, frames, "lj", path, False)
    check = check_own_frames(examined, frames, "lj", path, False)
    assert len(asked) == 4 and np.array_equal(asked[2], asked[3])
    assert (check.measured["frames"], check.measured["frames_failed"]) == (2, 1)


def test_a_reference_of_another_level_is_refused(with_card: Build, ethanol: Atoms) -> None:
    examined = Subject(with_card(level_of_theory="PBE/def2-SVP"), ethanol, "cpu")
    with pytest.raises(ConfigError, match="trained on PBE/def2-SVP, 'lj' computes Lennard-Jones"):
        relabel.open_reference("lj", examined)
    assert relabel.open_reference("ase.calculators.lj:LennardJones", examined).name
    assert relabel.open_reference("lj", Subject(with_card(level_of_theory=None), ethanol, "cpu"))


# the whole


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, morse: Model) -> None:
    """Methane bound by a Morse potential is what every name means, both levels are short."""
    monkeypatch.setattr(subject, "load_model", lambda model: morse())
    monkeypatch.setattr(engines, "ENGINES", ())
    monkeypatch.setattr("ffpretrain.md.validation.conservation.NVE_SLOPE", 10.0)
    monkeypatch.setitem(plan.PLANS, "quick", replace(SHORT, name="quick"))
    seconds = examination._seconds
    monkeypatch.setattr(examination, "_seconds", lambda function: seconds(function, 0.01))


def command(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", *map(str, words)])
    return caught.value.code


@pytest.fixture
def methane_file(tmp_path: Path) -> Path:
    path = tmp_path / "methane.xyz"
    ase.io.write(path, molecule("CH4"))
    return path


@pytest.mark.usefixtures("tiny")
def test_the_command_writes_result_and_report(
    methane_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command("any", methane_file, "--out", out, "--reference", "lj", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "passed" and lines[-1].endswith("validation.html")
    assert lines[0].startswith("level quick: about ") and lines[0].endswith(" on this machine")
    result = json.loads((out / "validation.json").read_text())
    assert (result["schema"], result["version"], result["passed"]) == ("ffpretrain-validate", 1, True)
    assert result["thresholds"]["nve_slope"] == {"value": 0.05, "unit": "meV/atom/ps"}
    status = {name: check["status"] for name, check in result["checks"].items()}
    assert status == {
        "engines": "passed",
        "symmetry": "passed",
        "stretch": "passed",
        "vibrations": "passed",
        "nve": "passed",
        "stability": "passed",
        "distances": "not run",
        "own-frames": "reported",
    }
    page = (out / "validation.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page and "Replicas are stable" in page
    frames = ase.io.read(out / "frames.extxyz", ":")
    assert len(frames) == 6 and {frame.info["temperature"] for frame in frames} == {300.0, 500.0}
    assert frames[0].get_forces().shape == (5, 3)


@pytest.mark.usefixtures("tiny")
def test_a_miss_exits_1_and_json_is_printed(
    methane_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffpretrain.md.validation.conservation.NVE_SLOPE", 1e-12)
    assert command("any", methane_file, "--out", tmp_path / "out", "--json", "--device", "cpu") == 1
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result == json.loads((tmp_path / "out" / "validation.json").read_text())
    assert not result["passed"] and "nve         missed" in output.err


@pytest.mark.usefixtures("tiny")
def test_a_constant_energy_run_goes_on_where_it_was_stopped(
    methane_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = partial(conservation.simulate, restart_interval=10)
    monkeypatch.setattr(conservation, "simulate", often)
    words = ("any", methane_file, "--device", "cpu", "--seed", 3)
    assert command(*words, "--out", tmp_path / "whole") == 0
    right, steps = StabilityCheck.check_step, []

    def interrupted(self: StabilityCheck, atoms: Atoms, step: int) -> None:
        steps.append(step)
        if step == 25 and len(steps) == 25:
            raise KeyboardInterrupt
        right(self, atoms, step)

    monkeypatch.setattr(StabilityCheck, "check_step", interrupted)
    assert command(*words, "--out", tmp_path / "out") == 130
    assert command(*words, "--out", tmp_path / "out", "--resume") == 0
    # from the restart file of step 20 on, to the 40 steps of the plan
    assert steps == [*range(1, 26), *range(21, 41)]
    checks = [
        json.loads((tmp_path / name / "validation.json").read_text())["checks"]["nve"]
        for name in ("whole", "out")
    ]
    for check in checks:
        check["measured"].pop("ms_per_step")
    assert checks[0] == checks[1]


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_validation_goes_on(
    methane_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("any", methane_file, "--device", "cpu", "--seed", 3)
    assert command(*words, "--out", tmp_path / "whole") == 0
    right, asked = stability.ReplicaRun._count, []

    def interrupted(self: ReplicaRun, steps: int) -> None:
        asked.append(self.step)
        right(self, steps)
        if len(asked) == 29:
            self._save()
        if len(asked) == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stability.ReplicaRun, "_count", interrupted)
        assert command(*words, "--out", tmp_path / "out") == 130
    assert "--resume goes on" in capsys.readouterr().err
    for name in ("engines", "symmetry", "stretch", "vibrations", "conservation"):
        monkeypatch.setattr(examination, f"check_{name}", lambda *a, name=name: pytest.fail(f"{name} again"))
    assert command(*words, "--out", tmp_path / "out", "--resume") == 0
    results = [json.loads((tmp_path / n / "validation.json").read_text()) for n in ("whole", "out")]
    for result in results:
        result.pop("seconds")
        for check in result["checks"].values():
            check["measured"].pop("ms_per_step", None)
    assert results[0] == results[1]
    # a reference can be given later; everything else stays as it is
    assert command(*words, "--out", tmp_path / "out", "--resume", "--reference", "lj") == 0
    checks = json.loads((tmp_path / "out" / "validation.json").read_text())["checks"]
    assert list(checks)[-1] == "own-frames" and checks["own-frames"]["status"] == "reported"


@pytest.mark.usefixtures("tiny")
def test_another_validation_is_not_gone_on_with(methane_file: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", {"structure": methane_file, "device": "cpu"}
    validate("any", out=out, **given)
    with pytest.raises(DataError, match="an earlier validation is here"):
        validate("any", out=out, **given)
    with pytest.raises(DataError, match="that validation had seed=0, now it is 1"):
        validate("any", out=out, resume=True, seed=1, **given)
    (out / "state.json").write_text('{"format": "ffpretrain.md.validation.state", "version": 1}')
    with pytest.raises(DataError, match=r"state.json: is damaged"):
        validate("any", out=out, resume=True, **given)
    (out / "state.json").write_text('{"format": "ffpretrain.md.validation.state", "version": 99}')
    with pytest.raises(DataError, match="newer package"):
        validate("any", out=out, resume=True, **given)
    result = validate("any", out=out, overwrite=True, seed=1, **given)
    assert result.passed and result.summary["seed"] == 1


@pytest.mark.usefixtures("tiny")
def test_without_a_folder_nothing_is_left(
    methane_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    result = validate("any", methane_file, device="cpu")
    assert result.passed and result.paths == {} and isinstance(result.checks["nve"], Check)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ndem-asprin"], "ndem-asprin"),
        (["{model}", "missing.xyz"], "missing.xyz: no such structure file"),
        (["{model}", "mercury.xyz"], "not trained on Hg"),
        (["{model}", "atom.xyz"], "a single atom has no forces"),
        (["{model}", "slab.extxyz"], "repeat in all three directions"),
        (["{model}", "--out", "file/run"], "file/run: cannot be made (Not a directory)"),
        (["{model}", "--level", "medium"], "medium"),
        (["{model}", "--replicas", "0"], "replicas must be a whole number of at least 1"),
        (["{model}", "--dtype", "half"], "unknown dtype 'half'"),
        (["{model}", "--device", "tpu"], "tpu"),
        (["{model}", "--seed", "-1"], "seed must be a whole number"),
        (["{model}", "--resume"], "no validation to go on with"),
        (["{model}", "--resume", "--overwrite"], "choose one"),
        (["{model}", "--reference", "gfn3"], "unknown engine 'gfn3'"),
        (["{model}", "--reference", "lj"], "trained on none, 'lj' computes Lennard-Jones"),
        (["{model}", "--data", "missing.npz"], "missing.npz"),
        (["{model}", "--data", "water.xyz"], "no frame is of C2H6O"),
        (
            ["{model}", "--data", "water.xyz", "--data-temperature", "-5"],
            "data_temperature must be a positive",
        ),
    ],
)
def test_bad_input_exits_2_and_leaves_nothing(
    model_file: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "file").write_text("")
    (folder / "mercury.xyz").write_text("2\n\nHg 0 0 0\nH 0 0 1.7\n")
    (folder / "atom.xyz").write_text("1\n\nH 0 0 0\n")
    ase.io.write(folder / "water.xyz", molecule("H2O"), format="extxyz")
    slab = molecule("CH3CH2OH", cell=[8.0, 8.0, 8.0], pbc=(True, True, False))
    ase.io.write(folder / "slab.extxyz", slab)
    before = sorted(folder.iterdir())
    assert command(*[word.format(model=model_file) for word in words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and message in output.err and "Traceback" not in output.err
    if output.err.startswith("error: "):
        assert output.err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_more_bad_input(morse: Model, potential: Potential, ethanol: Atoms) -> None:
    from ase.constraints import FixAtoms

    with pytest.raises(ConfigError, match="not a committee"):
        validate([potential, potential], ethanol)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no reference geometry"):
        validate(potential)
    with pytest.raises(ConfigError, match="out="):
        validate(potential, ethanol, resume=True)
    held = ethanol.copy()
    held.set_constraint(FixAtoms([0]))
    with pytest.raises(DataError, match="constraints"):
        validate(potential, held)
    with pytest.raises(ConfigError, match="unknown level 'fast'"):
        validate(potential, ethanol, level="fast")
    with pytest.raises(ConfigError, match="shorter than one step"):
        Plan("x", nve_ps=1e-4, stability_ps=1.0, replicas=1, relabelled=1)
    with pytest.raises(ConfigError, match="temperatures"):
        replace(SHORT, temperatures=())


def test_a_reference_that_is_not_installed_is_named(
    with_card: Build, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tblite", *(name for name in sys.modules if name.startswith("tblite."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        validate(with_card(level_of_theory=None), ethanol, reference="gfn2")


def test_unfamiliar_structures_are_said_once(with_card: Build) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Subject(with_card(compositions=["C2H6O"]), molecule("CH4"), "cpu")
    assert len([w for w in caught if "not what the model was trained on" in str(w.message)]) == 1


def test_errors_of_users_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError)


def test_a_temperature_of_no_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["validate", "ndem-ethanol", "--data-temperature", "500", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "--data-temperature is of the data of --data" in error and list(tmp_path.iterdir()) == []
