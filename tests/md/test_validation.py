"""The checks of a validation, each with a model that fails it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.vibrations import Vibrations
from torch import Tensor, nn

from ffpretrain import FFCalculator, units
from ffpretrain.errors import MissingDependencyError
from ffpretrain.graphs import Graph, build_graph
from ffpretrain.md import run
from ffpretrain.md.paths import DensePath
from ffpretrain.md.validation import conservation, engines, vibrations
from ffpretrain.md.validation.bonds import Limits, bonds_of
from ffpretrain.md.validation.conservation import check_conservation
from ffpretrain.md.validation.engines import Engine, Values, check_engines
from ffpretrain.md.validation.plan import Plan
from ffpretrain.md.validation.stretch import check_stretch, crossings, dividing_bond
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.symmetry import check_symmetry
from ffpretrain.md.validation.vibrations import check_vibrations, hessian
from ffpretrain.molecules import find_bonds
from ffpretrain.potential import Potential

Build = Callable[..., Potential]
Model = type[nn.Module]


def examine(model: nn.Module, atoms: Atoms | str = "CH4") -> Subject:
    return Subject(model, molecule(atoms) if isinstance(atoms, str) else atoms, "cpu")


# engines


def test_engines_and_paths_agree_on_a_network(potential: Potential, ethanol: Atoms) -> None:
    check = check_engines(examine(potential, ethanol))
    assert check.status == "passed", check.summary
    rows = {row["engine"]: row for row in check.measured["engines"]}
    assert set(rows) == {"OpenMM", "TorchMD", "torch-sim"}
    for row in rows.values():
        if row["status"] != "not installed":
            assert row["version"] and row["energy_error"] < 1e-9 and row["force_error"] < 1e-9
    paths = {(row["path"], row["dtype"]) for row in check.measured["paths"]}
    assert paths >= {(path, dtype) for path in ("edges", "dense") for dtype in ("float32", "float64")}
    assert sum(row["dynamics"] for row in check.measured["paths"]) == 1


def test_engines_agree_in_a_cell(potential: Potential, crystal: Atoms) -> None:
    check = check_engines(examine(potential, crystal))
    assert check.status == "passed", check.measured


def spoiled(energy: float = 0.0, force: float = 0.0) -> Callable[[Subject, Sequence[Atoms]], Values]:
    def evaluate(subject: Subject, frames: Sequence[Atoms]) -> Values:
        values = [(subject.exact.get_potential_energy(f), subject.exact.get_forces(f)) for f in frames]
        found = Values(np.array([e for e, _ in values]), np.array([f for _, f in values]))
        found.energy[-1] += energy
        found.forces[-1, -1, -1] += force
        return found

    return evaluate


def broken(subject: Subject, frames: Sequence[Atoms]) -> Values:
    raise RuntimeError("the engine\nis on fire")


@pytest.mark.parametrize(
    ("evaluate", "status"),
    [
        (spoiled(), "agrees"),
        (spoiled(energy=0.9e-5, force=0.9e-4), "agrees"),
        (spoiled(energy=1.1e-5), "differs"),
        (spoiled(force=1.1e-4), "differs"),
        (spoiled(force=math.nan), "differs"),
        (broken, "failed"),
    ],
)
def test_an_engine_that_differs_is_a_miss(
    evaluate: Any, status: str, morse: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ENGINES", (Engine("Engine", "numpy", "numpy", "x", evaluate),))
    check = check_engines(examine(morse()))
    row = check.measured["engines"][0]
    assert (row["status"], check.status) == (status, "passed" if status == "agrees" else "missed")
    if status == "failed":
        assert row["error"] == "the engine is on fire"


def test_an_engine_that_is_absent_is_named(morse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Engine("Nowhere", "no_such_engine", "no-such-engine", "openmm", spoiled())
    monkeypatch.setattr(engines, "ENGINES", (absent,))
    check = check_engines(examine(morse()))
    assert check.status == "passed" and "not installed: Nowhere" in check.summary
    assert check.measured["engines"][0]["install"] == 'pip install "ffpretrain[openmm]"'


def test_an_engine_that_cannot_be_imported_is_no_miss(
    morse: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A system library may be missing: at the import, or where the adapter imports more of the engine."""
    (tmp_path / "unusable_engine.py").write_text("raise ImportError('libgomp.so.1: no such\\nfile')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def without_library(subject: Subject, frames: Sequence[Atoms]) -> Values:
        raise MissingDependencyError("it cannot be imported (libcuda.so.1)")

    first = Engine("First", "unusable_engine", "numpy", "x", spoiled())
    second = Engine("Second", "numpy", "numpy", "x", without_library)
    monkeypatch.setattr(engines, "ENGINES", (first, second))
    check = check_engines(examine(morse()))
    assert check.status == "passed" and "not as ASE" not in check.summary
    assert "cannot be imported: First (libgomp.so.1: no such file), Second (it cannot" in check.summary
    assert "First" not in check.summary.split(";")[0]
    assert [row["status"] for row in check.measured["engines"]] == ["cannot be imported"] * 2


def test_a_path_of_the_runtime_that_differs_is_a_miss(
    potential: Potential, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(DensePath):
        def __call__(self, positions: Any, cell: Any) -> Any:
            found = super().__call__(positions, cell)
            return found._replace(energy=found.energy + 1e-3)

    monkeypatch.setattr(engines, "ENGINES", ())
    subject = examine(potential, ethanol)
    monkeypatch.setattr(engines, "DensePath", Wrong)
    check = check_engines(subject)
    assert check.status == "missed" and "path dense float64, path dense float32" in check.summary


# symmetry


def spoil(morse: Model, term: Callable[[Tensor, Graph], Tensor]) -> nn.Module:
    """Return the Morse potential with a term added to each structure's energy."""

    class Spoiled(morse):  # type: ignore[valid-type,misc]
        def energy(self, pos: Tensor, graph: Graph) -> Tensor:
            return super().energy(pos, graph) + term(pos, graph)

    return Spoiled()


def per_graph(values: Tensor, graph: Graph) -> Tensor:
    return values.new_zeros(graph.n_graphs).index_add(0, graph.batch, values)


def centred(pos: Tensor, graph: Graph) -> Tensor:
    count = torch.bincount(graph.batch, minlength=graph.n_graphs).unsqueeze(1)
    mean = pos.new_zeros(graph.n_graphs, 3).index_add(0, graph.batch, pos) / count
    return pos - mean[graph.batch]


def handed(pos: Tensor, graph: Graph) -> Tensor:
    """A term that a mirror image has with the other sign, whatever the order of the atoms."""
    x = centred(pos, graph)
    r = x.norm(dim=1, keepdim=True)
    moments = [
        x.new_zeros(graph.n_graphs, 3).index_add(0, graph.batch, x * weight * (1 + r**k))
        for k, weight in enumerate(
            (r**3, (graph.z == 1).unsqueeze(1) * r**4, (graph.z == 6).unsqueeze(1) + r)
        )
    ]
    return torch.linalg.det(torch.stack(moments, dim=1))


def first_atoms(graph: Graph) -> Tensor:
    return graph.batch.diff(prepend=torch.tensor([-1])) > 0


SPOILERS: dict[str, Callable[[Tensor, Graph], Tensor]] = {
    "translation": lambda pos, graph: per_graph(1e-6 * pos[:, 0] ** 2, graph),
    "rotation": lambda pos, graph: per_graph(1e-6 * centred(pos, graph)[:, 0] ** 2, graph),
    "reflection": lambda pos, graph: 1e-5 * handed(pos, graph),
    "permutation": lambda pos, graph: 1e-6 * centred(pos, graph)[first_atoms(graph)].square().sum(1),
    "batching": lambda pos, graph: 1e-6 * graph.n_graphs * per_graph(centred(pos, graph)[:, 0] ** 2, graph),
}


def test_a_smooth_invariant_potential_keeps_every_symmetry(morse: Model, crystal: Atoms) -> None:
    check = check_symmetry(examine(morse()))
    assert check.status == "passed", check.measured
    assert {row["check"] for row in check.measured["checks"]} == {*SPOILERS, "forces", "cutoff"}
    assert all(0 <= row["difference"] <= row["tolerance"] for row in check.measured["checks"])
    periodic = check_symmetry(examine(morse(), crystal))
    assert periodic.status == "passed" and periodic.measured["checks"][-1]["check"] == "wrapping"


@pytest.mark.parametrize("name", SPOILERS)
def test_a_broken_symmetry_is_a_miss(name: str, morse: Model) -> None:
    check = check_symmetry(examine(spoil(morse, SPOILERS[name])))
    missed = [row["check"] for row in check.measured["checks"] if row["status"] == "missed"]
    assert check.status == "missed" and name in missed
    if name in ("reflection", "permutation", "rotation"):
        assert missed == [name] or (name == "rotation" and missed == ["rotation", "reflection"])


def swirl(morse: Model, size: float) -> nn.Module:
    """Return the Morse potential with a field added to its forces that is no gradient."""

    class Swirl(morse):  # type: ignore[valid-type,misc]
        def field(self, pos: Tensor, forces: Tensor) -> Tensor:
            arm = pos - pos.mean(0)
            return forces + size * torch.stack([-arm[:, 1], arm[:, 0], torch.zeros_like(arm[:, 0])], dim=1)

    return Swirl()


def test_forces_that_are_no_gradient_are_a_miss(morse: Model) -> None:
    check = check_symmetry(examine(swirl(morse, 1e-3)))
    row = next(row for row in check.measured["checks"] if row["check"] == "forces")
    assert check.status == "missed" and row["status"] == "missed" and "finite differences" in row["error"]


def test_a_cut_off_potential_jumps(morse: Model) -> None:
    subject = examine(morse(smooth=False))
    rows = {row["check"]: row["status"] for row in check_symmetry(subject).measured["checks"]}
    assert rows.pop("cutoff") == "missed" and set(rows.values()) == {"passed"}
    check = check_stretch(subject)
    assert check.status == "missed" and check.measured["jump"] > 1e-6


# stretch


def test_a_smooth_potential_can_be_pulled_apart(morse: Model, ethanol: Atoms) -> None:
    check = check_stretch(examine(morse(), ethanol))
    assert check.status == "passed" and check.measured["jump"] < 1e-8
    assert check.measured["passages"] > 10
    assert check.measured["bond_name"] == "C0-C1"
    assert check.series["length"][-1] == pytest.approx(4.5)


def test_the_passages_are_where_a_pair_is_at_the_cutoff(morse: Model) -> None:
    subject = examine(morse(), "H2O")
    stretch = dividing_bond(subject)
    assert stretch is not None and stretch.moving.sum() == 1
    found = crossings(subject, stretch, 0.0, 10.0)
    assert len(found) == 2  # the leaving hydrogen passes the oxygen's cutoff and the other hydrogen's
    for shift in found:
        moved = subject.atoms.copy()
        moved.positions[stretch.moving] += shift * stretch.direction
        distances = moved.get_all_distances()[stretch.moving][0]
        assert np.abs(distances - subject.cutoff).min() < 1e-8


def test_a_ring_has_no_bond_that_divides_it(morse: Model) -> None:
    ring = Atoms("C3", positions=[[0, 0, 0], [1.4, 0, 0], [0.7, 1.2, 0]])
    assert check_stretch(examine(morse(), ring)).status == "not run"


def test_an_infinite_energy_on_the_way_is_a_miss(morse: Model) -> None:
    def wall(pos: Tensor, graph: Graph) -> Tensor:
        return per_graph(torch.where(centred(pos, graph).norm(dim=1) > 2.5, torch.nan, 0.0), graph)

    check = check_stretch(examine(spoil(morse, wall)))
    assert check.status == "missed" and "not finite" in check.summary


# vibrations


class Harmonic(nn.Module):
    """Springs between listed atoms; ``stiffness`` eV/Å²."""

    cutoff = 10.0

    def __init__(self, pairs: list[tuple[int, int]], rest: float, stiffness: float) -> None:
        super().__init__()
        self.pairs, self.rest, self.stiffness = torch.tensor(pairs).T, rest, stiffness

    def forward(self, graph: Graph) -> dict[str, Tensor]:
        with torch.enable_grad():
            pos = graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_(True)
            r = (pos[self.pairs[0]] - pos[self.pairs[1]]).norm(dim=1)
            energy = 0.5 * self.stiffness * (r - self.rest).square().sum().reshape(1)
            (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=self.training)
        return {"energy": energy, "forces": -gradient}


def in_inverse_cm(omega_squared: float) -> float:
    """Return the wavenumber of ω² in eV/Å²/amu, with CODATA's constants."""
    omega = math.sqrt(omega_squared * 1.602176634e-19 / 1e-20 / 1.66053907e-27)  # rad/s
    return omega / (2 * math.pi * 2.99792458e10)


def test_harmonic_molecules_have_the_wavenumbers_of_the_textbook() -> None:
    """A diatomic: ω² = k/μ. A triangle of equal springs: 3k/m once (breathing) and 3k/2m twice."""
    stiffness, rest = 30.0, 1.2
    diatomic = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.25]])
    check, relaxed = check_vibrations(examine(Harmonic([(0, 1)], rest, stiffness), diatomic))
    reduced = np.prod(diatomic.get_masses()) / diatomic.get_masses().sum()
    assert check.status == "passed"
    assert check.measured["wavenumbers"] == pytest.approx([in_inverse_cm(stiffness / reduced)], rel=1e-6)
    assert relaxed.get_distance(0, 1) == pytest.approx(rest, abs=1e-5)
    zero_point = 0.5 * check.measured["wavenumbers"][0] * units.INVERSE_CM
    assert check.measured["zero_point_energy"] == pytest.approx(zero_point)
    corners = rest * np.array([[0, 0, 0], [1, 0, 0], [0.5, math.sqrt(0.75), 0]])
    triangle = Atoms("C3", positions=corners)
    check, _ = check_vibrations(examine(Harmonic([(0, 1), (1, 2), (2, 0)], rest, stiffness), triangle))
    m = triangle.get_masses()[0]
    want = [in_inverse_cm(factor * stiffness / m) for factor in (1.5, 1.5, 3.0)]
    assert check.measured["wavenumbers"] == pytest.approx(want, rel=1e-6)
    assert check.measured["hessian_asymmetry"] < 1e-12


