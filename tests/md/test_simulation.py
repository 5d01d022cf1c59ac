"""Simulations: their files, what stops them, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.constraints import FixBondLength
from ase.io.trajectory import Trajectory

from ffpretrain.errors import ConfigError, DataError, NonFiniteError, UnsupportedInputError, UserError
from ffpretrain.graphs import Graph
from ffpretrain.md import simulate
from ffpretrain.md.output import rows
from ffpretrain.md.stability import SimulationError, StabilityCheck, count_pieces
from ffpretrain.potential import Potential

Build = Callable[..., Potential]
FILES = ("trajectory.traj", "log.csv", "restart.npz", "last_frame.extxyz", "md.json")


def same(one: Atoms, other: Atoms) -> bool:
    return np.array_equal(one.positions, other.positions) and np.array_equal(
        one.get_momenta(), other.get_momenta()
    )


def test_files_hold_what_happened(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = simulate(
        None, model_file, ensemble="nve", temperature=50.0, steps=20, interval=5, out=out, device="cpu"
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    with Trajectory(str(out / "trajectory.traj")) as trajectory:
        assert len(trajectory) == 5
        last = trajectory[-1]
    assert same(last, result.atoms)
    assert last.get_potential_energy() == result.atoms.get_potential_energy()
    np.testing.assert_array_equal(last.get_forces(), result.atoms.get_forces())
    assert last.info["step"] == 20 and last.info["time_ps"] == pytest.approx(0.01)
    log = rows(out / "log.csv")
    assert log["step"].tolist() == [0, 10, 20]
    assert log["temperature_K"][0] == pytest.approx(50.0, abs=1e-3)
    np.testing.assert_allclose(log["total_eV"], log["potential_eV"] + log["kinetic_eV"], atol=2e-8)
    written = json.loads((out / "md.json").read_text())
    assert written == json.loads(json.dumps(result.summary))
    assert (written["schema"], written["version"]) == ("ffpretrain-md", 1)
    assert written["structure"] == {"formula": "C2H6O", "n_atoms": 9}
    assert written["units"]["drift"] == "meV/atom/ps"
    assert written["backend"] == f"{written['agreement'][0]['path']} float32 cpu"
    kept = ase.io.read(out / "last_frame.extxyz")
    np.testing.assert_allclose(kept.positions, result.atoms.positions, rtol=0, atol=1e-8)
    np.testing.assert_allclose(kept.get_momenta(), result.atoms.get_momenta(), rtol=0, atol=1e-8)
    with np.load(out / "restart.npz", allow_pickle=False) as restart:
        assert json.loads(str(restart["meta"]))["step"] == 20


def test_a_trajectory_file_as_out(methane: tuple[Atoms, Calculator], tmp_path: Path) -> None:
    simulate(*methane, steps=4, out=tmp_path / "a.xyz", interval=2)
    assert len(ase.io.read(tmp_path / "a.xyz", ":")) == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.xyz", "a.log.csv", "a.restart.npz", "a.last_frame.extxyz", "a.md.json"}


class Breaks(Calculator):
    """Pushes the last atom away from the others, or stops giving numbers."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, push: float = 0.0, fail_after: int | None = None) -> None:
        super().__init__()
        self.push, self.fail_after, self.calls = push, fail_after, 0

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise NonFiniteError("the energy is not finite")
        forces = np.zeros((len(self.atoms), 3))
        forces[-1] = [self.push, 0.0, 0.0]
        self.results = {"energy": 0.0, "forces": forces}


