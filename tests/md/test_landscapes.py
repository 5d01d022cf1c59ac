"""Landscapes: grids, energies against direct calls, roughness in closed form, figures, files, bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from ffpretrain import FFCalculator
from ffpretrain.backbones import create_backbone
from ffpretrain.cli import main
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md import landscape
from ffpretrain.md.landscapes import (
    Axis,
    Coordinate,
    Geometries,
    Landscape,
    collective_variable,
    free_energy,
    minimum_energy_path,
    modes_plane,
    parse_coordinate,
    plane_through,
    principal_plane,
    random_plane,
    read_folder,
    relaxed_scan,
    rigid_scan,
    roughness,
)
from ffpretrain.md.landscapes import evaluate as evaluation
from ffpretrain.md.landscapes.figures import draw
from ffpretrain.md.landscapes.page import MOST_FRAMES, viewer_data
from ffpretrain.md.landscapes.planes import rigid_motions, superimposed
from ffpretrain.md.landscapes.roughness import energy_jump, slope_changes, tortuosity
from ffpretrain.md.landscapes.words import describe
from ffpretrain.potential import Potential
from ffpretrain.units import KCAL_PER_MOL


@pytest.fixture(scope="module")
def ethanol() -> Atoms:
    return ase.build.molecule("CH3CH2OH")


@pytest.fixture(scope="module")
def potential() -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Potential(create_backbone("painn", hidden=32, layers=2), elements=[1, 6, 8]).double()


class Well(Calculator):
    """Harmonic about given positions: E = k/2 |x - x0|^2."""

    implemented_properties = ("energy", "forces")

    def __init__(self, centre: np.ndarray, k: float = 2.0) -> None:
        super().__init__()
        self.centre, self.k, self.calls = centre, k, 0

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:  # type: ignore[no-untyped-def]
        super().calculate(atoms, properties, system_changes)
        off = self.atoms.positions - self.centre
        self.calls += 1
        self.results = {"energy": 0.5 * self.k * float(np.square(off).sum()), "forces": -self.k * off}


def on_line(energies: np.ndarray, values: np.ndarray | None = None) -> Landscape:
    values = np.linspace(-1.0, 1.0, len(energies)) if values is None else values
    atoms = Atoms("H")
    positions = np.zeros((len(values), 1, 3))
    positions[:, 0, 0] = values
    return Landscape(Geometries(atoms, (Axis("x", "Å", values),), positions, "line"), "test", energies)


# grids


def test_a_random_plane_has_no_rigid_motion_and_is_orthonormal(ethanol: Atoms) -> None:
    grid = random_plane(ethanol, points=5, extent=0.2, seed=3)
    assert grid.shape == (5, 5)
    assert np.allclose(grid.positions[2, 2], ethanol.positions)
    steps = np.array([grid.positions[3, 2], grid.positions[2, 3]]) - ethanol.positions
    rms = np.sqrt(np.square(steps).sum((1, 2)) / len(ethanol))
    assert np.allclose(rms, grid.axes[0].values[3] - grid.axes[0].values[2])
    assert abs(np.sum(steps[0] * steps[1])) < 1e-12
    masses = np.ones(len(ethanol))
    for step in steps:
        assert np.allclose(step.sum(0), 0, atol=1e-12)
        off = ethanol.positions - ethanol.positions.mean(0)
        assert np.allclose((masses[:, None] * np.cross(off, step)).sum(0), 0, atol=1e-12)


def test_the_seed_decides_the_plane(ethanol: Atoms) -> None:
    one, same, other = (random_plane(ethanol, 3, seed=seed).positions for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)


def test_a_crystal_keeps_its_rotations_and_a_line_has_two() -> None:
    assert len(rigid_motions(ase.build.bulk("Cu", cubic=True))) == 3
    assert len(rigid_motions(Atoms("CO2", [[0, 0, 0], [0, 0, 1.2], [0, 0, -1.2]]))) == 5


def test_rigid_scans_set_what_they_say_and_keep_the_rest(ethanol: Atoms) -> None:
    grid = rigid_scan(
        ethanol, [parse_coordinate("dihedral 0 1 2 3 -90 90 4"), parse_coordinate("bond 0 1 1.3 1.7 3")]
    )
    assert grid.shape == (4, 3)
    frames = grid.structures()
    for i, angle in enumerate(grid.axes[0].values):
        for j, length in enumerate(grid.axes[1].values):
            frame = frames[i * 3 + j]
            assert frame.get_dihedral(0, 1, 2, 3) % 360 == pytest.approx(angle % 360)
            assert frame.get_distance(0, 1) == pytest.approx(length)
            assert frame.get_distance(1, 2) == pytest.approx(ethanol.get_distance(1, 2))


def test_an_angle_scan(ethanol: Atoms) -> None:
    grid = rigid_scan(ethanol, [parse_coordinate("angle 0 1 2 100 120 3")])
    assert [frame.get_angle(0, 1, 2) for frame in grid.structures()] == pytest.approx([100, 110, 120])


class Springs(Calculator):
    """A spring between every two atoms, so that turning and shifting the molecule costs nothing."""

    implemented_properties = ("energy", "forces")

    def __init__(self, atoms: Atoms) -> None:
        super().__init__()
        self.rest = atoms.get_all_distances() + np.eye(len(atoms))

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:  # type: ignore[no-untyped-def]
        super().calculate(atoms, properties, system_changes)
        x = self.atoms.positions
        off = x[:, None] - x
        length = np.linalg.norm(off, axis=2) + np.eye(len(x))
        pull = (length - self.rest) / length
        energy = 0.25 * float(np.square(length - self.rest).sum())
        self.results = {"energy": energy, "forces": -(pull[:, :, None] * off).sum(1)}


def test_a_relaxed_scan_leaves_forces_along_the_held_bond_alone(ethanol: Atoms) -> None:
    start = ethanol.copy()
    start.rattle(0.05, seed=1)
    springs = Springs(ethanol)
    coordinate = parse_coordinate("bond 0 1 1.45 1.6 3")
    grid, unfinished = relaxed_scan(start, [coordinate], springs, fmax=0.001)
    assert unfinished == 0
    rigid = rigid_scan(start, [coordinate])
    for relaxed, stiff, length in zip(grid.structures(), rigid.structures(), coordinate.values, strict=True):
        assert relaxed.get_distance(0, 1) == pytest.approx(length, abs=1e-5)
        relaxed.calc = stiff.calc = springs
        assert relaxed.get_potential_energy() < stiff.get_potential_energy()
        forces = relaxed.get_forces()
        assert np.abs(forces[2:]).max() < 0.002
        axis = relaxed.get_distance(0, 1, vector=True) / length
        assert np.abs(forces[0] - (forces[0] @ axis) * axis).max() < 0.002
        assert abs(forces[0] @ axis) > 0.02


def test_modes_and_planes_through_conformations(ethanol: Atoms) -> None:
    modes = np.random.default_rng(0).normal(size=(4, len(ethanol), 3))
    line = modes_plane(ethanol, modes, [2], points=3, extent=0.1)
    moved = line.positions[2] - ethanol.positions
    assert np.allclose(moved / np.linalg.norm(moved), modes[2] / np.linalg.norm(modes[2]))
    assert np.sqrt(np.square(moved).sum() / len(ethanol)) == pytest.approx(0.1)
    others = []
    for seed in (1, 2):
        other = ethanol.copy()
        other.rattle(0.1, seed=seed)
        other.rotate(40 * seed, "xyz")
        others.append(other)
    grid = plane_through([ethanol, *others], points=9)
    flat = (grid.positions - ethanol.positions).reshape(81, -1)
    for other in others:
        wanted = (superimposed(other, ethanol) - ethanol.positions).ravel()
        basis = np.linalg.svd(flat, full_matrices=False)[2][:2]
        assert np.allclose(basis.T @ (basis @ wanted), wanted, atol=1e-9)


def test_superimposed_undoes_a_rotation(ethanol: Atoms) -> None:
    turned = ethanol.copy()
    turned.rotate(77, (1, 2, 3))
    turned.translate((1, 2, 3))
    assert np.allclose(superimposed(turned, ethanol), ethanol.positions, atol=1e-10)


def test_principal_components_hold_a_planar_trajectory(ethanol: Atoms) -> None:
    plane = random_plane(ethanol, 5, 0.02, seed=5)
    frames = [Atoms(ethanol.numbers, p) for p in plane.positions.reshape(-1, len(ethanol), 3)]
    grid, path = principal_plane(frames, points=7)
    assert path.shape == (25, 2)
    spread = np.square(path).sum() * len(ethanol)
    aligned = np.array([superimposed(f, grid.atoms) for f in frames])
    assert spread == pytest.approx(np.square(aligned - grid.atoms.positions).sum(), rel=1e-3)


def test_a_band_finds_the_saddle_of_an_inversion() -> None:
    start = ase.build.molecule("NH3")
    end = start.copy()
    end.positions[:, 2] *= -1
    springs = Springs(start)
    band, converged = minimum_energy_path(start, end, springs, images=5, fmax=0.002)
    assert converged
    (found,) = landscape(springs, geometries=band)
    # flat, with N-H r and H-H sqrt(3) r, the energy is lowest at r = (a + sqrt(3) b) / 4
    a, b = start.get_distance(0, 1), start.get_distance(1, 2)
    r = (a + np.sqrt(3) * b) / 4
    assert found.energies.argmax() == 2
    saddle = 1.5 * ((r - a) ** 2 + (np.sqrt(3) * r - b) ** 2)
    assert found.energies.max() - found.energies.min() == pytest.approx(saddle, rel=1e-3)
    assert np.all(np.diff(band.axes[0].values) > 0)


def test_free_energy_of_a_harmonic_variable() -> None:
    x = np.random.default_rng(0).normal(0.0, 0.1, 400_000)
    (centres,), energy, errors = free_energy(x, temperature=300.0, bins=41)
    near = np.abs(centres) < 0.15
    kT = 8.617333262e-5 * 300
    wanted = kT * np.square(centres) / (2 * 0.1**2)
    assert np.allclose(energy[near] - energy[near].min(), wanted[near] - wanted[near].min(), atol=0.06 * kT)
    # frames of no correlation: the counts of two bins are known to their square roots
    counts = np.histogram(x, 41)[0]
    known = kT * np.sqrt(1 / counts[near] + 1 / counts.max())
    lowest = counts[near] == counts.max()
    assert np.allclose(errors[near][~lowest], known[~lowest], rtol=0.25) and errors[near][lowest] == 0
    assert np.isnan(free_energy(np.array([0.0, 1.0]), 300.0, bins=10)[1]).sum() == 8
    assert free_energy(np.zeros((5, 2)), 300.0, bins=3)[1].shape == (3, 3)


def test_collective_variables(ethanol: Atoms) -> None:
    found = collective_variable([ethanol], "dihedral 0 1 2 3")
    assert found[0] % 360 == pytest.approx(ethanol.get_dihedral(0, 1, 2, 3))
    assert -180 <= found[0] <= 180
    assert collective_variable([ethanol], "bond 0 1")[0] == pytest.approx(ethanol.get_distance(0, 1))
    for text in ("bond 0", "twist 0 1", "bond 0 99"):
        with pytest.raises(ConfigError):
            collective_variable([ethanol], text)


# energies


def test_energies_and_forces_are_those_of_direct_calls(ethanol: Atoms, potential: Potential) -> None:
    calculator = FFCalculator(potential, "cpu", dtype="float64", on_unfamiliar="ignore")
    (found,) = landscape(calculator, ethanol, points=4, extent=0.1)
    for place in np.ndindex(4, 4):
        atoms = Atoms(ethanol.numbers, found.geometries.positions[place], calculator=calculator)
        assert found.energies[place] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert np.allclose(found.forces[place], atoms.get_forces(), atol=1e-9)


def test_any_calculator_serves_and_references_are_compared(ethanol: Atoms) -> None:
    well = Well(ethanol.positions)
    (found,) = landscape(well, ethanol, points=5, extent=0.1, reference=Well(ethanol.positions, 3.0))
    x, y = (axis.values for axis in found.axes)
    n = len(ethanol)
    assert np.allclose(found.energies, n * (x[:, None] ** 2 + y**2), atol=1e-12)
    (difference,) = found.errors().values()
    assert difference == pytest.approx(np.sqrt(np.mean(np.square(0.5 * found.energies))))


def test_energies_alone_are_the_same_and_say_what_is_missing(
    ethanol: Atoms, potential: Potential, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, alone = (
        landscape(potential, ethanol, points=5, forces=forces, dtype="float64")[0] for forces in (True, False)
    )
    assert np.allclose(full.energies, alone.energies, rtol=0, atol=1e-9)
    assert alone.forces is None and full.forces is not None
    of_forces = ("force_consistency", "difference_error")
    kept = {name: value for name, value in full.roughness.items() if name not in of_forces}
    assert alone.roughness == pytest.approx(kept, abs=1e-7)
    words = ["landscape", "ndem-ethanol", "--points", "3", "--no-forces", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert "force_consistency not computed" in capsys.readouterr().out
    with np.load(tmp_path / "landscape.npz") as content:
        assert "forces_eV_per_angstrom" not in content
    (model,) = json.loads((tmp_path / "landscape.json").read_text())["models"]
    assert model["roughness"]["force_consistency"] is None
    assert "not computed" in (tmp_path / "landscape.html").read_text()


def test_references_cost_no_forces(ethanol: Atoms) -> None:
    class WithoutForces(Well):
        implemented_properties = ("energy",)

        def calculate(self, *args: object) -> None:
            super().calculate(*args)
            del self.results["forces"]

    well = WithoutForces(ethanol.positions)
    (found,) = landscape(Well(ethanol.positions), ethanol, points=3, reference=well)
    assert np.array_equal(found.references["withoutforces"], found.energies)
    (alone,) = landscape(well, ethanol, points=3, forces=False)
    assert np.array_equal(alone.energies, found.energies)


def test_several_models_share_the_grid(ethanol: Atoms, potential: Potential) -> None:
    one, two = landscape([potential, Well(ethanol.positions)], ethanol, points=3)
    assert np.array_equal(one.geometries.positions, two.geometries.positions)
    assert not np.allclose(one.energies, two.energies)


def test_a_stopped_evaluation_goes_on(
    ethanol: Atoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK", 5)
    monkeypatch.setattr(evaluation, "_SAVE_EVERY", -1.0)
    grid, state = random_plane(ethanol, 5), tmp_path / "state.npz"
    well = Well(ethanol.positions)

    def stop(done: int) -> None:
        if done >= 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(grid, evaluation.evaluator(well), state, stop)
    assert state.is_file()
    before = well.calls
    found = evaluation.evaluate(grid, evaluation.evaluator(well), state)
    # what was saved is not computed again, but for the structure that passes the gate
    assert well.calls - before == 25 - 10 + 1
    assert not state.exists()
    fresh = evaluation.evaluate(grid, evaluation.evaluator(Well(ethanol.positions)))
    assert np.array_equal(found.energies, fresh.energies)
    assert np.array_equal(found.forces, fresh.forces)


# roughness


def test_roughness_of_a_parabola() -> None:
    x = np.linspace(-1.0, 1.0, 41)
    numbers = roughness(on_line(1.5 * (x - 0.25) ** 2, x))
    assert numbers["tortuosity"] == pytest.approx(1.0)
    assert numbers["energy_jump"] == 0
    assert numbers["force_flips"] == 1
    assert numbers["minimum_offset"] == pytest.approx(0.25)
    assert numbers["curvature"] == pytest.approx(3.0)


def test_roughness_of_a_sine() -> None:
    x = np.linspace(0.0, 1.0, 401)
    line = np.sin(4 * np.pi * x)
    # up 1, down 2, up 2, down 2, up 1; the shortest way down to -1 and up again is 2
    assert tortuosity(line) == pytest.approx(4.0, rel=1e-3)
    assert slope_changes(line) == 4
    assert energy_jump(line) == 0


def test_energy_jump_counts_only_steps_against_both_neighbours() -> None:
    assert energy_jump(np.array([0.0, 1.0, 0.7, 2.0, 3.0])) == pytest.approx(0.3)
    assert energy_jump(np.array([3.0, 2.0, 1.0, 2.0, 3.0])) == 0


def test_force_consistency_sees_forces_that_are_no_gradient(ethanol: Atoms) -> None:
    (found,) = landscape(Well(ethanol.positions), ethanol, points=9, extent=0.1)
    # differences of a parabola are exact
    assert found.roughness["force_consistency"] < 1e-9
    wrong = replace(found, forces=0.9 * found.forces)
    x, y = (axis.values for axis in found.axes)
    slope = 2 * len(ethanol) * 0.1
    inner = [np.tile(x[1:-1], len(y)), np.tile(y[1:-1], len(x))]
    wanted = np.sqrt(np.mean(np.square(slope * np.concatenate(inner))))
    assert roughness(wrong)["force_consistency"] == pytest.approx(wanted, rel=1e-6)


def test_what_the_spacing_explains_of_force_consistency() -> None:
    x = np.linspace(-1.0, 1.0, 21)
    forces = np.zeros((21, 1, 3))
    forces[:, 0, 0] = -3 * x**2
    cubic = replace(on_line(x**3, x), forces=forces)
    # central differences of a cubic are off by the square of the spacing, and so is the estimate
    numbers = roughness(cubic)
    assert numbers["force_consistency"] == pytest.approx(0.01)
    assert numbers["difference_error"] == pytest.approx(0.01)
    assert "says nothing against the forces" in describe([replace(cubic, roughness=numbers)], "eV")[0]
    wrong = replace(cubic, forces=forces + 0.5)
    numbers = roughness(wrong)
    # the error of the forces does not change with the spacing
    assert numbers["force_consistency"] == pytest.approx(0.51, abs=0.01)
    assert numbers["difference_error"] == pytest.approx(0.01, rel=0.1)
    assert "explains about 0.01 of it" in describe([replace(wrong, roughness=numbers)], "eV")[0]


def test_differences_on_uneven_spacing_are_exact_for_parabolas() -> None:
    x = np.array([-1.0, -0.7, -0.1, 0.2, 0.9, 1.0])
    forces = np.zeros((6, 1, 3))
    forces[:, 0, 0] = -4 * x
    numbers = roughness(replace(on_line(2 * x**2, x), forces=forces))
    assert numbers["force_consistency"] < 1e-12


def test_grids_too_small_to_judge_say_so(ethanol: Atoms) -> None:
    (three,) = landscape(Well(ethanol.positions), ethanol, points=3)
    assert "difference_error" not in three.roughness
    assert "not to be judged: fewer than 5 points" in describe([three], "eV")[0]
    (two,) = landscape(Well(ethanol.positions), ethanol, scan=["bond 0 1 1.4 1.6 2"])
    assert two.roughness == {}


# units


@pytest.mark.parametrize(("unit", "size"), [("eV", 1.0), ("kcal/mol", KCAL_PER_MOL)])
def test_terminal_and_page_give_every_energy_in_the_figures_unit(
    unit: str, size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["landscape", "ndem-ethanol", "--points", "7", "--unit", unit, "--reference", "mmff"]
    pytest.importorskip("rdkit")
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    model = json.loads((tmp_path / "landscape.json").read_text())["models"][0]
    rough = model["roughness"]
    assert f"range {model['range'] / size:.4g} {unit}, tortuosity {rough['tortuosity']:.4g}, " in said
    assert f"energy_jump {rough['energy_jump'] / size:.4g} {unit}, force_flips " in said
    assert f"minimum_offset {rough['minimum_offset']:.4g} Å RMS, " in said
    assert f"curvature {rough['curvature'] / size:.4g} {unit} per (Å RMS)², " in said
    assert f"force_consistency {rough['force_consistency'] / size:.4g} {unit} per Å RMS (" in said
    ((name, difference),) = model["rms_difference_to"].items()
    assert f"RMS difference to {name}: {difference / size:.4g} {unit}" in said
    page = (tmp_path / "landscape.html").read_text()
    cell = f'<td class="number">{rough["curvature"] / size:.4g}</td>'
    assert f"<td>curvature ({unit} per (Å RMS)²)</td>{cell}" in page
    other = "eV" if unit == "kcal/mol" else "kcal"
    assert other not in said and other not in page


def test_axes_of_different_units_are_not_mixed_up(ethanol: Atoms) -> None:
    scan = ["dihedral 0 1 2 3 0 60 5", "bond 0 1 1.4 1.6 5"]
    (found,) = landscape(Well(ethanol.positions), ethanol, scan=scan)
    (said,) = describe([found], "eV")
    assert "eV per (unit of the axes)²" in said and " units of the axes, " in said


# figures and files


def test_figures_show_what_they_say(ethanol: Atoms) -> None:
    found = landscape([Well(ethanol.positions), Well(ethanol.positions, 4.0)], ethanol, points=5)
    figure = draw(found, "eV", path=np.array([[0.0, 0.0], [0.1, 0.05]]))
    first, second, bar = figure.axes
    assert first.get_xlabel() == "direction 1 (Å RMS)"
    assert bar.get_ylabel() == "energy (eV)"
    top = max(float(one.relative().max()) for one in found)
    for axis, one in zip((first, second), found, strict=True):
        mesh = axis.collections[0]
        assert np.allclose(mesh.get_array().reshape(5, 5), one.relative().T)
        assert mesh.get_clim() == (0, pytest.approx(top))
        # the path twice, dark on light, and the cross at the minimum
        assert len(axis.lines) == 3
    curve = draw([on_line(np.array([1.0, 0.0, 2.0]))], "eV").axes[0]
    assert curve.lines[0].get_ydata().tolist() == [1.0, 0.0, 2.0]


def test_files_hold_the_same_numbers(ethanol: Atoms, tmp_path: Path) -> None:
    (found,) = landscape(Well(ethanol.positions), ethanol, points=5, out=tmp_path, unit="eV")
    names = {"landscape.png", "landscape.svg", "landscape.pdf", "landscape.html", "landscape.npz"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "landscape.json"}
    with np.load(tmp_path / "landscape.npz", allow_pickle=False) as content:
        assert np.array_equal(content["energies_eV"], found.energies)
        assert np.array_equal(content["forces_eV_per_angstrom"], found.forces)
    text = (tmp_path / "landscape.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    (embedded,) = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    data = json.loads(embedded)
    assert np.allclose(data["energies"], found.relative().ravel(), atol=1e-6)
    assert len(data["frames"]) == 25
    summary = json.loads((tmp_path / "landscape.json").read_text())
    assert summary["schema"] == "ffpretrain-landscape"
    assert summary["models"][0]["roughness"] == found.roughness


def test_a_folder_is_read_as_it_was_written(ethanol: Atoms, tmp_path: Path) -> None:
    plane = random_plane(ethanol, 5)
    noisy = Geometries(ethanol, plane.axes, plane.positions, "learned plane", "a note", np.arange(9.0))
    wells, trail = [Well(ethanol.positions), Well(ethanol.positions, 3.0)], np.array([[0.0, 0.1], [0.1, 0.0]])
    written = landscape(
        wells, geometries=noisy, reference=Well(ethanol.positions, 5.0), path=trail, out=tmp_path, unit="eV"
    )
    found, unit, path = read_folder(tmp_path)
    assert unit == "eV" and np.array_equal(path, trail)
    for one, other in zip(found, written, strict=True):
        assert one.label == other.label and one.roughness == other.roughness
        assert [axis.name for axis in one.axes] == [axis.name for axis in other.axes]
        assert np.array_equal(one.axes[1].values, other.axes[1].values)
        assert np.array_equal(one.energies, other.energies) and np.array_equal(one.forces, other.forces)
        assert one.errors() == other.errors() and list(one.references) == ["well"]
        assert np.array_equal(one.geometries.atoms.positions, ethanol.positions)
        assert np.array_equal(one.geometries.noise, np.arange(9.0)) and one.geometries.note == "a note"
        assert np.array_equal(one.response, other.response)


def test_large_grids_are_thinned_in_the_page_only(ethanol: Atoms) -> None:
    grid = random_plane(ethanol, points=101)
    energies = np.arange(101.0**2).reshape(101, 101)
    data = viewer_data(Landscape(grid, "test", energies), "eV")
    assert len(data["energies"]) == 101**2
    assert len(data["frames"]) <= MOST_FRAMES
    stride = 3
    for i, j in ((0, 0), (50, 7), (100, 100)):
        frame = np.array(data["frames"][data["frameOf"][i * 101 + j]]).reshape(-1, 3)
        near = grid.positions[stride * min(round(i / stride), 33), stride * min(round(j / stride), 33)]
        assert np.allclose(frame, near - near.mean(0), atol=1e-3)


# bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("twist 0 1 2", "give 'bond"),
        ("bond 0 1", "give 'bond"),
        ("bond 0 x 1.0 2.0 5", "give 'bond"),
        ("bond 0 1 2.0 1.0 5", "smaller to a larger"),
        ("dihedral 0 1 2 3 0 90 1", "at least 2 points"),
    ],
)
def test_words_that_are_no_coordinate(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_coordinate(text)


@pytest.mark.parametrize(
    ("scan", "kind", "message"),
    [
        ("bond 0 99 1 2 3", ConfigError, "0 to 8"),
        ("bond 1 1 1 2 3", ConfigError, "twice"),
        ("bond 0 2 1 2 3", UnsupportedInputError, "not bonded"),
        ("angle 0 1 2 0 180 3", ConfigError, "between 0 and 180"),
        ("bond 0 1 -1 2 3", ConfigError, "above zero"),
    ],
)
def test_scans_that_cannot_be(scan: str, kind: type[Exception], message: str, ethanol: Atoms) -> None:
    with pytest.raises(kind, match=message):
        rigid_scan(ethanol, [parse_coordinate(scan)])


def test_rings_and_straight_angles_are_refused() -> None:
    benzene = ase.build.molecule("C6H6")
    with pytest.raises(UnsupportedInputError, match="ring"):
        rigid_scan(benzene, [Coordinate("dihedral", (0, 1, 2, 3), np.array([0.0, 30.0]))])
    straight = Atoms("CO2", [[0, 0, 0], [0, 0, 1.16], [0, 0, -1.16]])
    with pytest.raises(UnsupportedInputError, match="on a line"):
        rigid_scan(straight, [Coordinate("angle", (1, 0, 2), np.array([100.0, 120.0]))])
    with pytest.raises(UnsupportedInputError, match="molecules"):
        rigid_scan(ase.build.bulk("Cu", cubic=True), [Coordinate("bond", (0, 1), np.array([1.0, 2.0]))])
    with pytest.raises(UnsupportedInputError, match="3 atoms"):
        random_plane(Atoms("H2", [[0, 0, 0], [0, 0, 0.7]]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-model"], "no-such-model"),
        (["ndem-ethanol", "--points", "2"], "at least 3"),
        (["ndem-ethanol", "--extent", "0"], "above zero"),
        (["ndem-ethanol", "--unit", "hartree"], "give one of"),
        (["ndem-ethanol", "--scan", "bond 0 99 1 2 3"], "0 to 8"),
        (["ndem-ethanol", "--relaxed"], "give scan"),
        (["ndem-ethanol", "--structure", "missing.xyz"], "missing.xyz"),
        (["ndem-ethanol", "--reference", "no-such-engine"], "no-such-engine"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["landscape", *words, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_command_draws_a_named_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["landscape", "ndem-ethanol", "--points", "5", "--out", str(out), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["models"][0]["label"] == "ndem-ethanol"
    assert (out / "landscape.png").is_file()


def test_a_metal_by_an_ase_calculator() -> None:
    (found,) = landscape(EMT(), ase.build.bulk("Cu", cubic=True), points=3, extent=0.05)
    assert found.energies[1, 1] == found.energies.min()
