"""The runtime: the same numbers as the plain potential, whatever path they come by."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from torch import Tensor, nn

from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.backbones.radial import cosine_cutoff
from ffpretrain.errors import ConfigError, NonFiniteError, UnsupportedInputError
from ffpretrain.graphs import Graph, graph_from_atoms
from ffpretrain.md import agreement, compiled, paths
from ffpretrain.md.agreement import AgreementError
from ffpretrain.md.compiled import COMPILE_MIN_STEPS, CompileWarning
from ffpretrain.md.runtime import Runtime
from ffpretrain.md.verlet import VerletList
from ffpretrain.neighbors import neighbor_list
from ffpretrain.pairs import Pairs
from ffpretrain.potential import Potential

Build = Callable[..., Potential]


class Gaussians(Backbone):
    """As few operations as a backbone can have, so that compiling it is quick."""

    name = "gaussians"
    has_vectors = False

    def __init__(self) -> None:
        super().__init__(4.0, 4, 10, {})
        self.embedding = nn.Embedding(10, 4)

    def encode(self, z: Tensor, pairs: Pairs) -> Features:
        weight = torch.exp(-pairs.distance) * cosine_cutoff(pairs.distance, self.cutoff)
        if pairs.other is not None:
            weight = weight * pairs.other
        return Features(pairs.sum(weight.unsqueeze(-1) * pairs.neighbor(self.embedding(z))), None)


@pytest.fixture
def few_operations() -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Potential(Gaussians(), elements=[1, 6, 8]).eval()


def evaluate(runtime: Runtime, atoms: Atoms) -> paths.Evaluation:
    return runtime.evaluate(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)


def plain(potential: Potential, atoms: Atoms) -> dict[str, Tensor]:
    return copy.deepcopy(potential).double()(graph_from_atoms(atoms, potential.cutoff))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("limit", [0, 64])
def test_both_paths_give_what_the_potential_gives(
    potential: Potential, ethanol: Atoms, dtype: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "DENSE_ATOMS_EAGER_CPU", limit)
    runtime = Runtime(potential, "cpu", dtype)
    expected = plain(potential, ethanol)
    found = evaluate(runtime, ethanol)
    tolerance = 2e-6 if dtype == "float32" else 1e-12
    assert runtime.backend == f"{'dense' if limit else 'edges'} {dtype} cpu"
    assert found.energy == pytest.approx(float(expected["energy"]), abs=tolerance, rel=0)
    np.testing.assert_allclose(found.energies, expected["energies"].numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.forces, expected["forces"].numpy(), rtol=0, atol=tolerance)
    assert found.stress is None
    assert found.shortest == pytest.approx(ethanol.get_all_distances()[np.triu_indices(9, 1)].min())


def test_a_periodic_structure_has_a_stress(potential: Potential, crystal: Atoms) -> None:
    expected = plain(potential, crystal)
    found = evaluate(Runtime(potential, "cpu", "float64"), crystal)
    np.testing.assert_allclose(found.forces, expected["forces"].numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.stress, expected["stress"][0].numpy(), rtol=0, atol=1e-12)
    assert np.abs(found.stress).max() > 1e-3


def test_energies_keep_their_digits_on_large_totals(build_potential: Build, ethanol: Atoms) -> None:
    runtime = Runtime(build_potential(), "cpu", "float32")
    far = ethanol.copy()
    far.positions[8, 2] += 1e-4
    step = evaluate(runtime, far).energy - evaluate(runtime, ethanol).energy
    force = evaluate(runtime, ethanol).forces[8, 2]
    assert abs(evaluate(runtime, ethanol).energy) > 4000
    assert step == pytest.approx(-1e-4 * force, abs=3e-7)


def test_models_that_jump_at_the_cutoff_get_exact_pairs(build_potential: Build, ethanol: Atoms) -> None:
    rough = build_potential(vector_cutoff=False, cutoff=2.5)
    assert not rough.backbone.smooth
    runtime = Runtime(rough, "cpu", "float64")
    rng = np.random.default_rng(1)
    for _ in range(4):
        ethanol.positions += rng.normal(0, 0.05, (9, 3))
        found, expected = evaluate(runtime, ethanol), plain(rough, ethanol)
        np.testing.assert_allclose(found.forces, expected["forces"].numpy(), rtol=0, atol=1e-12)
    assert runtime.backend.startswith("edges")


@pytest.mark.parametrize("pbc", [(False, False, False), (True, True, True), (True, False, True)])
def test_the_verlet_list_is_exact_and_in_order(crystal: Atoms, pbc: tuple[bool, bool, bool]) -> None:
    verlet = VerletList(5.0)
    rng = np.random.default_rng(0)
    cell = torch.tensor(crystal.cell.array)
    pos = torch.tensor(crystal.positions)
    for _ in range(30):
        pos = pos + torch.tensor(rng.normal(0, 0.05, pos.shape))
        index, shift, shortest = verlet.pairs(pos, cell, pbc)
        fresh_index, fresh_shift, _ = VerletList(5.0).pairs(pos, cell, pbc)
        # bit for bit what a new list gives, so that a continued run adds up in the same order
        assert torch.equal(index, fresh_index) and torch.equal(shift, fresh_shift)
        exact, exact_shift = neighbor_list(pos, 5.0, cell, pbc)
        vector = pos[index[0]] + shift - pos[index[1]]
        exact_vector = pos[exact[0]] + exact_shift - pos[exact[1]]
        assert len(vector) == len(exact_vector)
        lengths = vector.norm(dim=1).sort().values
        assert torch.allclose(lengths, exact_vector.norm(dim=1).sort().values, atol=1e-12, rtol=0)
        assert shortest == pytest.approx(float(lengths[0]))
    assert 1 < verlet.builds < 15


def test_an_atom_put_back_into_the_cell_makes_a_new_list(crystal: Atoms) -> None:
    verlet = VerletList(3.0)
    cell, pos = torch.tensor(crystal.cell.array), torch.tensor(crystal.positions)
    verlet.pairs(pos, cell, (True,) * 3)
    wrapped = pos.clone()
    wrapped[0] += cell[1]
    index, shift, _ = verlet.pairs(wrapped, cell, (True,) * 3)
    lengths = (wrapped[index[0]] + shift - wrapped[index[1]]).norm(dim=1)
    assert verlet.builds == 2
    assert float(lengths.max()) < 3.0
    assert len(lengths) == neighbor_list(pos, 3.0, cell, (True,) * 3)[0].shape[1]
    verlet.pairs(wrapped, 1.01 * cell, (True,) * 3)
    assert verlet.builds == 3


def test_the_gate_keeps_its_numbers(potential: Potential, ethanol: Atoms, crystal: Atoms) -> None:
    runtime = Runtime(potential, "cpu", "float32")
    evaluate(runtime, ethanol)
    evaluate(runtime, crystal)
    assert set(runtime.agreement) == {"dense", "edges"}
    measured = runtime.agreement["dense"].as_dict()
    assert measured["dtype"] == "float32" and measured["n_atoms"] == 9 and measured["frames"] == 3
    assert 0 < measured["force_error"] <= measured["tolerance"] * measured["force_scale"]
    assert 0 < measured["energy_error"] <= measured["tolerance"] * measured["energy_scale"]


def test_the_gate_refuses_wrong_numbers(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = paths.dense_function

    def slightly_wrong(potential: Potential, z: Tensor) -> paths.DenseFunction:
        function = right(potential, z)
        return lambda pos: (function(pos)[0], function(pos)[1] + 1e-4)

    monkeypatch.setattr(paths, "dense_function", slightly_wrong)
    with pytest.raises(AgreementError, match=r"forces differ by .* \(allowed .*\), energies by .* \(allowed"):
        evaluate(Runtime(potential, "cpu", "float32"), ethanol)
    monkeypatch.setattr(agreement, "TOLERANCE", {torch.float32: 2e-4})
    evaluate(Runtime(potential, "cpu", "float32"), ethanol)


def test_a_batch_equals_its_structures(potential: Potential, ethanol: Atoms, crystal: Atoms) -> None:
    runtime = Runtime(potential, "cpu", "float64")
    structures = [ethanol, crystal, molecule("H2O"), Atoms("C")]
    found = runtime.evaluate_batch(structures)
    for one, atoms in zip(found, structures, strict=True):
        alone = evaluate(runtime, atoms)
        assert one.energy == pytest.approx(alone.energy, abs=1e-11)
        np.testing.assert_allclose(one.forces, alone.forces, rtol=0, atol=1e-12)
        assert (one.stress is None) == (alone.stress is None)
        assert one.shortest == pytest.approx(alone.shortest)
    np.testing.assert_allclose(found[1].stress, evaluate(runtime, crystal).stress, rtol=0, atol=1e-12)


def test_energies_alone_need_no_derivative(
    potential: Potential, ethanol: Atoms, crystal: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, structures = (
        Runtime(potential, "cpu", "float64"),
        [ethanol, crystal, molecule("H2O"), Atoms("C")],
    )
    full = runtime.evaluate_batch(structures)
    # the gate compares with forces: it is passed before derivatives are forbidden
    runtime.evaluate_batch(structures[:1], forces=False)
    assert runtime.agreement["batch energies"].energy_error < 1e-9

    def derivative(*args: object, **kwargs: object) -> None:
        raise AssertionError("a derivative was computed")

    monkeypatch.setattr(torch.autograd, "grad", derivative)
    for with_forces, one in zip(full, runtime.evaluate_batch(structures, forces=False), strict=True):
        # to rounding: without derivatives torch may take other kernels
        assert one.energy == pytest.approx(with_forces.energy, abs=1e-10)
        np.testing.assert_allclose(one.energies, with_forces.energies, rtol=0, atol=1e-10)
        assert one.shortest == with_forces.shortest
        assert one.forces is None and one.stress is None
    with pytest.raises(AssertionError, match="a derivative was computed"):
        runtime.evaluate_batch(structures)


def test_the_gate_covers_energies_alone(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Potential.forward

    def wrong_without_forces(self: Potential, graph: Graph, *, forces: bool = True) -> dict[str, Tensor]:
        found = right(self, graph, forces=forces)
        return found if forces else {**found, "energy": found["energy"] + 0.01}

    monkeypatch.setattr(Potential, "forward", wrong_without_forces)
    runtime = Runtime(potential, "cpu", "float32")
    assert runtime.evaluate_batch([ethanol])[0].forces is not None
    with pytest.raises(AgreementError, match="batch energies"):
        runtime.evaluate_batch([ethanol], forces=False)


def test_a_module_without_energies_alone_is_evaluated_in_full(morse: type[nn.Module], ethanol: Atoms) -> None:
    runtime = Runtime(morse(), "cpu", "float64")
    (full,), (alone,) = (runtime.evaluate_batch([ethanol], forces=forces) for forces in (True, False))
    assert full.forces is not None and alone.forces is None
    assert alone.energy == full.energy


def test_the_runtime_is_a_copy(build_potential: Build, ethanol: Atoms) -> None:
    potential = build_potential()
    runtime = Runtime(potential, "cpu", "float64")
    before = evaluate(runtime, ethanol).energy
    with torch.no_grad():
        potential.head.second.out.bias.add_(1.0)  # type: ignore[union-attr]
    assert evaluate(runtime, ethanol).energy == before
    assert potential.dtype == torch.float32
    assert next(potential.parameters()).requires_grad
    assert not any(parameter.grad is not None for parameter in potential.parameters())


def test_no_process_wide_state_changes(potential: Potential, ethanol: Atoms) -> None:
    before = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_rng_state(),
    )
    evaluate(Runtime(potential, "cpu", "float32"), ethanol)
    after = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_rng_state(),
    )
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_copies_and_pickles_give_the_same_numbers(potential: Potential, ethanol: Atoms) -> None:
    runtime = Runtime(potential, "cpu", "float32")
    expected = evaluate(runtime, ethanol)
    for twin in (copy.deepcopy(runtime), pickle.loads(pickle.dumps(runtime))):
        assert evaluate(twin, ethanol).energy == expected.energy
        assert twin.fingerprint() == runtime.fingerprint()
    assert Runtime(potential, "cpu", "float64").fingerprint() != runtime.fingerprint()


@pytest.mark.skipif(
    not os.environ.get("FFPRETRAIN_TEST_COMPILER"),
    reason="compiling takes a minute or two: set FFPRETRAIN_TEST_COMPILER=1 to run this test",
)
def test_compiled_numbers_pass_the_gate(few_operations: Potential, ethanol: Atoms) -> None:
    """The one test that runs the C++ compiler; without one it must warn and give the same numbers."""
    runtime = Runtime(few_operations, "cpu", "float32", compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evaluate(runtime, ethanol)
    without_compiler = [w for w in caught if w.category is CompileWarning]
    expected = evaluate(Runtime(few_operations, "cpu", "float64"), ethanol)
    np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=1e-6)
    assert found.energy == pytest.approx(expected.energy, abs=1e-6)
    assert ("compiled" in runtime.backend) != bool(without_compiler)
    assert set(runtime.agreement) == ({"dense"} if without_compiler else {"dense compiled"})


def test_builds_are_kept_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path))
    seen = []

    def build(module: Any, **options: Any) -> Any:
        def built(pos: torch.Tensor) -> Any:
            seen.append(os.environ.get(names[0]))
            os.environ[names[1]] = "as torch does"
            return module(pos)

        return built

    monkeypatch.setattr(compiled.torch, "compile", build)
    function = compiled.compile_function(lambda pos: (2 * pos,), torch.ones(2, 3))
    assert function is not None and seen == [str(tmp_path / "inductor")]
    assert names[1] not in os.environ
    monkeypatch.setenv(names[0], "elsewhere")
    compiled.compile_function(lambda pos: (2 * pos,), torch.ones(2, 3))
    assert seen[-1] == "elsewhere" and os.environ[names[0]] == "elsewhere"


def test_no_compiler_is_said_once(
    few_operations: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no C++ compiler found\nlong story")

    monkeypatch.setattr(compiled.torch, "compile", fail)
    runtime = Runtime(few_operations, "cpu", "float32", compile=True)
    with pytest.warns(CompileWarning, match="no C\\+\\+ compiler found") as caught:
        evaluate(runtime, ethanol)
        evaluate(runtime, ethanol)
    assert len(caught) == 1
    assert runtime.backend == "dense float32 cpu"


def test_auto_compiles_only_long_runs(
    few_operations: Potential, ethanol: Atoms, crystal: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled.torch, "compile", lambda module, **options: module)
    runtime = Runtime(few_operations, "cpu", "float32", compile="auto")
    eager = evaluate(runtime, ethanol)
    assert runtime.backend == "dense float32 cpu"
    runtime.expected_steps = COMPILE_MIN_STEPS
    found = evaluate(runtime, ethanol)
    assert runtime.backend == "dense compiled float32 cpu"
    np.testing.assert_allclose(found.forces, eager.forces, rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(runtime, crystal)
    with pytest.warns(CompileWarning, match="only molecules in vacuum"):
        evaluate(Runtime(few_operations, "cpu", "float32", compile=True), crystal)


class Direct(nn.Module):
    """Forces without an energy."""

    cutoff = 5.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        return {"forces": (graph.pos - graph.pos.mean(0)) * self.scale}


def test_any_module_with_a_cutoff_will_do(ethanol: Atoms) -> None:
    found = evaluate(Runtime(Direct(), "cpu", "float64"), ethanol)
    assert found.energy is None and found.energies is None
    np.testing.assert_allclose(found.forces, ethanol.positions - ethanol.positions.mean(0), atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__delitem__(slice(None)), "no atoms"),
        (lambda a: a.numbers.__setitem__(0, 80), "not trained on Hg"),
        (lambda a: a.positions.__setitem__((2, 1), np.nan), "position of atom 2 is not finite"),
        (lambda a: a.positions.__setitem__((2, 1), np.inf), "position of atom 2 is not finite"),
        (lambda a: a.positions.__setitem__(1, a.positions[0]), "at the same place"),
        (lambda a: a.set_pbc([True, False, False]), "cell vector is zero"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    potential: Potential, ethanol: Atoms, change: Callable[[Atoms], None], message: str
) -> None:
    runtime = Runtime(potential, "cpu", "float32")
    evaluate(runtime, ethanol)
    change(ethanol)
    with pytest.raises(UnsupportedInputError, match=message):
        evaluate(runtime, ethanol)


def test_results_that_are_not_finite_are_refused(build_potential: Build, ethanol: Atoms) -> None:
    potential = build_potential()
    with torch.no_grad():
        potential.head.second.out.bias.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="not finite"):
        evaluate(Runtime(potential, "cpu", "float32"), ethanol)
    with pytest.raises(NonFiniteError, match="structure 0: the "):
        Runtime(potential, "cpu", "float32").evaluate_batch([ethanol])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpuu"}, "cpuu"),
        ({"dtype": "float16"}, "did you mean 'float"),
        ({"compile": "always"}, "compile='always'"),
    ],
)
def test_options_out_of_range(potential: Potential, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Runtime(potential, **options)


@pytest.mark.parametrize(
    ("numbers", "positions", "cell", "message"),
    [
        ([6, 1], np.eye(3), None, r"of shape \(2,\) and positions of shape \(3, 3\) do not belong together"),
        ([6, 1], np.zeros((2, 2)), None, r"positions of shape \(2, 2\)"),
        (6, np.zeros((1, 3)), None, r"atomic numbers of shape \(\)"),
        ([6], np.zeros((1, 3)), np.ones(3), r"the cell has shape \(3,\); give three vectors"),
    ],
)
def test_shapes_that_do_not_match(
    potential: Potential, numbers: Any, positions: Any, cell: Any, message: str
) -> None:
    runtime = Runtime(potential, "cpu")
    pbc = (cell is not None,) * 3
    with pytest.raises(UnsupportedInputError, match=message):
        runtime.evaluate(numbers, positions, cell, pbc)
    with pytest.raises(UnsupportedInputError, match=message):
        runtime.evaluate_batch([SimpleNamespace(numbers=numbers, positions=positions, cell=cell, pbc=pbc)])


def test_a_dummy_atom_is_named(potential: Potential) -> None:
    with pytest.raises(UnsupportedInputError, match="not trained on N, X, which is no element; it knows H"):
        Runtime(potential, "cpu").evaluate([0, 7], np.eye(3)[:2])