@pytest.mark.parametrize(
    ("calculator", "error", "message"),
    [
        (
            Breaks(push=2.0),
            SimulationError,
            "at step .* is more than 3.00 Å from every other",
        ),
        (Breaks(push=1e5), SimulationError, "atom 4 moved .* Å in one step"),
        (Breaks(push=float("nan")), NonFiniteError, "position of atom 4 is not finite at step 1"),
        (Breaks(fail_after=6), NonFiniteError, "energy is not finite .after 5 good steps."),
    ],
)
def test_a_run_that_breaks_stops_with_its_frame(
    calculator: Calculator, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        simulate(molecule("CH4"), calculator, ensemble="nve", temperature=10.0, steps=5000, out=tmp_path)
    assert isinstance(caught.value, UserError)
    assert "last_frame.extxyz" in str(caught.value) and "\n" not in str(caught.value)
    frame = ase.io.read(tmp_path / "last_frame.extxyz")
    assert np.isfinite(frame.positions).all()
    assert len(frame) == 5
    assert not (tmp_path / "md.json").exists()
    assert len(rows(tmp_path / "log.csv")["step"]) >= 1


def test_molecules_may_break_where_that_is_wanted(tmp_path: Path) -> None:
    result = simulate(
        molecule("CH4"), Breaks(push=2.0), ensemble="nve", temperature=10.0, steps=200, lost_distance=None
    )
    assert result.atoms.get_distance(0, 4) > 5.0


def test_fragments_are_noticed() -> None:
    pair = molecule("N2") + molecule("N2")
    pair.positions[2:] += [3.2, 0.0, 0.0]
    check = StabilityCheck(pair, cutoff=5.0)
    pair.positions[2:] += [1.0, 0.0, 0.0]
    check.search(pair, 1)
    pair.positions[2:] += [1.0, 0.0, 0.0]
    with pytest.raises(SimulationError, match="2 pieces farther apart than the model's cutoff of 5 Å"):
        check.search(pair, 2)
    StabilityCheck(pair, cutoff=5.0).search(pair, 1)
    links = np.array([[0, 1], [1, 0], [1, 2], [2, 1], [4, 5], [5, 4]]).T
    assert count_pieces(6, *links) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ensemble": "nvt-berendsen"}, ConfigError, "unknown ensemble 'nvt-berendsen'; did you mean"),
        ({"format": "xtc"}, ConfigError, "unknown trajectory format 'xtc'"),
        ({"timestep": 0.0}, ConfigError, "timestep must be a positive number"),
        ({"timestep": float("nan")}, ConfigError, "timestep must be a positive number"),
        ({"friction": -1.0}, ConfigError, "friction must be a positive number"),
        ({"temperature": -1.0}, ConfigError, "temperature must be zero or a positive"),
        ({"temperature": 0.0}, ConfigError, "needs a temperature above zero"),
        ({"temperature": None}, ConfigError, "needs a temperature"),
        ({"steps": -1}, ConfigError, "steps must be a whole number of at least 0"),
        ({"steps": 2.5}, ConfigError, "steps must be a whole number"),
        ({"interval": 0}, ConfigError, "interval must be a whole number of at least 1"),
        ({"seed": -1}, ConfigError, "seed must be a whole number"),
        ({"steps": None}, ConfigError, "either the number of steps or the time"),
        ({"time_ps": 1.0}, ConfigError, "either the number of steps or the time"),
        ({"steps": None, "time_ps": -1.0}, ConfigError, "must be positive numbers"),
        ({"resume": True}, ConfigError, "give out="),
        ({"resume": True, "overwrite": True, "out": "x"}, ConfigError, "choose one"),
        ({"structure": None}, DataError, "no reference geometry of its own"),
        ({"structure": "missing.xyz"}, DataError, "missing.xyz"),
        ({"structure": Atoms("HgH", [[0, 0, 0], [0, 0, 1.7]])}, UnsupportedInputError, "not trained on Hg"),
    ],
)
def test_bad_options(
    potential: Potential,
    ethanol: Atoms,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"structure": ethanol, "steps": 2, "out": "run", **options}
    if options.get("resume") and "out" not in options:
        given["out"] = None
    with pytest.raises(error, match=message):
        simulate(given.pop("structure"), potential, device="cpu", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_energy_is_refused(ethanol: Atoms) -> None:
    class Direct(torch.nn.Module):
        cutoff = 5.0

        def forward(self, graph: Graph) -> dict[str, torch.Tensor]:
            return {"forces": graph.pos - graph.pos.mean(0)}

    with pytest.raises(ConfigError, match="has no energy"):
        simulate(ethanol, Direct(), steps=1, device="cpu")


def test_progress_says_how_it_goes(
    methane: tuple[Atoms, Calculator], capsys: pytest.CaptureFixture[str]
) -> None:
    simulate(*methane, ensemble="nve", steps=5, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    for part in ("100%", " K", "meV/atom/ps", "ns/day"):
        assert part in output.err


def test_other_constraints_are_refused(methane: tuple[Atoms, Calculator]) -> None:
    methane[0].set_constraint(FixBondLength(0, 1))
    with pytest.raises(DataError, match="FixBondLength"):
        simulate(*methane, steps=1)


def test_unfamiliar_input_follows_the_policy(with_card: Build) -> None:
    water = molecule("H2O")
    with pytest.raises(UnsupportedInputError, match="H2O is not what the model was trained on"):
        simulate(water, with_card(), steps=1, device="cpu", on_unfamiliar="raise")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        simulate(water, with_card(), steps=3, device="cpu")
    assert len([w for w in caught if "H2O is not what" in str(w.message)]) == 1
