"""Free energies and their errors against closed forms; what figures, page and files say of them."""

from __future__ import annotations

import json
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from ase import Atoms
from scipy.special import erf

from ffpretrain.cli import main
from ffpretrain.md.landscapes import (
    free_energy,
    free_energy_landscape,
    parse_coordinate,
    read_folder,
    rigid_scan,
    standard_error,
)
from ffpretrain.md.landscapes.figures import draw
from ffpretrain.md.landscapes.page import viewer_data
from ffpretrain.units import KB, KCAL_PER_MOL

KT = KB * 300.0


def wandering(length: int, time: float, runs: int, seed: int) -> np.ndarray:
    """Return runs ``[runs, length]`` of an Ornstein-Uhlenbeck process: exact steps in a harmonic well.

    Its stationary distribution is the standard normal one, its correlation time ``time`` steps.
    """
    rng = np.random.default_rng(seed)
    keep = np.exp(-1 / time)
    kicks = rng.normal(size=(length, runs)) * np.sqrt(1 - keep**2)
    found = np.empty((length, runs))
    found[0] = rng.normal(size=runs)
    for t in range(1, length):
        found[t] = keep * found[t - 1] + kicks[t]
    return found.T


def in_the_well(centres: np.ndarray) -> np.ndarray:
    """Return the free energy of bins of a standard normal variable in kT, exactly."""
    width = centres[1] - centres[0]
    edges = np.append(centres - width / 2, centres[-1] + width / 2) / np.sqrt(2)
    return -np.log(0.5 * np.diff(erf(edges)))


def test_the_error_of_a_mean_is_that_of_the_process() -> None:
    time, length = 20.0, 20_000
    keep = np.exp(-1 / time)
    # of an autoregressive process, up to terms of time / length
    known = np.sqrt((1 + keep) / (1 - keep) / length)
    runs = wandering(length, time, 40, seed=0)
    found = np.array([standard_error(run) for run in runs])
    assert found.mean() == pytest.approx(known, rel=0.1)
    assert found.std() / known < 0.25
    assert runs.mean(1).std() == pytest.approx(known, rel=0.25)
    # frames taken as independent would give an error six times too small
    assert runs[0].std() / np.sqrt(length) < known / 5


def test_an_error_is_not_told_from_too_few_blocks() -> None:
    assert np.isnan(standard_error(wandering(200, 100.0, 1, seed=0)[0]))
    assert np.isnan(standard_error(np.array([0.0, 1.0])))
    assert standard_error(np.ones(50)) == 0


def test_error_bars_cover_the_free_energy_of_a_harmonic_well_as_often_as_they_say() -> None:
    off: list[float] = []
    naive: list[float] = []
    for run in wandering(20_000, 20.0, 40, seed=1):
        (centres,), energies, errors = free_energy(run, 300.0, bins=21)
        exact, counts = in_the_well(centres), np.histogram(run, 21)[0]
        place = int(np.nanargmin(energies))
        assert energies[place] == 0 and errors[place] == 0
        seen = (counts > 0.01 * counts.sum()) & (np.arange(21) != place)
        assert np.isfinite(errors[seen]).all()
        difference = (energies - KT * (exact - exact[place]))[seen]
        off += list(np.abs(difference / errors[seen]))
        naive += list(np.abs(difference) / (KT * np.sqrt(1 / counts[seen] + 1 / counts[place])))
    assert len(off) > 400
    # one standard error covers 68 % of a normal variable, two 95 %; bins of a run are not independent
    assert 0.58 < np.mean(np.array(off) < 1) < 0.78
    assert 0.90 < np.mean(np.array(off) < 2) < 0.99
    # what frames taken as independent would cover
    assert np.mean(np.array(naive) < 1) < 0.45


