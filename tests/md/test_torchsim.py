"""torch-sim's model interface."""

from __future__ import annotations

import builtins
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.stress import voigt_6_to_full_3x3_stress

from ffpretrain import FFCalculator, list_models, load_potential
from ffpretrain.errors import ConfigError, MissingDependencyError, UnsupportedInputError, UserError
from ffpretrain.potential import Potential

pytest.importorskip("torch_sim", reason="needs torch-sim: pip install 'ffpretrain[torch-sim]'")

import torch_sim
from torch_sim.io import atoms_to_state
from torch_sim.models.interface import validate_model_outputs

from ffpretrain.md.torchsim import FFModel

Build = Callable[..., Potential]
EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")


def state_of(*structures: Atoms) -> torch_sim.SimState:
    return atoms_to_state(list(structures), CPU, torch.float64)


def by_ase(model: Any, atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.calc = FFCalculator(model, device="cpu", dtype="float64", on_unfamiliar="ignore")
    return copy


@pytest.fixture(scope="module")
def metals(build_potential: Build) -> Potential:
    """An untrained potential for the two crystals of torch-sim's validation."""
    potential = build_potential(cutoff=4.0)
    return Potential(potential.backbone, potential.head, reference_energies={14: -150.0, 26: -3000.0}).eval()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torch_sims_own_validation(metals: Potential, dtype: str) -> None:
    model = FFModel(metals, "cpu", dtype, compute_stress=False)
    validate_model_outputs(model, CPU, torch.float64)
    assert model.compute_stress  # the validation switches it on
    validate_model_outputs(model, CPU, torch.float32)


@pytest.mark.parametrize("name", ["ndem-aspirin", "ndem-ethanol"])
def test_named_models_agree_with_ase(name: str) -> None:
    if name not in list_models():
        pytest.skip(f"{name} is not in this package")
    rng = np.random.default_rng(0)
    molecules = [load_potential(name).card.reference_geometry.to_atoms() for _ in range(2)]
    for atoms in molecules:
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    out = FFModel(name, "cpu", "float64")(state_of(*molecules))
    for i, atoms in enumerate(molecules):
        n, expected = len(atoms), by_ase(name, atoms)
        assert float(out["energy"][i]) == pytest.approx(expected.get_potential_energy(), abs=1e-5, rel=0)
        forces = out["forces"][i * n : (i + 1) * n].numpy()
        np.testing.assert_allclose(forces, expected.get_forces(), rtol=0, atol=1e-4)


def test_a_batch_of_different_molecules(potential: Potential, ethanol: Atoms) -> None:
    structures = [ethanol, molecule("H2O"), molecule("CH4"), Atoms("C", [[1.0, 2.0, 3.0]])]
    out = FFModel(potential, "cpu", "float64")(state_of(*structures))
    start = 0
    for i, atoms in enumerate(structures):
        expected = by_ase(potential, atoms)
        assert float(out["energy"][i]) == pytest.approx(expected.get_potential_energy(), abs=1e-9, rel=0)
        forces = out["forces"][start : start + len(atoms)].numpy()
        np.testing.assert_allclose(forces, expected.get_forces(), rtol=0, atol=1e-10)
        start += len(atoms)
    assert torch.equal(out["stress"], torch.zeros(4, 3, 3).double())


def test_skewed_cells_are_not_transposed(potential: Potential, crystal: Atoms) -> None:
    """Energies, forces and stress in torch-sim's column convention, also of memory that is not contiguous."""
    other = crystal.copy()
    other.set_cell(
        crystal.cell.array @ np.array([[1, 0.1, 0], [0, 1.1, 0.2], [0, 0, 0.95]]), scale_atoms=True
    )
    state = state_of(crystal, other)
    state.positions = state.positions.T.contiguous().T
    out = FFModel(potential, "cpu", "float64")(state)
    for i, atoms in enumerate((crystal, other)):
        expected = by_ase(potential, atoms)
        assert float(out["energy"][i]) == pytest.approx(expected.get_potential_energy(), abs=1e-9, rel=0)
        np.testing.assert_allclose(
            out["forces"][4 * i : 4 * i + 4].numpy(), expected.get_forces(), atol=1e-10
        )
        stress = voigt_6_to_full_3x3_stress(expected.get_stress())
        np.testing.assert_allclose(out["stress"][i].numpy(), stress, rtol=0, atol=1e-11)
        assert np.abs(stress).max() > 1e-3


def test_outputs_follow_the_switches_and_the_precision_of_the_state(
    potential: Potential, crystal: Atoms
) -> None:
    model = FFModel(potential, "cpu", torch.float64, compute_stress=False)
    assert model.dtype == torch.float64 and model.device == CPU and model.memory_scales_with == "n_atoms"
    out = model(atoms_to_state([crystal], CPU, torch.float32))
    assert set(out) == {"energy", "forces"}
    assert (out["energy"].dtype, out["forces"].dtype) == (torch.float64, torch.float32)
    model.compute_forces, model.compute_stress = False, True
    state = state_of(crystal)
    names = ("positions", "masses", "cell", "pbc", "atomic_numbers", "system_idx")
    assert set(model({name: getattr(state, name) for name in names})) == {"energy", "stress"}


def test_constant_energy_and_wrapping(potential: Potential, crystal: Atoms) -> None:
    """Twenty steps of torch-sim's NVE; it wraps positions, which the pair lists must notice."""
    state = state_of(crystal, crystal)
    state.positions = state.positions + 0.02 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    state.positions[0] -= 0.01  # wraps at the first step
    model = FFModel(potential, "cpu", "float64")
    init, update = torch_sim.nve(model, dt=torch.tensor(0.02), kT=torch.tensor(0.02), seed=0)
    state = init(state)
    totals = []
    for _ in range(20):
        state = update(state)
        kinetic = (state.momenta.square().sum(1) / (2 * state.masses)).view(2, 4).sum(1)
        totals.append(state.energy + kinetic)
    spread = torch.stack(totals).std(0)
    assert float(spread.max()) < 2e-4
    assert float(kinetic.min()) > 20 * float(spread.max())


def test_structures_the_model_is_not_for_are_refused(with_card: Build, ethanol: Atoms) -> None:
    with pytest.raises(UnsupportedInputError, match="the atoms are CH4, but 'tiny' was trained on C2H6O"):
        FFModel(with_card(), "cpu")(state_of(ethanol, molecule("CH4")))


def flat_cell(state: torch_sim.SimState) -> None:
    state.cell[1, :, 2] = 0.0


def dependent_cell(state: torch_sim.SimState) -> None:
    state.cell[1, :, 2] = state.cell[1, :, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.positions.__setitem__((5, 1), torch.nan), "structure 1: the position of atom 1 is not"),
        (lambda s: s.positions.__setitem__(5, s.positions[4]), "structure 1: atoms 0 and 1 are at the same"),
        (lambda s: s.atomic_numbers.__setitem__(3, 80), "not trained on Hg"),
        (flat_cell, "structure 1: direction 2 is periodic but its cell vector is zero"),
        (dependent_cell, "structure 1: the cell has no volume"),
        (lambda s: setattr(s, "pbc", torch.tensor([True, True, False])), "only some directions repeat"),
        (lambda s: setattr(s, "system_idx", torch.tensor([0, 1] * 4)), "must stand together"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    potential: Potential, crystal: Atoms, change: Callable[[Any], Any], message: str
) -> None:
    model, state = FFModel(potential, "cpu", "float32"), state_of(crystal, crystal)
    model(state)
    change(state)
    with pytest.raises(UnsupportedInputError, match=message) as caught:
        model(state)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:77"}, "'cuda:77' is absent: torch finds"),
        ({"dtype": torch.float16}, "unknown dtype 'float16'"),
        ({"memory_scales_with": "n_edges"}, "'n_edges' is not n_atoms or n_atoms_x_density"),
    ],
)
def test_options_out_of_range(potential: Potential, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FFModel(potential, **options)


def test_without_torch_sim_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    right = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("torch_sim"):
            raise ModuleNotFoundError("No module named 'torch_sim'")
        return right(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.delitem(sys.modules, "ffpretrain.md.torchsim")
    with pytest.raises(MissingDependencyError) as caught:
        importlib.import_module("ffpretrain.md.torchsim")
    assert 'pip install "ffpretrain[torch-sim]"' in str(caught.value)


def test_automatic_batching_takes_molecules(potential: Potential) -> None:
    from torch_sim.autobatching import BinningAutoBatcher

    model = FFModel(potential, "cpu")
    scaling = model.memory_scales_with
    batcher = BinningAutoBatcher(model, memory_scales_with=scaling, max_memory_scaler=10.0)
    batcher.load_states([state_of(molecule(name)) for name in ("H2O", "CH4", "CH3OH")])
    assert sorted(batch.n_atoms for batch in batcher) in ([6, 8], [3, 5, 6], [5, 9])


@pytest.mark.skipif("ndem-ethanol" not in list_models(), reason="ndem-ethanol is not in this package")
def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "torch_sim_batch.py"), "2", "12"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "12 molecules, 108 atoms, 2 steps of 0.5 fs"
    assert 100 < float(lines[1].split()[1]) < 500
