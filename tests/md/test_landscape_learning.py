"""Learned directions and noise of each atom; frozen encoders with fitted heads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ffpretrain.artifacts import load_potential, make_card, save_potential
from ffpretrain.backbones import create_backbone
from ffpretrain.cli import main
from ffpretrain.datasets import open_dataset
from ffpretrain.errors import ConfigError, DataError, UnsupportedInputError
from ffpretrain.graphs import graph_from_atoms
from ffpretrain.md import landscape
from ffpretrain.md.landscapes import draw_noise, learned_plane, noise_scale
from ffpretrain.md.landscapes.learned import energy_response
from ffpretrain.md.landscapes.noise_figure import noise_colours, seen_flat
from ffpretrain.md.landscapes.planes import rigid_motions
from ffpretrain.objectives import create_objective
from ffpretrain.objectives.noise_generator import FieldWithNoise
from ffpretrain.testing import randomize
from ffpretrain.training.energy_head import fit_energy_head, untrained


def generator(**options: object) -> FieldWithNoise:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = create_backbone("torchmd-et", hidden=16, layers=1, heads=2, rbf=8, cutoff=5.0)
        objective = create_objective("denoisevae", backbone=backbone, generator_layers=1, **options)
    randomize(objective, size=0.05)
    found = objective.potential()
    assert isinstance(found, FieldWithNoise)
    return found


@pytest.fixture
def generator_file(tmp_path: Path) -> Path:
    field = generator()
    return save_potential(field, tmp_path / "vae.safetensors", make_card(field, "vae"))


@pytest.fixture(scope="module")
def frames_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ethanol whose energy is that of harmonic bonds to all neighbours: what a head can learn."""
    import ase.build

    from ffpretrain.datasets.engines import open_engine

    pytest.importorskip("rdkit")
    rest, calculator, frames = ase.build.molecule("CH3CH2OH"), open_engine("mmff").calculator, []
    for seed in range(60):
        one = rest.copy()
        one.rattle(0.06, seed=seed)
        one.calc = calculator
        one.calc = SinglePointCalculator(one, energy=one.get_potential_energy(), forces=one.get_forces())
        frames.append(one)
    path = tmp_path_factory.mktemp("frames") / "ethanol.extxyz"
    write(path, frames)
    return path


# learned directions


@pytest.mark.parametrize("options", [{}, {"covariance": "full", "rank": 2}])
def test_a_learned_plane_is_orthonormal_seeded_and_free_of_rigid_motion(
    ethanol: Atoms, options: dict[str, object]
) -> None:
    field = generator(**options)
    grid = learned_plane(ethanol, field, points=5, extent=0.2, seed=3)
    assert np.allclose(grid.positions[2, 2], ethanol.positions)
    steps = np.array([grid.positions[3, 2], grid.positions[2, 3]]) - ethanol.positions
    flat = steps.reshape(2, -1)
    assert np.allclose(flat @ flat.T, 0.1**2 * len(ethanol) * np.eye(2), atol=1e-12)
    assert np.abs(rigid_motions(ethanol) @ flat.T).max() < 1e-12
    again, other = (learned_plane(ethanol, field, points=5, extent=0.2, seed=s).positions for s in (3, 4))
    assert np.array_equal(grid.positions, again)
    assert not np.allclose(grid.positions, other)


def test_directions_have_the_shape_of_the_noise(ethanol: Atoms) -> None:
    field = generator()
    with torch.no_grad():
        # the hydrogen of the hydroxyl group alone moves
        field.noise_generator.forward = lambda graph: torch.where(torch.arange(9) == 3, 0.2, 1e-6)  # type: ignore[method-assign]
    sigma = noise_scale(field, ethanol)
    assert sigma[3] == pytest.approx(0.2)
    steps = learned_plane(ethanol, field, points=3, extent=0.1).positions[2, 1] - ethanol.positions
    share = np.square(steps).sum(1) / np.square(steps).sum()
    assert share.argmax() == 3
    assert share[3] > 0.4


def test_the_noise_of_each_atom_is_kept_with_the_grid(ethanol: Atoms, springs) -> None:  # type: ignore[no-untyped-def]
    field = generator()
    direct = field.noise_scale(graph_from_atoms(ethanol, field.cutoff)).double().numpy()
    (found,) = landscape(springs(ethanol), ethanol, points=3, directions_from=field)
    assert np.array_equal(found.geometries.noise, direct)
    assert direct.std() > 1e-4