def test_two_variables_have_errors_too() -> None:
    both = np.column_stack([*wandering(20_000, 5.0, 2, seed=2)])
    (x, y), energies, errors = free_energy(both, 300.0, bins=9)
    place = np.unravel_index(np.nanargmin(energies), energies.shape)
    exact = in_the_well(x)[:, None] + in_the_well(y)
    seen = (energies < 2.5 * KT) & (energies > 0)
    off = np.abs(energies - KT * (exact - exact[place]))[seen] / errors[seen]
    assert seen.sum() > 10
    assert np.mean(off < 1) > 0.4 and np.all(off < 4)
    assert np.isnan(errors[np.isnan(energies)]).all()


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    """Ethanol whose C-C bond wanders as above, 0.05 Å about 1.5 Å, and whose C-C-O angle is drawn anew."""
    bond = 1.5 + 0.05 * wandering(1500, 2.0, 1, seed=3)[0]
    angle = 109 + 4 * np.random.default_rng(4).normal(size=1500)
    ethanol, found = ase.build.molecule("CH3CH2OH"), []
    for b, a in zip(bond, angle, strict=True):
        one = ethanol.copy()
        one.set_distance(0, 1, b, fix=1)
        one.set_angle(1, 0, 2, a)
        found.append(one)
    return found


def test_figures_and_page_say_free_energy_and_show_its_errors(frames: list[Atoms]) -> None:
    curve = free_energy_landscape(frames, ["bond 0 1"], 300.0, bins=9)
    assert curve.quantity == "free energy" and curve.uncertainty is not None
    (axis,) = draw([curve], "kcal/mol").axes
    assert axis.get_ylabel() == "free energy (kcal/mol)"
    (bars,) = axis.collections
    low, high = np.array(bars.get_segments())[:, :, 1].T
    known = np.isfinite(curve.uncertainty)
    assert np.allclose((high - low)[known] / 2, curve.uncertainty[known] / KCAL_PER_MOL)
    assert np.allclose((high + low)[known] / 2, curve.relative()[known] / KCAL_PER_MOL)
    data = viewer_data(curve, "kcal/mol")
    assert data["quantity"] == "free energy"
    assert data["errors"][4] == pytest.approx(curve.uncertainty[4] / KCAL_PER_MOL, abs=1e-6)
    surface = free_energy_landscape(frames, ["bond 0 1", "angle 1 0 2"], 300.0, bins=5)
    figure = draw([surface], "eV")
    assert [axis.get_title() for axis in figure.axes[:2]] == [surface.label, "standard error"]
    assert [axis.get_ylabel() for axis in figure.axes[2:]] == [
        "free energy (eV)",
        "standard error of the free energy (eV)",
    ]
    mesh = figure.axes[1].collections[0].get_array().reshape(5, 5)
    assert np.allclose(mesh.filled(np.nan), surface.uncertainty.T, equal_nan=True)


def test_the_command_writes_and_says_the_errors(
    frames: list[Atoms], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "t.traj", tmp_path / "out"
    ase.io.write(file, frames)
    words = [
        "landscape",
        "--free-energy",
        str(file),
        "--scan",
        "bond 0 1",
        "--points",
        "9",
        "--out",
        str(out),
    ]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--json"])
    result = json.loads(capsys.readouterr().out)
    wanted = free_energy_landscape(frames, ["bond 0 1"], 300.0, bins=9).uncertainty
    assert result["quantity"] == "free energy"
    assert result["models"][0]["standard_error"]["most"] == pytest.approx(np.nanmax(wanted))
    (found,) = read_folder(out).landscapes
    assert np.array_equal(found.uncertainty, wanted, equal_nan=True)
    text = (out / "landscape.html").read_text()
    assert "Free energy landscape of C2H6O" in text and "with one standard error" in text
    assert "Flyvbjerg and Petersen 1989" in text


def test_a_run_too_short_says_for_how_many_bins(tmp_path: Path) -> None:
    scan = rigid_scan(ase.build.molecule("CH3CH2OH"), [parse_coordinate("bond 0 1 1.4 1.6 12")]).structures()
    found = free_energy_landscape(scan, ["bond 0 1"], 300.0, bins=4)
    assert found.uncertainty is not None and np.isnan(found.uncertainty[1:]).all()
    assert "too short to give one for 3 of 4 bins" in found.geometries.note
