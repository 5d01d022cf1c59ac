"""Grids in words, labelled frames, free energies, resumed relaxed scans, sizes, MMFF94."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import CalculatorSetupError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import FIRE as ASEFIRE

from ffpretrain.artifacts import read_card
from ffpretrain.cli import main
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.engines import open_engine
from ffpretrain.errors import ConfigError, DataError, UnsupportedInputError
from ffpretrain.md import landscape
from ffpretrain.md.landscapes import (
    along,
    collective_variable,
    free_energy_landscape,
    minimum_energy_path,
    parse_coordinate,
    random_plane,
    relaxed_scan,
    rigid_scan,
)
from ffpretrain.md.landscapes.evaluate import evaluator
from ffpretrain.md.landscapes.figures import draw, label_heights
from ffpretrain.md.landscapes.fire import Fire
from ffpretrain.md.landscapes.labels import coordinates_of, label_frames
from ffpretrain.md.landscapes.minima import relax
from ffpretrain.md.landscapes.page import MOST_POINTS, viewer_data
from ffpretrain.md.landscapes.planes import superimposed
from ffpretrain.md.landscapes.surface import Landscape
from ffpretrain.units import KCAL_PER_MOL


def rattled(atoms: Atoms, count: int, size: float = 0.05) -> list[Atoms]:
    found = []
    for seed in range(count):
        one = atoms.copy()
        one.rattle(size, seed=seed)
        found.append(one)
    return found


# grids in words


def test_modes_are_taken_at_the_minimum(ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    calculator = springs(ethanol)
    grid, path = along("modes 0 3", rattled(ethanol, 1)[0], lambda: calculator, points=5, extent=0.05)
    assert path is None
    (found,) = landscape(calculator, geometries=grid)
    assert found.energies[2, 2] == found.energies.min()
    assert "mode 0" in grid.note and "1/cm" in grid.note
    # the softer mode is the softer direction
    assert found.energies[0, 2] < found.energies[2, 0]
    off = superimposed(grid.atoms, ethanol) - ethanol.positions
    assert np.abs(off).max() < 0.01


def test_a_trajectory_and_conformations_from_files(ethanol: Atoms, springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "t.extxyz"
    ase.io.write(file, rattled(ethanol, 6))
    grid, path = along(f"trajectory {file}", ethanol, lambda: springs(ethanol), points=5)
    assert grid.kind == "principal components"
    assert path is not None and path.shape == (6, 2)
    ase.io.write(file, rattled(ethanol, 3))
    assert along(f"conformations {file}", ethanol, lambda: springs(ethanol), points=4)[0].shape == (4, 4)
    with pytest.raises(DataError, match="no such file"):
        along("trajectory missing.traj", ethanol, lambda: springs(ethanol))


def test_a_band_starts_and_ends_at_minima(springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start = ase.build.molecule("NH3")
    calculator = springs(start)
    end = start.copy()
    end.positions[:, 2] *= -1
    ase.io.write(tmp_path / "end.xyz", rattled(end, 1, 0.03)[0])
    grid, _ = along(f"band {tmp_path / 'end.xyz'}", rattled(start, 1, 0.03)[0], lambda: calculator)
    (found,) = landscape(calculator, geometries=grid)
    assert found.energies[[0, -1]] == pytest.approx([0, 0], abs=1e-3)
    assert found.energies.argmax() == 5
    ase.io.write(tmp_path / "same.xyz", rattled(start, 2, 0.03)[1])
    with pytest.raises(UnsupportedInputError, match="relax to one minimum"):
        along(f"band {tmp_path / 'same.xyz'}", start, lambda: calculator)
    ends = [relax(one, calculator) for one in (start, end)]
    wanted, _ = minimum_energy_path(ends[0], ends[1], calculator, images=11)
    (again,) = landscape(calculator, geometries=wanted)
    assert found.energies.max() == pytest.approx(again.energies.max(), rel=0.02)


class Bars:
    """Takes the place of the bars on a terminal and keeps what they were told."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[int | None, list[int]]] = {}

    @contextmanager
    def __call__(self, title: str, total: int | None) -> Iterator[Callable[[int], object]]:
        _, seen = self.told.setdefault(title, (total, []))
        yield seen.append