def test_what_holds_no_generator_is_refused(ethanol: Atoms, model_file: Path) -> None:
    with pytest.raises(ConfigError, match="tiny: holds no noise generator"):
        learned_plane(ethanol, model_file)
    with pytest.raises(UnsupportedInputError, match="at least 3 atoms"):
        learned_plane(ethanol[:2], generator())


def test_displacing_an_atom_costs_half_its_stiffness(ethanol: Atoms) -> None:
    stiff = np.arange(1.0, 10.0)

    def compute(structures):  # type: ignore[no-untyped-def]
        off = [one.positions - ethanol.positions for one in structures]
        # the slope of a force drops out, as every direction is taken both ways
        return [float(0.5 * (stiff[:, None] * o**2).sum() + o.sum()) for o in off], None

    assert np.allclose(energy_response(compute, ethanol, 0.1), 0.5 * stiff * 0.1**2)


# the picture


def test_the_picture_has_a_circle_of_the_right_colour_for_each_atom(ethanol: Atoms) -> None:
    from matplotlib.colors import to_hex
    from matplotlib.patches import Circle

    sigma = np.linspace(0.05, 0.2, len(ethanol))
    axis, bar = draw_noise(ethanol, sigma).axes
    spots = [patch for patch in axis.patches if isinstance(patch, Circle)]
    assert len(spots) == len(axis.texts) == len(ethanol)
    assert len(axis.lines) == 8  # bonds
    flat, _ = seen_flat(ethanol.positions)
    by_name = {text.get_text(): text.get_position() for text in axis.texts}
    colours = noise_colours(sigma)
    for i, symbol in enumerate(ethanol.symbols):
        assert by_name[f"{symbol}{i}"] == pytest.approx(tuple(flat[i]))
        (spot,) = [s for s in spots if np.allclose(s.center, flat[i])]
        assert to_hex(spot.get_facecolor()) == colours[i]
    assert "Å" in bar.get_ylabel()
    assert bar.get_ylim() == pytest.approx((0.05, 0.2))


def test_the_view_keeps_distances_and_shows_every_atom(ethanol: Atoms) -> None:
    flat, depth = seen_flat(ethanol.positions)
    turned = Atoms(ethanol.numbers, np.column_stack([flat, depth]))
    assert np.allclose(turned.get_all_distances(), ethanol.get_all_distances())
    apart = np.linalg.norm(flat[:, None] - flat, axis=-1) + 9 * np.eye(len(flat))
    assert apart.min() > 0.3
    with pytest.raises(ConfigError, match="one number for each"):
        draw_noise(ethanol, np.ones(3))


# encoders


def test_a_fitted_head_leaves_the_encoder_and_learns(
    model_file: Path, ethanol: Atoms, tmp_path: Path
) -> None:
    # labels that a head on these features can give: those of the model's own head
    teacher = load_potential(model_file)
    labelled = []
    for seed in range(60):
        one = ethanol.copy()
        one.rattle(0.1, seed=seed)
        one.calc = SinglePointCalculator(
            one, energy=float(teacher(graph_from_atoms(one, teacher.cutoff))["energy"])
        )
        labelled.append(one)
    write(tmp_path / "taught.extxyz", labelled)
    before, frames = teacher.state_dict(), open_dataset(tmp_path / "taught.extxyz")
    found = fit_energy_head(model_file, frames, steps=400, lr=0.02)
    after = found.potential.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key.startswith("backbone"))
    assert (found.n_fitted, found.n_held_out) == (48, 12)
    errors = {name: quantity.value for name, quantity in found.errors.items()}
    assert errors["energy_mae_fitted"] < 0.5 * errors["energy_spread"]
    assert errors["energy_mae"] < 0.7 * errors["energy_spread"]
    again = fit_energy_head(model_file, frames, steps=400, lr=0.02)
    assert again.errors == found.errors
    assert fit_energy_head(model_file, frames, steps=400, lr=0.02, seed=1).errors != found.errors


