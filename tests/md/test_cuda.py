"""Molecules recorded as CUDA graphs: on a CPU the same code runs without the recording."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet
from torch import Tensor

from ffpretrain import FFCalculator
from ffpretrain.backbones import torchmd_et
from ffpretrain.errors import NonFiniteError, UnsupportedInputError
from ffpretrain.md import batches, compiled, cuda
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.compiled import CompileWarning
from ffpretrain.md.cuda import MoleculeGraph
from ffpretrain.md.paths import Evaluation, dense_function
from ffpretrain.md.replicas import Replicas
from ffpretrain.md.runtime import Runtime
from ffpretrain.md.torchmd import External
from ffpretrain.potential import Potential

Build = Callable[..., Potential]
GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of CUDA devices on any device."""
    monkeypatch.setattr(Runtime, "records", property(lambda self: self.compile is not False))
    monkeypatch.setattr(Runtime, "native_many", lambda self, expected=0: None)
    monkeypatch.setattr(Runtime, "_native_path", lambda self, numbers, pbc: None)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is real, the compiler is not called."""
    monkeypatch.setattr(compiled.torch, "compile", lambda traced, **options: traced)


def displaced(atoms: Atoms, count: int, std: float = 0.1) -> Tensor:
    rng = np.random.default_rng(3)
    moved = atoms.positions + rng.normal(0.0, std, (count, len(atoms), 3))
    return torch.tensor(moved, device=DEVICE)


def plain(potential: Potential, atoms: Atoms, positions: Any) -> Evaluation:
    runtime = Runtime(potential, "cpu", "float64", compile=False)
    return runtime.evaluate(atoms.numbers, np.asarray(torch.as_tensor(positions).cpu()))


def assert_same(found: Evaluation, want: Evaluation, atol: float) -> None:
    np.testing.assert_allclose(found.forces, want.forces, rtol=0, atol=atol)
    np.testing.assert_allclose(found.energies, want.energies, rtol=0, atol=atol)
    assert found.energy == pytest.approx(want.energy, abs=10 * atol)
    assert found.shortest == pytest.approx(want.shortest, abs=1e-12)


@pytest.mark.parametrize("name", ["torchmd-et", "painn"])
@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-11), ("float32", 1e-5)])
def test_a_recorded_molecule_follows_its_positions(
    name: str, dtype: str, atol: float, build_potential: Build, ethanol: Atoms
) -> None:
    potential = build_potential(name=name)
    runtime = Runtime(potential, DEVICE, dtype, "auto")
    earlier: list[tuple[Evaluation, Any]] = []
    for place, positions in enumerate(displaced(ethanol, 3).cpu().numpy()):
        found = runtime.evaluate(ethanol.numbers, positions)
        assert_same(found, plain(potential, ethanol, positions), atol)
        earlier.append((found, found.forces.copy()))  # type: ignore[union-attr]
        assert runtime.backend == f"dense cuda-graph {dtype} {runtime.device}", place
    for result, forces in earlier:  # a result is not overwritten by later ones
        np.testing.assert_array_equal(result.forces, forces)
    assert runtime.agreement["dense cuda-graph"].n_atoms == len(ethanol)


@pytest.mark.usefixtures("uncompiled")
def test_what_is_traced_is_recorded_too(potential: Potential, ethanol: Atoms) -> None:
    runtime = Runtime(potential, DEVICE, "float64", compile=True)
    positions = displaced(ethanol, 1)[0]
    found = runtime.evaluate(ethanol.numbers, positions.cpu().numpy())
    assert_same(found, plain(potential, ethanol, positions), 1e-11)
    assert runtime.backend.startswith("dense compiled cuda-graph float64")


def test_a_failed_compilation_is_said_and_recorded_eager(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(compiled.torch, "compile", fail)
    runtime = Runtime(potential, DEVICE, "float64", compile=True)
    with pytest.warns(CompileWarning, match="no compiler found") as caught:
        found = runtime.evaluate(ethanol.numbers, ethanol.positions)
    assert len(caught) == 1
    assert_same(found, plain(potential, ethanol, ethanol.positions), 1e-11)
    assert runtime.backend.startswith("dense cuda-graph")


def test_a_failed_recording_is_said(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nlong story")

    monkeypatch.setattr(cuda, "record", fail)
    runtime = Runtime(potential, DEVICE, "float64", "auto")
    with pytest.warns(CompileWarning, match=r"cannot be recorded as a CUDA graph \(operation not"):
        found = runtime.evaluate(ethanol.numbers, ethanol.positions)
    assert_same(found, plain(potential, ethanol, ethanol.positions), 1e-11)
    assert runtime.backend == f"dense float64 {runtime.device}"


def test_other_molecules_have_graphs_of_their_own(potential: Potential, ethanol: Atoms) -> None:
    runtimes = [Runtime(potential, DEVICE, "float64", "auto") for _ in range(2)]
    water, alone = molecule("H2O"), Atoms("C", positions=[[0.1, 0.2, 0.3]])
    for atoms in (ethanol, water, alone, ethanol, water):
        for runtime in runtimes:
            found = runtime.evaluate(atoms.numbers, atoms.positions)
            assert_same(found, plain(potential, atoms, atoms.positions), 1e-11)
            assert runtime.agreement["dense cuda-graph"].n_atoms in (9, 3, 1)


def test_what_is_not_a_molecule_goes_another_way(potential: Potential, crystal: Atoms) -> None:
    runtime = Runtime(potential, DEVICE, "float64", "auto")
    runtime.evaluate(crystal.numbers, crystal.positions, crystal.cell.array, crystal.pbc)
    assert runtime.backend.startswith("edges")
    chain = 1.3 * np.arange(65)[:, None] * np.eye(3)[:1]
    runtime.evaluate(np.full(65, 6), chain)
    assert runtime.backend.startswith("edges")


def test_eager_stays_eager(potential: Potential, ethanol: Atoms) -> None:
    runtime = Runtime(potential, DEVICE, "float64", compile=False)
    runtime.evaluate(ethanol.numbers, ethanol.positions)
    assert runtime.backend == f"dense float64 {runtime.device}"


def test_the_usual_errors(build_potential: Build, ethanol: Atoms) -> None:
    runtime = Runtime(build_potential(), DEVICE, "float64", "auto")
    runtime.evaluate(ethanol.numbers, ethanol.positions)
    with pytest.raises(UnsupportedInputError, match="position of atom 2 is not finite"):
        bad = ethanol.positions.copy()
        bad[2, 1] = np.nan
        runtime.evaluate(ethanol.numbers, bad)
    with pytest.raises(UnsupportedInputError, match="two atoms are at the same place"):
        bad = ethanol.positions.copy()
        bad[2] = bad[1]
        runtime.evaluate(ethanol.numbers, bad)
    with pytest.raises(UnsupportedInputError, match=r"shape \(1, 3\)"):
        runtime.evaluate(ethanol.numbers, ethanol.positions[:1])
    with torch.no_grad():
        runtime.model.backbone.embedding.weight.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="the force on atom 0 is not finite"):
        runtime.evaluate(ethanol.numbers, ethanol.positions)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("option", ["auto", True])
@pytest.mark.parametrize("pairs", [10**6, 250, 1])
def test_replicas_in_chunks(
    option: Any, pairs: int, potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PAIRS_EAGER", pairs)
    monkeypatch.setattr(cuda, "PAIRS_COMPILED", pairs)
    runtime = Runtime(potential, DEVICE, "float64", option)
    copies = Replicas(runtime, ethanol.numbers, ethanol.positions, 5)
    assert copies.name == (
        "replicas dense cuda-graph" if option == "auto" else "replicas dense compiled cuda-graph"
    )
    assert runtime.agreement[copies.name].path == copies.name
    first, second = displaced(ethanol, 5), displaced(ethanol, 5, 0.05)
    results = [copies(first), copies(second)]
    for (energy, forces), positions in zip(results, (first, second), strict=True):
        for place in range(5):
            want = plain(potential, ethanol, positions[place])
            assert float(energy[place]) == pytest.approx(want.energy, abs=1e-10)
            np.testing.assert_allclose(forces[place].cpu().numpy(), want.forces, rtol=0, atol=1e-11)


def external(potential: Any, atoms: Atoms, count: int, option: Any = "auto") -> External:
    return External(potential, np.tile(atoms.numbers, (count, 1)), DEVICE, "float64", option)


@pytest.mark.parametrize("pairs", [10**6, 250])
def test_an_engines_batch_is_one_graph(
    pairs: int, potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "PAIRS_EAGER", pairs)
    force = external(potential, ethanol, 4)
    box = torch.zeros(4, 3, 3, device=DEVICE)
    for positions in (displaced(ethanol, 4), displaced(ethanol, 4, 0.05)):
        found = force.model.evaluate(
            force.numbers.flatten(),
            positions.view(-1, 3),
            force._batch,
            box,
            torch.zeros(4, device=DEVICE) > 0,
        )
        wants = [plain(potential, ethanol, one) for one in positions]
        np.testing.assert_allclose(found.energy.cpu(), [w.energy for w in wants], rtol=0, atol=1e-10)
        np.testing.assert_allclose(found.shortest.cpu(), [w.shortest for w in wants], rtol=0, atol=1e-12)
        forces = np.concatenate([w.forces for w in wants])
        np.testing.assert_allclose(found.forces.cpu(), forces, rtol=0, atol=1e-11)
        assert found.nearest == pytest.approx(min(w.shortest for w in wants), abs=1e-12)
    name = "batch dense cuda-graph"
    assert force.model.runtime.backend == f"{name} float64 {force.device}"
    assert force.model.runtime.agreement[name].n_atoms == 9


def test_an_engines_batch_names_what_is_wrong(build_potential: Build, ethanol: Atoms) -> None:
    force, box = external(build_potential(), ethanol, 3), torch.zeros(3, 3, 3, device=DEVICE)
    good = displaced(ethanol, 3)
    want = force.calculate(good, box)
    bad = good.clone()
    bad[1, 4] = torch.nan
    with pytest.raises(UnsupportedInputError, match="structure 1: the position of atom 4 is not finite"):
        force.calculate(bad, box)
    bad = good.clone()
    bad[2, 4] = bad[2, 5]
    with pytest.raises(UnsupportedInputError, match="structure 2: two atoms are at the same place"):
        force.calculate(bad, box)
    torch.testing.assert_close(force.calculate(good, box), want, rtol=0, atol=1e-11)
    with torch.no_grad():
        force.model.runtime.model.backbone.embedding.weight.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="structure 0: the force on atom 0 is not finite"):
        force.calculate(good, box)


def test_the_policy_on_close_atoms_holds(with_card: Build, ethanol: Atoms) -> None:
    force = External(
        with_card(min_distance=0.9), np.tile(ethanol.numbers, (2, 1)), DEVICE, on_unfamiliar="raise"
    )
    positions, box = displaced(ethanol, 2, 0.0), torch.zeros(2, 3, 3, device=DEVICE)
    force.calculate(positions, box)
    positions[1, 8] = positions[1, 7] + torch.tensor([0.8, 0.0, 0.0], device=DEVICE)
    with pytest.raises(UnsupportedInputError, match=r"0\.800 Å apart, closer than any two in training"):
        force.calculate(positions, box)


@pytest.mark.parametrize("kind", ["elements", "sizes", "cells"])
def test_other_batches_keep_their_path(
    kind: str, potential: Potential, ethanol: Atoms, crystal: Atoms
) -> None:
    runtime = Runtime(potential, DEVICE, "float64", "auto")
    second = {"elements": ethanol[::-1], "sizes": molecule("H2O"), "cells": ethanol}[kind]
    cell = np.stack([np.zeros((3, 3)), 9.0 * np.eye(3)])
    repeats = torch.tensor([False, kind == "cells"])
    batch = torch.tensor([0] * len(ethanol) + [1] * len(second))
    numbers = torch.tensor(np.concatenate([ethanol.numbers, second.numbers]))
    positions = torch.tensor(np.concatenate([ethanol.positions, second.positions]))
    found = runtime.evaluate_tensors(numbers, positions, batch, torch.tensor(cell), repeats)
    assert runtime.backend.startswith("batch float64")
    assert float(found.energy[0]) == pytest.approx(
        plain(potential, ethanol, ethanol.positions).energy, abs=1e-10
    )


def test_the_gate_watches_every_graph(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = MoleculeGraph.unpack

    def wrong(self: MoleculeGraph, packed: Tensor) -> cuda.Molecules:
        found = right(self, packed)
        return found._replace(forces=found.forces.roll(1, 0))

    runtime = Runtime(potential, DEVICE, "float64", "auto")
    water = molecule("H2O")
    runtime.evaluate(water.numbers, water.positions)
    monkeypatch.setattr(MoleculeGraph, "unpack", wrong)
    with pytest.raises(AgreementError, match="dense cuda-graph"):
        runtime.evaluate(ethanol.numbers, ethanol.positions)
    with pytest.raises(AgreementError, match="replicas dense cuda-graph"):
        Replicas(runtime, ethanol.numbers, ethanol.positions, 2)
    with pytest.raises(AgreementError, match="batch dense cuda-graph"):
        external(potential, ethanol, 2).calculate(displaced(ethanol, 2), torch.zeros(2, 3, 3, device=DEVICE))


def test_writes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_counted", lambda tensor: not tensor.is_inference())
    watch, tensor = batches.Unchanged(), torch.zeros(4)
    assert not watch(tensor)
    watch.keep(tensor)
    assert watch(tensor) and watch(tensor.detach()) and watch(tensor.view(4))
    assert not watch(tensor[:2]) and not watch(tensor.clone()) and not watch(tensor, tensor)
    tensor[0] = 1.0
    assert not watch(tensor)
    watch.keep(tensor)
    tensor.detach().view(2, 2)[0] += 1.0
    assert not watch(tensor)
    with torch.inference_mode():
        unseen = torch.zeros(4)
        watch.keep(unseen)
        assert not watch(unseen)


def test_a_cpu_tensor_is_always_compared() -> None:
    watch, array = batches.Unchanged(), np.zeros(3)
    tensor = torch.from_numpy(array)
    watch.keep(tensor)
    assert not watch(tensor)


def run(potential: Potential, atoms: Atoms, option: Any, dtype: str, steps: int) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = FFCalculator(potential, DEVICE, dtype, option, on_unfamiliar="ignore")
    VelocityVerlet(atoms, 0.1 * units.fs).run(steps)
    return atoms


@pytest.mark.parametrize(("option", "steps"), [("auto", 200), pytest.param(True, 200, marks=needs_gpu)])
def test_dynamics_are_those_of_the_eager_path(
    option: Any, steps: int, potential: Potential, ethanol: Atoms
) -> None:
    ethanol.rattle(0.02, seed=1)
    fast, slow = (
        run(potential, ethanol, option, "float64", steps),
        run(potential, ethanol, False, "float64", steps),
    )
    assert "cuda-graph" in fast.calc.backend and "cuda-graph" not in slow.calc.backend
    assert np.abs(slow.positions - ethanol.positions).max() > 1e-3
    np.testing.assert_allclose(fast.positions, slow.positions, rtol=0, atol=1e-8)


@pytest.mark.parametrize("layers", [1, 3])
def test_filters_made_together_are_those_made_one_by_one(
    layers: int, build_potential: Build, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    potential = build_potential(layers=layers).double().requires_grad_(False)
    z, pos = torch.tensor(ethanol.numbers), torch.tensor(ethanol.positions)
    apart = dense_function(potential, z)(pos)
    seen: list[int] = []

    def together(basis: Tensor, weight: Tensor) -> bool:
        seen.append(basis.shape[-1])
        return True

    monkeypatch.setattr(torchmd_et, "_together", together)
    torch.testing.assert_close(dense_function(potential, z)(pos), apart, rtol=0, atol=1e-13)
    assert seen == [8]


@needs_gpu
@pytest.mark.parametrize("name", ["torchmd-et", "painn"])
def test_compiled_kernels_are_recorded(name: str, build_potential: Build, ethanol: Atoms) -> None:
    potential = build_potential(name=name)
    runtime = Runtime(potential, "cuda", "float32", compile=True)
    for positions in displaced(ethanol, 3).cpu().numpy():
        found = runtime.evaluate(ethanol.numbers, positions)
        np.testing.assert_allclose(
            found.forces, plain(potential, ethanol, positions).forces, rtol=0, atol=1e-5
        )
    assert runtime.backend == "dense compiled cuda-graph float32 cuda"


@needs_gpu
def test_a_step_waits_for_the_device_once(potential: Potential, ethanol: Atoms) -> None:
    force, box = external(potential, ethanol, 3), torch.zeros(3, 3, 3, device="cuda")
    force.calculate(displaced(ethanol, 3), box)
    force.calculate(displaced(ethanol, 3), box)
    positions = displaced(ethanol, 3, 0.05)
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            force.calculate(positions, box)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


@needs_gpu
def test_tf32_stays_off(potential: Potential, ethanol: Atoms) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    Runtime(potential, "cuda", "float32", True).evaluate(ethanol.numbers, ethanol.positions)
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
    assert not before[0]