def test_every_long_step_of_a_grid_shows_its_progress(ethanol: Atoms, springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bars, start = Bars(), rattled(ethanol, 1)[0]
    along("modes 0", start, lambda: springs(ethanol), points=5, bar=bars)
    total, steps = bars.told["relax"]
    assert total is None and steps == list(range(len(steps))) and len(steps) > 2
    total, done = bars.told["force constants"]
    assert total == 6 * len(ethanol) and done[-1] == total and len(done) > 1
    bars, ammonia = Bars(), ase.build.molecule("NH3")
    end = ammonia.copy()
    end.positions[:, 2] *= -1
    ase.io.write(tmp_path / "end.xyz", end)
    along(f"band {tmp_path / 'end.xyz'}", rattled(ammonia, 1)[0], lambda: springs(ammonia), bar=bars)
    assert list(bars.told) == ["read end.xyz", "relax the start", "relax the end", "band"]
    assert bars.told["read end.xyz"] == (1, [1])
    assert len(bars.told["relax the start"][1]) > 2 and len(bars.told["band"][1]) > 1


@pytest.mark.parametrize("words", ["", "modes", "modes x", "trajectory", "spiral 1"])
def test_other_words_are_refused(words: str, ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="'modes K"):
        along(words, ethanol, lambda: springs(ethanol))


def test_one_kind_of_grid_at_a_time(ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="scan and along"):
        landscape(springs(ethanol), ethanol, scan=["bond 0 1 1.4 1.6 3"], along="modes 0")


# relaxed scans go on


def test_a_stopped_relaxed_scan_goes_on(ethanol: Atoms, springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    calculator, state = springs(ethanol), tmp_path / "state.npz"
    coordinate = parse_coordinate("bond 0 1 1.45 1.6 4")

    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relaxed_scan(ethanol, [coordinate], calculator, progress=stop, state=state)
    seen: list[int] = []
    found, _ = relaxed_scan(ethanol, [coordinate], calculator, progress=seen.append, state=state)
    assert seen == [3, 4]
    assert not state.exists()
    fresh, _ = relaxed_scan(ethanol, [coordinate], calculator)
    assert np.array_equal(found.positions, fresh.positions)


def test_the_state_of_another_scan_is_not_used(ethanol: Atoms, springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    calculator, state = springs(ethanol), tmp_path / "state.npz"

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    words = "bond 0 1 1.45 1.6 3"
    with pytest.raises(KeyboardInterrupt):
        relaxed_scan(ethanol, [parse_coordinate(words)], calculator, progress=stop, state=state, identity="a")
    seen: list[int] = []
    relaxed_scan(
        ethanol, [parse_coordinate(words)], calculator, progress=seen.append, state=state, identity="b"
    )
    assert seen == [1, 2, 3]
    state.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataError, match="remove it to start anew"):
        relaxed_scan(ethanol, [parse_coordinate(words)], calculator, state=state)


# bands go on


@pytest.fixture
def inversion(tmp_path: Path, springs) -> tuple[Atoms, Atoms]:  # type: ignore[no-untyped-def]
    """Ammonia and its mirror image, both a little off their minima."""
    start = ase.build.molecule("NH3")
    end = start.copy()
    end.positions[:, 2] *= -1
    return rattled(start, 1, 0.03)[0], rattled(end, 2, 0.03)[1]


def test_fire_takes_the_steps_of_ase(ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    theirs = rattled(ethanol, 1, 0.2)[0]
    theirs.calc = springs(ethanol)
    ours, fire = theirs.copy(), Fire(np.zeros_like(theirs.positions))
    ours.calc = springs(ethanol)
    for _ in range(60):
        ours.positions += fire.step(ours.get_forces())
    ASEFIRE(theirs, logfile=None).run(fmax=0.0, steps=60)
    # both ways of the algorithm were taken
    assert fire.downhill < 59 and fire.dt != 0.1
    assert np.allclose(ours.positions, theirs.positions, rtol=0, atol=1e-9)


def test_a_stopped_band_goes_on_to_the_last_bit(
    inversion: tuple[Atoms, Atoms],
    springs,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    calculator, state = springs(ase.build.molecule("NH3")), tmp_path / "state.npz"
    start, end = (relax(one, calculator) for one in inversion)

    def stop(done: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    options = {"images": 5, "fmax": 0.002}
    with pytest.raises(KeyboardInterrupt):
        minimum_energy_path(start, end, calculator, **options, progress=stop, state=state)
    seen: list[int] = []
    found, converged = minimum_energy_path(
        start, end, calculator, **options, progress=seen.append, state=state
    )
    every: list[int] = []
    fresh, _ = minimum_energy_path(start, end, calculator, **options, progress=every.append)
    assert converged and every[-1] > 20
    assert seen == every[12:]
    assert not state.exists()
    assert np.array_equal(found.positions, fresh.positions)


def test_the_state_of_another_band_is_not_used(
    inversion: tuple[Atoms, Atoms],
    springs,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    calculator, state = springs(ase.build.molecule("NH3")), tmp_path / "state.npz"
    seen: list[int] = []

    def stop_later(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    for changed in ({}, {"images": 4}, {"fmax": 0.3}, {"identity": "other"}, {"steps": 4}):
        for options in ({}, changed):
            seen.clear()
            with pytest.raises(KeyboardInterrupt):
                minimum_energy_path(
                    *inversion, calculator, **{"images": 3, **options}, progress=stop_later, state=state
                )
        assert seen == ([1, 2] if changed else [3, 4]), changed
        state.unlink()


def test_a_stopped_command_relaxes_no_end_twice(
    inversion: tuple[Atoms, Atoms],
    springs,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, end = inversion
    ase.io.write(tmp_path / "end of it.xyz", end)
    calculator, calls, limit = springs(ase.build.molecule("NH3")), 0, 0
    calculate = calculator.calculate

    def counted(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        calculate(*args)

    monkeypatch.setattr(calculator, "calculate", counted)
    words = f"band {tmp_path / 'end of it.xyz'} images=5 fmax=0.002"
    (fresh,) = landscape(calculator, start, along=words)
    needed, calls = calls, 0
    limit = needed * 2 // 3
    with pytest.raises(KeyboardInterrupt):
        landscape(calculator, start, along=words, out=tmp_path / "out")
    limit, calls = 0, 0
    (found,) = landscape(calculator, start, along=words, out=tmp_path / "out")
    # a step of the band and the points of the landscape are the most that is computed twice
    assert calls <= needed - needed * 2 // 3 + 2 * 5 + 1
    assert np.array_equal(found.geometries.positions, fresh.geometries.positions)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("words", ["images=2", "images=two", "images=", "fmax=0", "fmax=nan", "fmax=x"])
def test_options_of_a_band_that_cannot_be(words: str, ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words.split("=")[0]):
        along(f"band missing.xyz {words}", ethanol, lambda: springs(ethanol))


def test_the_command_draws_the_way_from_trans_to_gauche(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = read_card("ndem-ethanol")
    assert card.reference_geometry is not None
    rest = card.reference_geometry.to_atoms()
    # the hydroxyl turned by hand
    trans, gauche = rigid_scan(rest, [parse_coordinate("dihedral 1 0 2 8 60 180 2")]).structures()[::-1]
    ase.io.write(tmp_path / "trans.xyz", trans)
    ase.io.write(tmp_path / "gauche.xyz", gauche)
    words = ["ndem-ethanol", "--structure", str(tmp_path / "trans.xyz"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="0"):
        main(["landscape", *words, "--along", f"band {tmp_path / 'gauche.xyz'} images=5 fmax=0.3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "band" and "not converged" not in result["note"]
    with np.load(tmp_path / "out" / "landscape.npz") as content:
        energies, positions = content["energies_eV"], content["positions_angstrom"]
    turned = collective_variable([Atoms(rest.numbers, one) for one in positions], "dihedral 1 0 2 8") % 360
    assert turned[0] == pytest.approx(180, abs=5) and turned[-1] == pytest.approx(62, abs=8)
    assert np.all(np.diff(turned) < 0)
    # a barrier of about 1 kcal/mol between conformers that differ by a tenth of one
    assert 0 < energies.argmax() < 4
    assert 0.5 < (energies.max() - energies[0]) / KCAL_PER_MOL < 2.0
    assert abs(energies[-1] - energies[0]) / KCAL_PER_MOL < 0.4


# what they load


def test_landscapes_load_nothing_that_trains() -> None:
    heavy = ("lightning", "torch_geometric", "torch._dynamo", "matplotlib.pyplot")
    code = (
        "import sys, ffpretrain.md.landscapes, ffpretrain.md.landscapes.page\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# labelled frames


def labelled(frames: list[Atoms], calculator, path: Path, shift: float = 0.0) -> Path:  # type: ignore[no-untyped-def]
    for frame in frames:
        frame.calc = calculator
        energy, forces = frame.get_potential_energy(), frame.get_forces()
        frame.calc = SinglePointCalculator(frame, energy=energy + shift, forces=forces)
    ase.io.write(path, frames)
    return path


def test_frames_lie_where_they_were_made(ethanol: Atoms) -> None:
    scan = rigid_scan(ethanol, [parse_coordinate("dihedral 0 1 2 3 0 300 4")])
    assert np.allclose(coordinates_of(scan.structures(), scan)[:, 0], [0, 100, 200, 300])
    plane = random_plane(ethanol, 5, 0.02)
    x, y = (axis.values for axis in plane.axes)
    wanted = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    turned = plane.structures()
    for one in turned:
        one.rotate(50, (1, 2, 3))
    # turned back only to second order in the displacements
    assert np.allclose(coordinates_of(turned, plane), wanted, atol=1e-3)


def test_the_error_on_frames_is_that_of_their_energies(ethanol: Atoms, springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    frames = random_plane(ethanol, 3, 0.05).structures()
    path = labelled(frames, springs(ethanol, 5.0), tmp_path / "f.extxyz", shift=-7.0)
    data, out, seen = open_dataset(path), tmp_path / "o", list[int]()
    (found,) = landscape(springs(ethanol, 4.0), ethanol, points=5, extent=0.05, labels=data, out=out)
    label_frames(data, found.geometries, evaluator(springs(ethanol, 4.0)), seen.append)
    assert seen == [len(data)]
    truth = np.array([frame.energy for frame in data])
    above = truth - truth.min()
    assert found.labels is not None
    assert found.errors()[found.labels.name] == pytest.approx(np.sqrt(np.mean((0.2 * above) ** 2)), rel=1e-3)
    assert np.allclose(label_heights(found), above, atol=1e-9)
    points = draw([found], "eV").axes[0].collections[-1]
    assert np.allclose(points.get_offsets(), found.labels.points)
    assert np.allclose(points.get_array(), above)
    with np.load(out / "landscape.npz") as content:
        assert np.array_equal(content["label_energies_eV"], truth)


def test_frames_of_another_molecule_are_refused(ethanol: Atoms, springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    water = ase.build.molecule("H2O")
    path = labelled([water], springs(water), tmp_path / "w.extxyz")
    with pytest.raises(DataError, match="frame 0 is not C2H6O"):
        landscape(springs(ethanol), ethanol, points=3, labels=open_dataset(path))


# free energy


def test_a_free_energy_is_a_landscape(ethanol: Atoms, tmp_path: Path) -> None:
    values = np.linspace(1.4, 1.6, 40)
    frames = rigid_scan(ethanol, [parse_coordinate("bond 0 1 1.4 1.6 40")]).structures()
    frames += frames[:8]
    found = free_energy_landscape(frames, ["bond 0 1"], 300.0, bins=5)
    kT = 8.617333262e-5 * 300
    # eight frames in every bin, sixteen in the first
    assert np.allclose(found.energies, [0, *[kT * np.log(2)] * 4], atol=1e-9)
    for place, atoms in enumerate(found.geometries.structures()):
        near = values[np.abs(values - found.axes[0].values[place]).argmin()]
        assert atoms.get_distance(0, 1) == pytest.approx(near)
    with pytest.raises(ConfigError, match="one or two"):
        free_energy_landscape(frames, [], 300.0)


def test_the_command_reads_a_free_energy_off_a_trajectory(
    ethanol: Atoms, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "t.extxyz", tmp_path / "out"
    frames = rigid_scan(ethanol, [parse_coordinate("bond 0 1 1.4 1.6 9")]).structures()
    ase.io.write(file, [*frames[:3], *frames[6:]])
    words = ["landscape", "--free-energy", str(file), "--scan", "bond 0 1", "--points", "9", "--json"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--out", str(out)])
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "free energy"
    with np.load(out / "landscape.npz") as content:
        assert np.isnan(content["energies_eV"]).sum() == 3
    assert "not sampled" in (out / "landscape.html").read_text()
    with pytest.raises(SystemExit, match="2"):
        main([*words, "ndem-ethanol", "--out", str(out)])
    assert "leave the models out" in capsys.readouterr().err


# sizes and scales


def test_a_grid_that_memory_would_not_hold_is_refused(ethanol: Atoms) -> None:
    with pytest.raises(ConfigError, match=r"GiB for the positions alone; give at most \d+ points"):
        random_plane(ethanol, points=20_001)
    words = "bond 0 1 1.4 1.6 30000"
    with pytest.raises(ConfigError, match="give at most"):
        rigid_scan(ethanol, [parse_coordinate(words), parse_coordinate("angle 0 1 2 100 120 30000")])


def test_the_page_of_a_large_grid_shows_every_second_point_and_says_so(ethanol: Atoms) -> None:
    grid = random_plane(ethanol, points=201)
    energies = np.arange(201.0**2).reshape(201, 201)
    data = viewer_data(Landscape(grid, "test", energies), "eV", top=1e5)
    assert data["thinned"] == 2
    assert len(data["energies"]) == 101**2 <= MOST_POINTS
    assert data["energies"][102] == energies[2, 2]
    assert data["top"] == 1e5
    assert len(data["frameOf"]) == 101**2


def test_references_are_maps_beside_the_model(ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    (found,) = landscape(
        springs(ethanol), ethanol, points=5, reference=springs(ethanol, 9.0), reference_label="R"
    )
    figure = draw([found], "eV")
    assert [axis.get_title() for axis in figure.axes[:2]] == [found.label, "R"]
    reference = found.references["R"]
    mesh = figure.axes[1].collections[0]
    assert np.allclose(mesh.get_array().reshape(5, 5), (reference - reference.min()).T)
    assert mesh.get_clim()[1] == pytest.approx((reference - reference.min()).max())


def test_models_of_one_name_are_told_apart(ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    found = landscape([springs(ethanol), springs(ethanol)], ethanol, points=3)
    assert [one.label for one in found] == ["springs (1)", "springs (2)"]


def test_a_band_has_no_place_for_frames(springs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    start = ase.build.molecule("NH3")
    end = start.copy()
    end.positions[:, 2] *= -1
    grid, _ = minimum_energy_path(start, end, springs(start), images=3, steps=1)
    with pytest.raises(ConfigError, match="no place on a path"):
        coordinates_of([start], grid)


def test_no_minimum_is_said(ethanol: Atoms, springs, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from ffpretrain.md.landscapes import minima

    monkeypatch.setattr(minima, "_STEPS", 1)
    with pytest.raises(UnsupportedInputError, match="no minimum found"):
        relax(rattled(ethanol, 1, 0.1)[0], springs(ethanol))


# MMFF94


def test_mmff_has_the_forces_of_its_energy_and_keeps_the_bonds() -> None:
    pytest.importorskip("rdkit")
    atoms = ase.build.molecule("CH3CH2OH")
    atoms.calc = open_engine("mmff").calculator
    atoms.rattle(0.02, seed=0)
    forces = atoms.get_forces()
    for i, k in ((0, 0), (2, 1), (5, 2)):
        energies = []
        for step in (1e-4, -1e-4):
            moved = atoms.copy()
            moved.calc = atoms.calc
            moved.positions[i, k] += step
            energies.append(moved.get_potential_energy())
        assert (energies[1] - energies[0]) / 2e-4 == pytest.approx(forces[i, k], abs=1e-5)
    stretched = atoms.copy()
    stretched.calc = atoms.calc
    stretched.set_distance(0, 1, 3.0, fix=0)
    # far beyond where bonds would be found, it still costs what a bond costs
    assert stretched.get_potential_energy() - atoms.get_potential_energy() > 100 * KCAL_PER_MOL


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (Atoms("H", [[0, 0, 0]], cell=[5, 5, 5], pbc=True), "set pbc to False"),
        (Atoms("OH", [[0, 0, 0], [0, 0, 0.97]]), "finds no bonds in HO|has no parameters"),
    ],
)
def test_mmff_says_what_it_cannot_do(atoms: Atoms, message: str) -> None:
    pytest.importorskip("rdkit")
    atoms.calc = open_engine("mmff").calculator
    with pytest.raises(CalculatorSetupError, match=message):
        atoms.get_potential_energy()
