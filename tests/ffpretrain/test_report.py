"""Reports: what is in the page, that it needs nothing else, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from ase.build import molecule

from ffpretrain.artifacts import load_potential
from ffpretrain.cli import main
from ffpretrain.datasets import open_dataset
from ffpretrain.errors import DataError
from ffpretrain.evaluation import Predictions, predict
from ffpretrain.plots import new_figure
from ffpretrain.recipes import load_recipe
from ffpretrain.report import write_report
from ffpretrain.report.figures import distances_figure, error_by_magnitude, force_parity
from ffpretrain.report.page import Page, drawing, table
from ffpretrain.training import train


class Parsed(HTMLParser):
    """Tags that are open, and every address the page would load."""

    VOID: ClassVar[set[str]] = {"meta", "link", "img", "br", "path", "rect", "use", "circle"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag in ("img", "script", "link", "iframe"):
            self.addresses += [found[key] or "" for key in ("src", "href") if key in found]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parse(path: Path) -> tuple[str, Parsed]:
    text = path.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.open == []
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert len(parsed.ids) == len(set(parsed.ids))
    return text, parsed


def data_of(text: str) -> list[dict[str, object]]:
    found = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return [json.loads(content) for content in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    changes = [
        "trainer.max_steps=4",
        "trainer.val_every_steps=2",
        "trainer.batch_size=2",
        "model.backbone.options={hidden: 32, layers: 1, heads: 4, rbf: 8}",
        "model.backbone.name=torchmd-et",
        "data.train=8",
        "data.val=4",
        "data.test=6",
    ]
    train(load_recipe("demo-finetune", changes), out, progress=False)
    return out


def test_a_run_has_card_curves_and_errors_on_its_held_out_frames(run: Path, tmp_path: Path) -> None:
    text, _ = parse(write_report(run, tmp_path / "page.html"))
    for heading in ("Model", "Training", "Errors"):
        assert f"<h2>{heading}</h2>" in text
    assert "6 frames" in text
    forces, energies = data_of(text)
    frames = open_dataset("ethanol-gfn2")
    from ffpretrain.datasets.splits import load_splits

    test = load_splits(run / "splits.json", frames).apply(frames)["test"]
    direct = predict(load_potential(str(run / "model.safetensors")), test)
    assert {group["name"] for group in forces["groups"]} == {"H", "C", "O"}
    oxygen = next(group for group in forces["groups"] if group["name"] == "O")
    assert np.allclose(oxygen["predicted"], direct.forces[direct.numbers == 8].ravel(), atol=1e-5)
    assert np.allclose(oxygen["reference"], direct.forces_label[direct.numbers == 8].ravel(), atol=1e-5)
    assert len(energies["groups"][0]["predicted"]) == 6


def test_a_named_model_alone_has_its_card(tmp_path: Path) -> None:
    text, _ = parse(write_report("ndem-ethanol", tmp_path / "page.html"))
    assert "PBE/def2-SVP" in text
    assert "<h2>Errors</h2>" not in text


def test_what_lies_in_the_folder_is_shown(run: Path, tmp_path: Path) -> None:
    from shutil import copytree

    folder = copytree(run, tmp_path / "run")
    dynamics = folder / "nve"
    dynamics.mkdir()
    (dynamics / "log.csv").write_text("step,time_ps,total_eV,kinetic_eV\n0,0.0,1.0,0.5\n1,0.1,1.01,0.4\n")
    (dynamics / "md.json").write_text(json.dumps({"ensemble": "nve", "conserved": {"drift": 0.125}}))
    checks = {"nve": {"status": "missed", "summary": "the slope is 3 <meV>"}}
    (folder / "validation.json").write_text(json.dumps({"checks": checks}))
    landscape = folder / "landscape"
    landscape.mkdir()
    new_figure().savefig(landscape / "plane.png")
    text, parsed = parse(write_report(folder, tmp_path / "page.html"))
    assert '<td class="number">0.125</td>' in text
    assert '<td class="bad">missed</td><td>the slope is 3 &lt;meV&gt;</td>' in text
    assert any(address.startswith("data:image/png") for address in parsed.addresses)


def test_landscapes_are_figures_to_turn_and_of_a_reasonable_size(tmp_path: Path) -> None:
    from ffpretrain.md.landscapes import Landscape, random_plane, write

    plane = random_plane(molecule("C6H6"), points=101)
    x, y = (axis.values for axis in plane.axes)
    folder = tmp_path / "beside" / "a plane"
    folder.mkdir(parents=True)
    energies = x[:, None] ** 2 + 2 * np.square(y)
    write([Landscape(plane, "parabola", energies, references={"flat": 0 * energies})], folder, "eV")
    new_figure().savefig(folder / "another.png")
    text, parsed = parse(write_report("ndem-ethanol", tmp_path / "page.html", beside=tmp_path / "beside"))
    assert len(text) < 1_000_000
    (data,) = data_of(text)
    assert data["unit"] == "eV" and data["thinned"] == 2
    assert np.allclose(data["energies"], (energies - energies.min())[::2, ::2].ravel(), atol=1e-6)
    assert len(data["frames"]) <= 450
    assert "random plane, seed 0" in text
    # the picture of the same is left out, others are not
    assert len([address for address in parsed.addresses if address.startswith("data:image/png")]) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("landscape.json", "{"),
        ("landscape.json", '{"schema": "other", "version": 1}'),
        ("landscape.json", '{"schema": "ffpretrain-landscape", "version": 1}'),
        ("landscape.npz", "PK broken"),
        ("landscape.npz", None),
    ],
)
def test_a_landscape_that_cannot_be_read_is_named(name: str, content: str | None, tmp_path: Path) -> None:
    from ffpretrain.md.landscapes import Landscape, random_plane, write

    folder = tmp_path / "plane"
    folder.mkdir()
    write([Landscape(random_plane(molecule("H2O"), points=3), "flat", np.zeros((3, 3)))], folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: .*draw the landscape again"):
        write_report("ndem-ethanol", tmp_path / "page.html", beside=tmp_path)


def test_distances_of_runs_and_labelled_frames(tmp_path: Path) -> None:
    from ase import Atoms
    from ase.io import write

    folder = tmp_path / "nve"
    folder.mkdir()
    (folder / "md.json").write_text(json.dumps({"ensemble": "nve"}))
    write(folder / "trajectory.traj", [Atoms("OH", [[0, 0, 0], [0, 0, d]]) for d in (1.0, 1.0, 1.6)])
    figure = distances_figure({"nve": folder / "trajectory.traj"}, open_dataset("ethanol-gfn2"))
    assert figure is not None
    (line,) = figure.axes[0].lines  # the frames are of another molecule
    r, h = line.get_xdata(), line.get_ydata()
    assert h[np.abs(r - 1.0).argmin()] == pytest.approx(2 / 3 / 0.03)
    assert h[np.abs(r - 1.6).argmin()] == pytest.approx(1 / 3 / 0.03)
    frames = open_dataset("ethanol-gfn2")[:20]
    write(folder / "trajectory.traj", [frame.to_atoms() for frame in frames])
    both = distances_figure({"nve": folder / "trajectory.traj"}, frames)
    assert both is not None
    one, same = both.axes[0].lines
    assert np.allclose(one.get_ydata(), same.get_ydata())
    text, _ = parse(write_report("ndem-ethanol", tmp_path / "page.html", beside=tmp_path))
    assert "h(r)" in text


def test_error_by_magnitude_against_plain_numbers() -> None:
    label = np.zeros((100, 3))
    label[:, 0] = np.arange(100)
    predicted = label.copy()
    predicted[:, 1] = 0.01 * np.arange(100)
    one = Predictions(None, None, predicted, label, np.ones(100, dtype=np.int64), np.array([100]))
    figure = error_by_magnitude(one)
    median, high = figure.axes[0].lines
    assert np.allclose(median.get_xdata(), np.arange(100).reshape(10, 10).mean(1))
    kcal = 23.060548
    assert np.allclose(median.get_ydata(), 0.01 * kcal * np.arange(4.5, 100, 10), rtol=1e-6)
    assert np.all(high.get_ydata() > median.get_ydata())


def test_large_parity_plots_are_thinned_and_say_so() -> None:
    forces = np.random.default_rng(0).normal(size=(5000, 3))
    one = Predictions(None, None, forces, forces, np.full(5000, 6), np.array([5000]))
    html = force_parity(one)
    (content,) = data_of(html)
    assert "every 3th component" in html
    assert len(content["groups"][0]["reference"]) == 5000


def test_figures_keep_their_text_and_have_ids_of_their_own() -> None:
    parts = []
    for caption in ("first", "second"):
        figure = new_figure()
        figure.subplots().plot([0, 1], [0, 1], clip_on=True)
        parts.append(drawing(figure, caption))
    page = Page("a <title>", "and a lead")
    page.add("Two figures", *parts)
    html = page.html()
    parsed = Parsed(html)
    assert len(parsed.ids) == len(set(parsed.ids))
    for target in re.findall(r"url\(#([^)]+)\)", html):
        assert target in parsed.ids
    assert "a &lt;title&gt;" in html


def test_tables_escape_and_round() -> None:
    html = table(["<a>", "b"], [["x & y", 0.123456789], [3, "passed"]])
    assert "&lt;a&gt;" in html
    assert "x &amp; y" in html
    assert "0.1235" in html
    assert '<td class="good">passed</td>' in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model"),
        (["ndem-ethanol", "--beside", "missing"], "is no folder"),
        (["{folder}"], "holds no model file; give the folder of a training run or a model, and --beside"),
        (["ndem-ethanol", "--data", "missing.xyz"], "missing.xyz"),
        (["ndem-ethanol", "--data", "ethanol-gfn2", "--limit", "2"], "trained on"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    out = tmp_path / "page.html"
    words = [word.format(folder=folder) for word in arguments]
    with pytest.raises(SystemExit, match="2"):
        main(["report", *words, "--out", str(out)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("page*"))


def test_an_unwritable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["report", "ndem-ethanol", "--out", str(tmp_path / "file" / "page.html")])
    assert "cannot be written" in capsys.readouterr().err
