"""The ASE calculator: properties, caching, committees, unfamiliar input."""

from __future__ import annotations

import copy
import io
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
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.optimize import BFGS, FIRE
from ase.phonons import Phonons
from ase.vibrations import Vibrations

from ffpretrain import FFCalculator
from ffpretrain.errors import ArtifactError, ConfigError, NonFiniteError, UnsupportedInputError
from ffpretrain.graphs import Graph, graph_from_atoms
from ffpretrain.md.unfamiliar import UnfamiliarInputWarning
from ffpretrain.potential import Potential

Build = Callable[..., Potential]


def calculator(model: Any, **options: Any) -> FFCalculator:
    return FFCalculator(model, **{"device": "cpu", "dtype": "float64", **options})


def test_properties_are_the_potential_s(potential: Potential, ethanol: Atoms) -> None:
    ethanol.calc = calculator(potential)
    expected = copy.deepcopy(potential).double()(graph_from_atoms(ethanol, potential.cutoff))
    assert ethanol.get_potential_energy() == pytest.approx(float(expected["energy"]), abs=1e-10)
    assert ethanol.get_potential_energy(force_consistent=True) == ethanol.get_potential_energy()
    np.testing.assert_allclose(ethanol.get_forces(), expected["forces"].numpy(), rtol=0, atol=1e-12)
    assert ethanol.get_potential_energies().sum() == pytest.approx(ethanol.get_potential_energy(), abs=1e-10)
    with pytest.raises(PropertyNotImplementedError):
        ethanol.get_stress()
    with pytest.raises(PropertyNotImplementedError):
        ethanol.get_dipole_moment()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_are_float64_and_nobody_else_s(potential: Potential, crystal: Atoms, dtype: str) -> None:
    crystal.calc = calculator(potential, dtype=dtype)
    forces = crystal.get_forces()
    assert isinstance(crystal.get_potential_energy(), float)
    for name in ("forces", "stress", "energies"):
        values = crystal.calc.get_property(name, crystal)
        assert values.dtype == np.float64
        assert not np.shares_memory(values, crystal.calc.results[name])
    kept = forces.copy()
    crystal.positions[0, 0] += 0.1
    assert np.abs(crystal.get_forces() - kept).max() > 1e-4
    np.testing.assert_array_equal(forces, kept)


def test_forces_and_stress_are_derivatives(potential: Potential, crystal: Atoms) -> None:
    crystal.calc = calculator(potential)
    np.testing.assert_allclose(crystal.get_forces(), calculate_numerical_forces(crystal, eps=1e-4), atol=1e-6)
    stress = crystal.get_stress()
    assert stress.shape == (6,)
    assert np.abs(stress).max() > 1e-3
    np.testing.assert_allclose(stress, calculate_numerical_stress(crystal, eps=1e-4), atol=1e-7)