def test_the_error_told_is_that_of_the_potential(model_file: Path, frames_file: Path) -> None:
    frames = open_dataset(frames_file)
    found = fit_energy_head(model_file, frames, steps=20)
    order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0)).tolist()
    errors = []
    for i in order[:12]:
        graph = graph_from_atoms(frames[i].to_atoms(), found.potential.cutoff)
        errors.append(abs(float(found.potential(graph)["energy"]) - float(frames[i].energy or 0)))
    assert found.errors["energy_mae"].value == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_field_without_an_energy_serves_as_encoder(generator_file: Path, frames_file: Path) -> None:
    potential = fit_energy_head(generator_file, open_dataset(frames_file), steps=2).potential
    kept = load_potential(generator_file)
    for name, value in kept.backbone.state_dict().items():
        assert torch.equal(potential.backbone.state_dict()[name], value)


def test_frames_that_cannot_be_fitted(model_file: Path, frames_file: Path, tmp_path: Path) -> None:
    frames = open_dataset(frames_file)
    with pytest.raises(DataError, match="at least 10"):
        fit_energy_head(model_file, frames[:5])
    bare = [frame.to_atoms() for frame in frames]
    for one in bare:
        one.calc = None
    write(tmp_path / "bare.extxyz", bare)
    with pytest.raises(DataError, match="has no energy to fit"):
        fit_energy_head(model_file, open_dataset(tmp_path / "bare.extxyz"))
    with pytest.raises(ConfigError, match="steps=0"):
        fit_energy_head(model_file, frames, steps=0)


def test_an_untrained_twin_has_the_network_and_other_weights(model_file: Path) -> None:
    one, same, other = (untrained(model_file, seed) for seed in (1, 1, 2))
    trained = load_potential(model_file)
    keys = [key for key, value in trained.backbone.state_dict().items() if value.is_floating_point()]
    assert one.backbone.config == trained.backbone.config
    weights = [model.backbone.state_dict() for model in (one, same, other, trained)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in keys)
    for different in weights[2:]:
        assert any(not torch.equal(weights[0][key], different[key]) for key in keys)


# the command


def test_the_command_compares_encoders_on_learned_directions(
    generator_file: Path,
    frames_file: Path,
    ethanol: Atoms,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ffpretrain.training import energy_head

    monkeypatch.setattr(energy_head, "STEPS", 5)
    write(tmp_path / "ethanol.xyz", ethanol)
    out = tmp_path / "out"
    words = [str(generator_file), "--with-untrained", "--fit-head", str(frames_file), "--points", "5"]
    words += ["--structure", str(tmp_path / "ethanol.xyz"), "--directions-from", str(generator_file)]
    with pytest.raises(SystemExit, match="0"):
        main(["landscape", *words, "--out", str(out), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [one["label"] for one in result["models"]] == ["vae", "torchmd-et, untrained"]
    assert result["kind"] == "learned plane"
    assert all(one["fitted_head"]["frames_held_out"] == 12 for one in result["models"])
    assert len(result["noise"]["sigma"]) == 9
    assert all(len(one["energy_response"]) == 9 for one in result["models"])
    assert {"noise.png", "noise.svg", "landscape-0.npz", "landscape-1.npz"} <= {p.name for p in out.iterdir()}
    with np.load(out / "landscape-0.npz") as content:
        assert np.allclose(content["noise_angstrom"], result["noise"]["sigma"])
    page = (out / "landscape.html").read_text()
    data = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', page)]
    assert [len(one["noise"]) for one in data] == [9, 9]
    assert data[0]["top"] == data[1]["top"] == max(max(one["energies"]) for one in data)
    assert "Noise of each atom" in page
    assert "MAE on frames held out" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{vae}"], "give a structure"),
        (["{vae}", "--structure", "{xyz}"], "no energy"),
        (["ndem-ethanol", "--directions-from", "ndem-ethanol"], "holds no noise generator"),
        (["ndem-ethanol", "--with-untrained"], "give fit_head"),
        (["ndem-ethanol", "--molecule", "aspirin"], "belong to the data of --fit-head"),
        (["ndem-ethanol", "--along", "spiral"], "'modes K [K]'"),
        (["ndem-ethanol", "--directions-from", "{vae}", "--scan", "bond 0 1 1 2 3"], "give one of them"),
        ([], "name a model"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    message: str,
    generator_file: Path,
    ethanol: Atoms,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    xyz, out = tmp_path / "x.xyz", tmp_path / "out"
    write(xyz, ethanol)
    filled = [word.format(vae=generator_file, xyz=xyz) for word in words]
    with pytest.raises(SystemExit, match="2"):
        main(["landscape", *filled, "--out", str(out)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())