def test_wavenumbers_are_those_of_finite_differences(morse: Model, tmp_path: Path) -> None:
    subject = examine(morse())
    check, relaxed = check_vibrations(subject)
    relaxed.calc = FFCalculator(subject.potential, "cpu", "float64")
    ase = Vibrations(relaxed, name=str(tmp_path / "vib"), delta=0.002, nfree=4)
    ase.run()
    assert check.status == "passed" and len(check.measured["wavenumbers"]) == 9
    np.testing.assert_allclose(check.measured["wavenumbers"], ase.get_frequencies().real[6:], rtol=1e-5)


def test_the_hessian_of_a_network_is_that_of_finite_differences(potential: Potential, ethanol: Atoms) -> None:
    subject = examine(potential, ethanol)
    found = hessian(subject.potential, subject.graph(ethanol))
    assert not subject.potential.training
    step, rows = 1e-4, []
    for coordinate in (0, 4, 17, 26):
        sides = []
        for sign in (1, -1):
            moved = ethanol.copy()
            moved.positions.reshape(-1)[coordinate] += sign * step
            sides.append(subject.exact.get_forces(moved).ravel())
        rows.append((sides[1] - sides[0]) / (2 * step))
    np.testing.assert_allclose(found[[0, 4, 17, 26]], rows, rtol=0, atol=1e-6 * np.abs(found).max())