def test_nothing_is_computed_twice(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    ethanol.calc = calculator(potential)
    calls = []
    evaluate = ethanol.calc.runtimes[0].evaluate
    monkeypatch.setattr(
        ethanol.calc.runtimes[0], "evaluate", lambda *args: calls.append(args) or evaluate(*args)
    )
    for _ in range(2):
        ethanol.get_potential_energy()
        ethanol.get_forces()
        ethanol.get_potential_energies()
    assert len(calls) == 1
    ethanol.positions[0, 0] += 1e-9
    ethanol.get_forces()
    assert len(calls) == 2


def test_a_change_of_charge_or_spin_is_seen(with_card: Build, ethanol: Atoms) -> None:
    ethanol.calc = calculator(with_card(charges=[0, 1], spins=[1, 2]), on_unfamiliar="raise")
    ethanol.info.update(charge=0, note="kept")
    ethanol.get_potential_energy()
    assert ethanol.calc.check_state(ethanol) == []
    ethanol.info["note"] = "changed"
    assert ethanol.calc.check_state(ethanol) == []
    for key, value in (("charge", 1), ("spin", 2)):
        ethanol.info[key] = value
        assert ethanol.calc.check_state(ethanol) == ["info"]
        ethanol.get_potential_energy()
        assert ethanol.calc.check_state(ethanol) == []
    ethanol.info["charge"] = -1
    with pytest.raises(UnsupportedInputError, match="charge -1"):
        ethanol.get_potential_energy()


UNFAMILIAR = {
    "composition": (lambda a: a.__delitem__(-1), "C2H5O is not what the model was trained on .C2H6O."),
    "charge": (lambda a: a.info.update(charge=1), "charge 1, the model learned 0"),
    "spin": (lambda a: a.info.update(spin_multiplicity=3), "multiplicity 3, the model learned 1"),
    "distance": (
        lambda a: a.set_distance(2, 3, 0.5, fix=0),
        "atoms 2 and 3 are 0.500 Å apart, closer than any two in training .0.900 Å.",
    ),
}


@pytest.mark.parametrize("cause", UNFAMILIAR)
def test_unfamiliar_input(with_card: Build, ethanol: Atoms, cause: str) -> None:
    change, message = UNFAMILIAR[cause]
    model = with_card(min_distance=0.9)
    policies = {policy: calculator(model, on_unfamiliar=policy) for policy in ("warn", "raise", "ignore")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for calc in policies.values():
            calc.get_potential_energy(ethanol)
        change(ethanol)
        ignored = policies["ignore"].get_potential_energy(ethanol)
    with pytest.warns(UnfamiliarInputWarning, match=message) as caught:
        for _ in range(3):
            ethanol.positions[0] += 1e-3
            policies["warn"].get_potential_energy(ethanol)
    assert len(caught) == 1
    ethanol.positions[0] -= 3e-3
    assert policies["warn"].get_potential_energy(ethanol) == pytest.approx(ignored, abs=1e-9)
    for _ in range(2):
        with pytest.raises(UnsupportedInputError, match=message):
            policies["raise"].get_potential_energy(ethanol)
    assert policies["raise"].results == {}


def test_an_unknown_element_is_always_an_error(with_card: Build, ethanol: Atoms) -> None:
    ethanol.numbers[0] = 17
    with pytest.raises(UnsupportedInputError, match="not trained on Cl; it knows H, C, O"):
        calculator(with_card(), on_unfamiliar="ignore").get_potential_energy(ethanol)


def test_without_a_card_only_charge_and_spin_are_unfamiliar(potential: Potential) -> None:
    water = molecule("H2O")
    water.calc = calculator(potential, on_unfamiliar="raise")
    water.get_potential_energy()
    water.info["charge"] = 1
    with pytest.raises(UnsupportedInputError, match="charge 1"):
        water.get_potential_energy()
    water.info["charge"] = "neutral"
    with pytest.raises(UnsupportedInputError, match="'neutral' is not a whole number"):
        water.get_potential_energy()


def test_a_committee_gives_mean_and_deviation(build_potential: Build, crystal: Atoms) -> None:
    members = [build_potential(seed) for seed in range(3)]
    singles = [calculator(member) for member in members]
    crystal.calc = calculator(members)
    energies = [single.get_potential_energy(crystal) for single in singles]
    forces = np.array([single.get_forces(crystal) for single in singles])
    assert crystal.get_potential_energy() == pytest.approx(np.mean(energies), abs=1e-10)
    np.testing.assert_allclose(crystal.get_forces(), forces.mean(0), rtol=0, atol=1e-12)
    stress = np.mean([single.get_stress(crystal) for single in singles], axis=0)
    np.testing.assert_allclose(crystal.get_stress(), stress, rtol=0, atol=1e-12)
    np.testing.assert_allclose(crystal.calc.results["forces_std"], forces.std(0), rtol=0, atol=1e-12)
    assert crystal.calc.results["energy_std"] == pytest.approx(np.std(energies), abs=1e-10)
    assert np.std(energies) > 1e-3
    assert "forces_std" not in singles[0].results
    assert set(crystal.calc.export_properties()) > {"energy", "forces", "stress"}
    ase.io.write(io.StringIO(), crystal, format="extxyz")


def test_a_committee_of_mixed_theory_is_refused(with_card: Build) -> None:
    one, other = with_card(level_of_theory="PBE/def2-SVP"), with_card(level_of_theory="CCSD(T)")
    calculator([one, one])
    with pytest.raises(ConfigError, match="must share a level of theory"):
        calculator([one, other])


class Direct(torch.nn.Module):
    """Forces without an energy."""

    cutoff = 5.0

    def forward(self, graph: Graph) -> dict[str, torch.Tensor]:
        return {"forces": graph.pos - graph.pos.mean(0)}


def test_a_model_without_energy_has_forces_only(ethanol: Atoms) -> None:
    ethanol.calc = calculator(Direct())
    assert ethanol.get_forces().shape == (9, 3)
    for force_consistent in (False, True):
        with pytest.raises(PropertyNotImplementedError):
            ethanol.get_potential_energy(force_consistent=force_consistent)


def test_a_file_and_its_potential_give_the_same(
    model_file: Path, potential: Potential, ethanol: Atoms
) -> None:
    calc = FFCalculator(model_file, "cpu", "float64")
    assert calc.get_potential_energy(ethanol) == calculator(potential).get_potential_energy(ethanol)
    assert FFCalculator(str(model_file)).card.name == "tiny"
    assert calc.todict()["model"] == ["tiny.safetensors"] and calc.name == "ffpretrain"


def test_optimisers_and_vibrations(potential: Potential, ethanol: Atoms, tmp_path: Path) -> None:
    ethanol.rattle(0.05, seed=0)
    ethanol.calc = calculator(potential)
    before = ethanol.get_potential_energy()
    for optimizer in (FIRE, BFGS):
        optimizer(ethanol, logfile=None).run(fmax=1e-3, steps=40)
    assert ethanol.get_potential_energy() < before
    water = molecule("H2O")
    water.calc = ethanol.calc
    vibrations = Vibrations(water, name=str(tmp_path / "vib"))
    vibrations.run()
    assert vibrations.get_energies().shape == (9,)
    assert np.isfinite(vibrations.get_energies()).all()


def test_phonons(potential: Potential, crystal: Atoms, tmp_path: Path) -> None:
    two = crystal[:2]
    phonons = Phonons(two, calculator(potential), supercell=(1, 1, 1), name=str(tmp_path / "phonon"))
    phonons.run()
    phonons.read(acoustic=True)
    assert phonons.get_force_constant().shape == (1, 6, 6)


def test_copies_traj_and_extxyz(potential: Potential, crystal: Atoms, tmp_path: Path) -> None:
    crystal.calc = calculator(potential)
    energy, forces, stress = crystal.get_potential_energy(), crystal.get_forces(), crystal.get_stress()
    for name in ("frame.traj", "frame.extxyz", "frame.json"):
        ase.io.write(tmp_path / name, crystal)
        back = ase.io.read(tmp_path / name)
        assert back.get_potential_energy() == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(back.get_forces(), forces, atol=1e-6)
        np.testing.assert_allclose(back.get_stress(), stress, atol=1e-6)
    twin = copy.deepcopy(crystal)
    twin.positions[0, 0] += 0.1
    assert twin.get_potential_energy() != energy
    assert crystal.get_potential_energy() == energy
    assert crystal.copy().calc is None


def test_failed_evaluations_leave_no_results(build_potential: Build, ethanol: Atoms) -> None:
    potential = build_potential()
    ethanol.calc = calculator(potential)
    ethanol.get_potential_energy()
    good = ethanol.positions.copy()
    ethanol.positions[3] = np.nan
    with pytest.raises(UnsupportedInputError, match="atom 3 is not finite"):
        ethanol.get_potential_energy()
    assert ethanol.calc.results == {}
    ethanol.positions[:] = good
    assert np.isfinite(ethanol.get_potential_energy())
    with torch.no_grad():
        potential.head.second.out.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError):
        calculator(potential).get_forces(ethanol)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: FFCalculator("ndem-aspirn"), ArtifactError, "ndem-aspirn"),
        (lambda p: FFCalculator("nowhere.safetensors"), ArtifactError, "nowhere.safetensors"),
        (lambda p: FFCalculator(p, dtype="float"), ConfigError, "float32"),
        (lambda p: FFCalculator(p, device="gpu"), ConfigError, "gpu"),
        (lambda p: FFCalculator(p, compile="yes"), ConfigError, "compile='yes'"),
        (lambda p: FFCalculator(p, on_unfamiliar="warning"), ConfigError, "did you mean 'warn'"),
        (lambda p: FFCalculator([]), ConfigError, "no members"),
        (lambda p: FFCalculator([3]), ArtifactError, "not int"),
        (lambda p: FFCalculator(torch.nn.Linear(1, 1)), ConfigError, "Linear is not a potential"),
        (lambda p: FFCalculator(p).set(dtype="float64"), ConfigError, "make a new FFCalculator"),
        (lambda p: FFCalculator(p).get_potential_energy(Atoms()), UnsupportedInputError, "no atoms"),
    ],
)
def test_bad_options(
    potential: Potential, make: Callable[[Potential], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(potential)


def test_a_cell_in_the_wrong_unit_is_refused(potential: Potential, ethanol: Atoms) -> None:
    """Ethanol in a cube of 1.5 nm given as Å, and in one a thousand times smaller."""
    ethanol.pbc = True
    ethanol.calc = FFCalculator(potential, "cpu")
    for width, message in ((1.5, "Å³ for 9 atoms"), (0.02, "from its own image")):
        ethanol.set_cell([width] * 3)
        with pytest.raises(UnsupportedInputError, match=f"{message}.*check the units"):
            ethanol.get_forces()
