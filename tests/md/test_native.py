"""The native evaluation is the eager one, to rounding, for molecules, crystals and everything between."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms

from ffpretrain import FFCalculator
from ffpretrain.backbones import create_backbone
from ffpretrain.errors import UnsupportedInputError
from ffpretrain.graphs import graph_from_atoms
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.native import NativeMany, NativePath, NativeUnavailable, StructurePairs, build
from ffpretrain.md.native.build import load_library
from ffpretrain.md.native.path import NativeNetwork
from ffpretrain.md.replicas import Replicas
from ffpretrain.md.runtime import Runtime
from ffpretrain.native import build as building
from ffpretrain.potential import Potential

OPTIONS = {"hidden": 32, "layers": 3, "heads": 4, "rbf": 9, "cutoff": 3.5, "max_z": 20}


def potential(name: str = "torchmd-et", **options: object) -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        known = OPTIONS if name == "torchmd-et" else {k: v for k, v in OPTIONS.items() if k != "heads"}
        backbone = create_backbone(name, **{**known, **options})
        reference = {1: -13.6, 6: -1029.5, 8: -2041.8, 11: -4400.0, 17: -12500.0}
        return Potential(backbone, scale=0.7, shift=0.25, reference_energies=reference).double()


def salt() -> Atoms:
    # a cell shorter than the cutoff: atoms see their own images
    crystal = ase.build.bulk("NaCl", "rocksalt", a=5.0)
    crystal.rattle(0.05, seed=2)
    return crystal


def slab() -> Atoms:
    surface = ase.build.fcc100("C", (2, 2, 2), a=3.0, vacuum=6.0)
    surface.rattle(0.05, seed=4)
    return surface


def molecules() -> dict[str, Atoms]:
    chain = ase.build.molecule("C3H8")
    chain.rattle(0.05, seed=1)
    far = Atoms("OH", [[0, 0, 0], [9.0, 0, 0]])
    return {
        "propane": chain,
        "atom": Atoms("O"),
        "far apart": far,
        "water dimer": ase.build.molecule("H2O") + Atoms("OHH", [[0, 2.9, 0], [0.8, 3.4, 0], [-0.8, 3.4, 0]]),
        "crystal": salt(),
        "crystal of 64": salt().repeat((4, 4, 2)),
        "slab": slab(),
    }


def compare(model: Potential, atoms: Atoms, tolerance: float) -> None:
    pbc = tuple(bool(p) for p in atoms.pbc)
    cell = atoms.cell.array if any(pbc) else None
    found = NativePath(model, atoms.numbers, pbc)(atoms.positions, cell)
    wanted = copy.deepcopy(model).double()(graph_from_atoms(atoms, model.cutoff))
    assert found.energy == pytest.approx(wanted["energy"].item(), abs=tolerance, rel=1e-13)
    assert np.allclose(found.energies, wanted["energies"].detach(), atol=tolerance, rtol=0)
    assert np.allclose(found.forces, wanted["forces"].detach(), atol=tolerance, rtol=0)
    if all(pbc):
        assert np.allclose(found.stress, wanted["stress"][0].detach(), atol=tolerance, rtol=0)
        assert np.abs(found.stress).max() > 100 * tolerance


@pytest.mark.parametrize("backbone", ["torchmd-et", "painn"])
@pytest.mark.parametrize("name", sorted(molecules()))
def test_equal_to_the_eager_evaluation_in_float64(name: str, backbone: str) -> None:
    compare(potential(backbone), molecules()[name], 1e-9)


@pytest.mark.parametrize("options", [{"layers": 1}, {"heads": 1}, {"hidden": 64, "heads": 2, "rbf": 32}])
def test_other_sizes(options: dict[str, int]) -> None:
    compare(potential(**options), molecules()["propane"], 1e-10)
    compare(potential(**options), salt(), 1e-10)


@pytest.mark.parametrize("options", [{"layers": 1}, {"hidden": 64, "rbf": 20, "trainable_rbf": True}])
def test_other_sizes_of_painn(options: dict[str, int]) -> None:
    compare(potential("painn", **options), molecules()["propane"], 1e-10)
    compare(potential("painn", **options), salt(), 1e-10)


@pytest.mark.parametrize("backbone", ["torchmd-et", "painn"])
def test_weights_for_input_vectors_do_not_matter(backbone: str) -> None:
    compare(potential(backbone, vector_input=True), molecules()["propane"], 1e-10)
    compare(potential(backbone, vector_input=True, layers=1), salt(), 1e-10)


@pytest.mark.parametrize("backbone", ["torchmd-et", "painn"])
def test_close_in_float32(backbone: str) -> None:
    compare(potential(backbone).float(), molecules()["propane"], 2e-5)


@pytest.mark.parametrize(("backbone", "widths", "cells"), [("torchmd-et", 4, 7), ("painn", 3, 9)])
def test_many_pairs_do_not_fit_the_kept_filters_and_give_the_same(
    backbone: str, widths: int, cells: int
) -> None:
    atoms = salt().repeat((8, 8, cells))
    model = potential(backbone, layers=2, cutoff=6.5)
    pairs = graph_from_atoms(atoms, model.cutoff).edge_index.shape[1] // 2
    # what geometry.hpp allows itself: 64 MiB
    assert pairs * 2 * widths * 32 * 8 > 2**26
    compare(model, atoms, 1e-8)


def test_shortest_distance() -> None:
    found = NativePath(potential(), np.array([8, 1, 1]), (False,) * 3)(
        np.array([[0.0, 0, 0], [0.9, 0, 0], [0, 5.0, 0]]), None
    )
    assert found.shortest == pytest.approx(0.9)


def test_follows_atoms_that_move_far_in_a_crystal() -> None:
    model, atoms = potential(), salt().repeat((3, 3, 3))
    path = NativePath(model, atoms.numbers, (True, True, True))
    rng = np.random.default_rng(0)
    for _ in range(4):
        atoms.positions += rng.normal(0.0, 0.3, atoms.positions.shape)
        found = path(atoms.positions, atoms.cell.array)
        wanted = model(graph_from_atoms(atoms, model.cutoff))
        assert np.allclose(found.forces, wanted["forces"].detach(), atol=1e-8)
    assert path.structure.list is not None
    assert path.structure.list.builds > 1


def test_calculator_takes_it_and_compile_false_does_not() -> None:
    atoms = molecules()["propane"]
    results = {}
    for compile in ("auto", False):
        atoms.calc = FFCalculator(potential(), "cpu", "float64", compile, on_unfamiliar="ignore")
        results[compile] = atoms.get_forces()
        assert atoms.calc.backend.startswith("native" if compile == "auto" else "dense")
    assert np.allclose(results["auto"], results[False], atol=1e-10)


def test_agreement_is_measured_and_recorded() -> None:
    atoms = molecules()["propane"]
    runtime = Runtime(potential(), "cpu", "float64", "auto")
    runtime.evaluate(atoms.numbers, atoms.positions)
    assert 0 <= runtime.agreement["native"].force_error < 1e-10
    again = pickle.loads(pickle.dumps(runtime))
    assert np.array_equal(
        again.evaluate(atoms.numbers, atoms.positions).forces,
        runtime.evaluate(atoms.numbers, atoms.positions).forces,
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (torch.nn.Linear(1, 1), "only potentials"),
        (potential("painn", shared_filters=True), "share"),
        (potential(hidden=12, heads=2), "multiple"),
        (potential(vector_cutoff=False), "vector_cutoff"),
    ],
)
def test_what_it_does_not_cover_is_named(model: torch.nn.Module, reason: str) -> None:
    with pytest.raises(NativeUnavailable, match=reason):
        NativePath(model, np.array([8, 1, 1]), (False,) * 3)


@pytest.fixture
def fresh_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(build._LIBRARY, "_loaded", None)
    return tmp_path


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C\\+\\+ compiler"), ("false", "false failed")]
)
def test_without_a_compiler_the_eager_path_serves_and_says_why(
    compiler: str, reason: str, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NativeUnavailable, match=reason):
        load_library()
    atoms = molecules()["propane"]
    runtime = Runtime(potential(), "cpu", "float64", "auto")
    assert runtime.evaluate(atoms.numbers, atoms.positions).energy is not None
    assert runtime.backend.startswith("dense")
    assert runtime.not_native
    assert not list(fresh_library.rglob("*.so"))


def test_the_name_of_the_library_depends_on_all_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    name = build._LIBRARY._name
    names = {name(compiler), name(sys.executable)}
    monkeypatch.setattr(building, "_instruction_sets", lambda: "another processor")
    names.add(name(compiler))
    monkeypatch.setattr(building, "_flags", lambda: ["-g"])
    assert len({*names, name(compiler)}) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_many_structures_on_several_threads(threads: int) -> None:
    model = potential()
    every = list(molecules().values()) * 3
    cells = [atoms.cell.array if atoms.pbc.any() else None for atoms in every]
    structures = [StructurePairs(a.numbers, tuple(map(bool, a.pbc)), model.cutoff) for a in every]
    found = NativeMany(model, threads)(structures, [a.positions for a in every], cells)
    for atoms, cell, one in zip(every, cells, found, strict=True):
        alone = NativePath(model, atoms.numbers, tuple(map(bool, atoms.pbc)))(atoms.positions, cell)
        assert one.energy == alone.energy
        assert np.array_equal(one.forces, alone.forces)


def test_runtime_batches_are_native_and_equal_to_eager_ones() -> None:
    every = [molecules()[name] for name in ("propane", "crystal", "water dimer")]
    fast, slow = (Runtime(potential(), "cpu", "float64", compile) for compile in ("auto", False))
    for one, other in zip(fast.evaluate_batch(every), slow.evaluate_batch(every), strict=True):
        assert one.energy == pytest.approx(other.energy, abs=1e-9)
        assert np.allclose(one.forces, other.forces, atol=1e-9)
        assert (one.stress is None) == (other.stress is None)
    assert "native" in fast.agreement
    assert "native" not in slow.agreement


@pytest.mark.parametrize("backbone", ["torchmd-et", "painn"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_energies_alone_are_those_with_forces_to_the_last_bit(
    backbone: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = list(molecules().values())
    runtime = Runtime(potential(backbone), "cpu", dtype, "auto")
    full = runtime.evaluate_batch(every)
    assert "native" in runtime.agreement and "native energies" not in runtime.agreement

    def derivative(*args: object) -> None:
        raise AssertionError("a derivative was computed")

    monkeypatch.setattr(NativeNetwork, "_call", derivative)
    alone = runtime.evaluate_batch(every, forces=False)
    for with_forces, one in zip(full, alone, strict=True):
        assert one.energy == with_forces.energy
        assert np.array_equal(one.energies, with_forces.energies)
        assert one.shortest == with_forces.shortest
        assert one.forces is None and one.stress is None
    assert runtime.agreement["native energies"].energy_error > 0
    with pytest.raises(AssertionError, match="a derivative was computed"):
        runtime.evaluate_batch(every)


def test_the_gate_covers_energies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeNetwork._energies

    def slightly_wrong(self: NativeNetwork, z: np.ndarray, *rest: object) -> tuple[np.ndarray, float]:
        energies, shortest = right(self, z, *rest)
        return energies + 1e-3, shortest

    monkeypatch.setattr(NativeNetwork, "_energies", slightly_wrong)
    runtime, atoms = Runtime(potential(), "cpu", "float32", "auto"), molecules()["propane"]
    assert runtime.evaluate_batch([atoms])[0].forces is not None
    with pytest.raises(AgreementError, match="native energies"):
        runtime.evaluate_batch([atoms], forces=False)


def test_energies_alone_refuse_what_forces_refuse() -> None:
    runtime, atoms = Runtime(potential(), "cpu", "float32", "auto"), molecules()["propane"]
    runtime.evaluate_batch([atoms], forces=False)
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(UnsupportedInputError, match="structure 1: two atoms are at the same place"):
        runtime.evaluate_batch([molecules()["propane"], atoms], forces=False)
    with pytest.raises(UnsupportedInputError, match="not trained on"):
        runtime.evaluate_batch([Atoms("Xe")], forces=False)


def test_engine_batches_are_native_and_equal_to_eager_ones() -> None:
    every = [molecules()[name] for name in ("propane", "crystal", "water dimer")]
    numbers = torch.cat([torch.tensor(a.numbers) for a in every])
    positions = torch.cat([torch.tensor(a.positions) for a in every])
    batch = torch.repeat_interleave(torch.arange(3), torch.tensor([len(a) for a in every]))
    cell = torch.stack([torch.tensor(a.cell.array) for a in every])
    periodic = torch.tensor([bool(a.pbc.all()) for a in every])
    found = []
    for compile in ("auto", False):
        runtime = Runtime(potential(), "cpu", "float64", compile)
        found.append(runtime.evaluate_tensors(numbers, positions, batch, cell, periodic))
        assert ("native" in runtime.backend) == (compile == "auto")
    for name in ("energy", "forces", "stress", "shortest"):
        one, other = (getattr(evaluation, name) for evaluation in found)
        assert torch.allclose(one, other, atol=1e-9), name


def test_replicas_are_native_and_equal_to_eager_ones() -> None:
    atoms = molecules()["propane"]
    spread = torch.tensor(np.random.default_rng(1).normal(0.0, 0.05, (4, *atoms.positions.shape)))
    positions = torch.tensor(atoms.positions) + spread
    found = []
    for compile in ("auto", False):
        runtime = Runtime(potential(), "cpu", "float64", compile)
        replicas = Replicas(runtime, atoms.numbers, atoms.positions, 4)
        assert ("native" in replicas.backend) == (compile == "auto")
        found.append(replicas(positions))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