def test_a_saddle_point_is_followed_to_the_minimum(morse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three heavy atoms in a line attract each other: the line is stationary, the triangle is the minimum."""
    line = Atoms("CCC", positions=[[-1.05, 0, 0], [0, 0, 0], [1.05, 0, 0]])
    check, relaxed = check_vibrations(examine(morse(), line))
    assert check.status == "passed", check.summary
    assert check.measured["followed"][0]["wavenumber"] < -100
    assert check.measured["followed"][0]["energy_gained"] > 0.1
    assert relaxed.get_distance(0, 2) == pytest.approx(relaxed.get_distance(0, 1), abs=1e-3)
    monkeypatch.setattr(vibrations, "FOLLOWED", 0)
    check, _ = check_vibrations(examine(morse(), line))
    assert check.status == "missed" and "imaginary modes without explanation" in check.summary
    assert len(check.measured["imaginary"]) == 2


def test_a_field_without_energy_surface_is_a_miss(morse: Model) -> None:
    check, _ = check_vibrations(examine(swirl(morse, 1e-4), "H2O"))
    assert check.status == "missed"
    assert "Hessian is not symmetric" in check.summary or "no minimum found" in check.summary


def test_a_relaxation_without_end_is_a_miss(morse: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vibrations, "STEPS", 1)
    check, _ = check_vibrations(examine(morse()))
    assert check.status == "missed" and "after 1 steps of relaxation" in check.summary


def test_a_relaxation_that_ends_in_another_molecule_is_a_miss() -> None:
    water = molecule("H2O")
    check, kept = check_vibrations(examine(Harmonic([(0, 1), (0, 2), (1, 2)], 3.0, 10.0), water))
    assert check.status == "missed" and "relaxation breaks the structure: bond" in check.summary
    np.testing.assert_allclose(kept.positions, molecule("H2O").positions)


def test_forces_that_cannot_be_differentiated_are_said() -> None:
    class Opaque(Harmonic):
        def forward(self, graph: Graph) -> dict[str, Tensor]:
            return {key: value.detach() for key, value in super().forward(graph).items()}

    atoms = Atoms("CO", positions=[[0, 0, 0], [0, 0, 1.2]])
    check, _ = check_vibrations(examine(Opaque([(0, 1)], 1.2, 30.0), atoms))
    assert check.status == "missed" and "cannot be differentiated" in check.summary


# conservation


def nve(calculator: Any, atoms: Atoms, folder: Path, ps: float = 0.25) -> Any:
    subject = SimpleNamespace(working=calculator, seed=0)
    plan = Plan("test", nve_ps=ps, stability_ps=1.0, replicas=1, relabelled=1)
    return check_conservation(subject, atoms, plan, folder, False)  # type: ignore[arg-type]


def test_springs_conserve_energy(
    methane: tuple[Atoms, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conservation, "LINES", 10**6)
    check = nve(methane[1], methane[0], tmp_path)
    assert check.status == "passed", check.summary
    table = np.genfromtxt(tmp_path / "log.csv", delimiter=",", names=True)
    assert len(table) == 501
    slope = np.polyfit(table["time_ps"], table["total_eV"] * 1e3 / 5, 1)[0]
    assert check.measured["slope"] == pytest.approx(slope, rel=1e-3)
    assert check.measured["kinetic_std"] == pytest.approx(table["kinetic_eV"].std(), rel=1e-4)
    want = abs(slope) * 1e-3 * 5 * 0.25 / table["kinetic_eV"].std()
    assert check.measured["drift_over_kinetic_std"] == pytest.approx(want, rel=1e-3)
    assert len(check.series["time"]) == len(check.series["total"]) <= 200


@pytest.mark.filterwarnings("ignore:the minimisation stopped")
def test_a_field_that_does_work_is_a_miss(
    methane: tuple[Atoms, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MINIMIZE_STEPS", 5)
    atoms, springs = methane

    class Windmill(type(springs)):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["forces"] = self.results["forces"] + 0.05 * np.cross(
                [0, 0, 1.0], self.atoms.positions
            )

    check = nve(Windmill(atoms), atoms, tmp_path)
    assert check.status == "missed" and check.measured["slope"] > 0.05


def test_a_run_that_breaks_is_a_miss(methane: tuple[Atoms, Any], tmp_path: Path) -> None:
    atoms, springs = methane

    class Bomb(type(springs)):  # type: ignore[misc]
        def calculate(self, *args: Any, **kwargs: Any) -> None:
            super().calculate(*args, **kwargs)
            self.results["forces"] = -5.0 * self.results["forces"]

    check = nve(Bomb(atoms), atoms, tmp_path)
    assert check.status == "missed" and check.summary.startswith("stopped: ")


# limits


def test_bonds_are_found_and_judged() -> None:
    ethanol = molecule("CH3CH2OH")
    bonds = bonds_of(ethanol)
    assert bonds.tolist() == find_bonds(ethanol.numbers, ethanol.positions)[:, :2].tolist()
    assert len(bonds) == 8
    limits = Limits(ethanol, None, None, torch.device("cpu"))
    start = torch.tensor(ethanol.positions)
    oxygen, hydrogen = next(pair for pair in bonds.tolist() if pair[0] == 2)
    assert [str(ethanol.symbols[i]) for i in (oxygen, hydrogen)] == ["O", "H"]
    copies = start.expand(4, -1, -1).clone()
    for copy, longer in ((1, 0.9), (2, 1.1)):
        copies[copy, hydrogen] += longer * (copies[copy, hydrogen] - copies[copy, oxygen])
    copies[3, 4] = copies[3, 5] + torch.tensor([0.2, 0.0, 0.0])
    assert limits.allow(copies).tolist() == [limits.explain(copy) == "" for copy in copies]
    assert limits.allow(copies).tolist() == [True, True, False, False]
    assert "bond O2-H3 is" in limits.explain(copies[2]) and "long, allowed" in limits.explain(copies[2])
    assert "0.20 Å apart" in limits.explain(copies[3])
    assert limits.explain(start * math.nan) == "a position is not finite"
    longest = np.array([ethanol.get_distance(*bond) for bond in bonds]) * 1.1
    assert Limits(ethanol, longest, None, torch.device("cpu")).allow(copies[2][None]).tolist() == [True]


def test_the_cards_smallest_distances_count(with_card: Build) -> None:
    water = molecule("H2O")
    card = with_card(pair_distances={"H-O": (1.6, 3.0)}, min_distance=0.1).card
    limits = Limits(water, None, card, torch.device("cpu"))
    assert limits.closest[0, 1] == pytest.approx(0.8) and limits.closest[1, 2] == pytest.approx(0.05)


def test_images_in_a_cell_count() -> None:
    atoms = Atoms("CO", positions=[[0.1, 0.5, 0.5], [4.9, 0.5, 0.5]], cell=[6.0, 5.0, 5.0], pbc=True)
    limits = Limits(atoms, None, None, torch.device("cpu"))
    assert limits.longest.tolist() == pytest.approx([2.4])
    near = torch.tensor([[[0.1, 0.5, 0.5], [5.8, 0.5, 0.5]]], dtype=torch.float64)
    assert limits.allow(near).tolist() == [False] and "0.30 Å apart" in limits.explain(near[0])


def test_graphs_of_the_spoilers_are_what_they_say(morse: Model) -> None:
    """Without the spoiled term nothing is missed: the spoilers, not the tests, break the symmetry."""
    zero = spoil(morse, lambda pos, graph: per_graph(0.0 * pos[:, 0], graph))
    assert check_symmetry(examine(zero)).status == "passed"
    graph = build_graph(torch.tensor([6, 1]), torch.tensor([[0.0, 0, 0], [0, 0, 1.1]]).double(), 4.0)
    assert float(zero(graph)["energy"].detach()) < -4
