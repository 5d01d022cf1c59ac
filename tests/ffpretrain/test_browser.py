"""The pages in a real browser: no error on its console, plots that answer to a click, a page that prints.

Chromium and its driver are asked for over HTTP as the W3C's WebDriver protocol has it; where they are not
installed the tests are skipped, unless FFPRETRAIN_REQUIRE_BROWSER is set, as it is in CI.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ffpretrain.datasets import open_dataset
from ffpretrain.md import landscape
from ffpretrain.report import write_report

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1000,1400",
]


class Browser:
    """A session of a headless Chromium."""

    def __init__(self, port: int, profile: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        options = {"binary": shutil.which("chromium"), "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self._ask("POST", f"{self.session}/url", {"url": page.as_uri()})

    def run(self, script: str, *values: Any) -> Any:
        return self._ask("POST", f"{self.session}/execute/sync", {"script": script, "args": list(values)})

    def click(self, selector: str, x: int = 0, y: int = 0) -> None:
        found = self._ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        self.run("arguments[0].scrollIntoView({block: 'center'})", found)
        moves = [
            {"type": "pointerMove", "origin": found, "x": x, "y": y, "duration": 0},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        mouse = {"type": "pointer", "id": "mouse", "actions": moves}
        self._ask("POST", f"{self.session}/actions", {"actions": [mouse]})

    def drag(self, selector: str, dx: int, dy: int) -> None:
        found = self._ask("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        moves = [
            {"type": "pointerMove", "origin": found, "x": 0, "y": 0, "duration": 0},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "origin": "pointer", "x": dx, "y": dy, "duration": 50},
            {"type": "pointerUp", "button": 0},
        ]
        mouse = {"type": "pointer", "id": "mouse", "actions": moves}
        self._ask("POST", f"{self.session}/actions", {"actions": [mouse]})

    def errors(self) -> list[str]:
        entries = self._ask("POST", f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def media(self, name: str) -> None:
        """Lay the page out for ``print``, or, with no name, for what it is on."""
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"media": name}}
        self._ask("POST", f"{self.session}/goog/cdp/execute", command)

    def pdf(self) -> bytes:
        return base64.b64decode(self._ask("POST", f"{self.session}/print", {}))

    def close(self) -> None:
        self._ask("DELETE", self.session)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        reason = "Chromium is not installed: apt-get install chromium chromium-driver"
        if os.environ.get("FFPRETRAIN_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        session = _connect(port, tmp_path_factory.mktemp("profile"))
        yield session
        session.close()
    finally:
        driver.kill()
        driver.wait()


def _connect(port: int, profile: Path) -> Browser:
    for _ in range(100):
        try:
            return Browser(port, profile)
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.2)
    raise TimeoutError("chromedriver did not start")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ffpretrain.artifacts import make_card, save_potential
    from ffpretrain.backbones import create_backbone
    from ffpretrain.potential import Potential

    folder = tmp_path_factory.mktemp("page")
    potential = Potential(create_backbone("painn", hidden=16, layers=1), elements=[1, 6, 8])
    path = folder / "model.safetensors"
    save_potential(potential, path, make_card(potential, name="small"))
    return write_report(path, folder / "report.html", frames=open_dataset("ethanol-gfn2"), limit=20)


def test_a_report_opens_without_a_word_on_the_console(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.errors() == []
    assert browser.run("return document.querySelectorAll('svg, canvas').length") >= 3
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_a_click_on_a_parity_plot_names_the_nearest_point(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.run("return document.querySelector('.plot output').textContent") == ""
    browser.click(".plot canvas", 5, 5)
    said = browser.run("return document.querySelector('.plot output').textContent")
    assert said.split(":")[0] in ("H", "C", "O")
    assert "eV/Å" in said


def test_elements_can_be_switched_off(browser: Browser, report: Path) -> None:
    browser.open(report)
    for name in ("H", "C"):
        browser.click(f".plot button[data-name={name}]")
    pressed = browser.run(
        "return [...document.querySelectorAll('.plot button')].map(b => b.getAttribute('aria-pressed'))"
    )
    assert pressed == ["false", "false", "true"]
    browser.click(".plot canvas", 5, 5)
    assert browser.run("return document.querySelector('.plot output').textContent").startswith("O:")


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landscape")
    landscape("ndem-ethanol", points=7, out=folder)
    return folder / "landscape.html"


def test_a_landscape_answers_to_the_pointer_and_can_be_turned(browser: Browser, surface: Path) -> None:
    browser.open(surface)
    assert browser.errors() == []
    said = "return document.querySelector('.plot output').textContent"
    before = browser.run(said)
    assert before.endswith("0.0000 kcal/mol")
    browser.click(".plot canvas", -120, -60)
    assert browser.run(said) != before
    picture = "return document.querySelector('.plot canvas').toDataURL()"
    first = browser.run(picture)
    browser.drag(".plot canvas", 60, 0)
    assert browser.run(picture) != first


@pytest.fixture(scope="module")
def report_with_landscape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    landscape("ndem-ethanol", points=9, out=folder / "plane", unit="eV")
    return write_report("ndem-ethanol", folder / "report.html", beside=folder)


def test_a_landscape_in_a_report_answers_and_shows_the_molecule(
    browser: Browser, report_with_landscape: Path
) -> None:
    browser.open(report_with_landscape)
    assert browser.errors() == []
    loaded = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    # the interactive figure has taken the place of the picture
    assert browser.run("return document.querySelectorAll('img').length") == 0
    said = "return document.querySelector('#plane .plot output').textContent"
    surface, molecule = (
        f"return document.querySelectorAll('#plane canvas')[{k}].toDataURL()" for k in (0, 1)
    )
    lowest, before, geometry = browser.run(said), browser.run(surface), browser.run(molecule)
    assert lowest.endswith(": 0.0000 eV")
    browser.click("#plane canvas", -120, -60)
    picked = browser.run(said)
    assert picked != lowest and picked.startswith("direction 1 ") and picked.endswith(" eV")
    assert float(picked.removesuffix(" eV").rpartition(" ")[2]) > 0
    assert browser.run(molecule) != geometry
    assert browser.run(surface) != before
    turned = browser.run(surface)
    browser.drag("#plane canvas", 60, 0)
    assert browser.run(surface) != turned


def test_a_landscape_in_a_report_prints_as_it_stands(browser: Browser, report_with_landscape: Path) -> None:
    browser.open(report_with_landscape)
    # on paper there is nothing to drag, but the value of the point that was picked
    names = [".hint", "output", "canvas", "canvas + canvas"]
    displayed = "n => getComputedStyle(document.querySelector('#plane ' + n)).display != 'none'"
    shown = f"return arguments[0].map({displayed})"
    assert browser.run(shown, names) == [True] * 4
    browser.media("print")
    assert browser.run(shown, names) == [False, True, True, True]
    browser.media("")
    with_figure = browser.pdf()
    browser.run("document.querySelectorAll('#plane canvas').forEach(c => c.remove())")
    without = browser.pdf()
    assert with_figure.count(b"/Subtype /Image") >= without.count(b"/Subtype /Image") + 2


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    from ffpretrain import FFCalculator
    from ffpretrain.md.landscapes import random_plane
    from ffpretrain.md.landscapes.surface import Geometries

    folder = tmp_path_factory.mktemp("noise")
    plane = random_plane(FFCalculator("ndem-ethanol").card.reference_geometry.to_atoms(), points=5)
    sigma = np.linspace(0.05, 0.15, len(plane.atoms))
    grid = Geometries(plane.atoms, plane.axes, plane.positions, "learned plane", "", sigma)
    landscape("ndem-ethanol", geometries=grid, path=np.array([[-0.1, -0.1], [0.1, 0.1]]), out=folder)
    return folder / "landscape.html"


def test_atoms_show_their_noise_and_say_it(browser: Browser, noise: Path) -> None:
    browser.open(noise)
    assert browser.errors() == []
    said = "return document.querySelector('.plot output').textContent"
    assert "noise" not in browser.run(said)
    browser.click(".plot canvas + canvas", 10, 10)
    assert "noise 0." in browser.run(said)
    picture = "return document.querySelector('.plot canvas + canvas').toDataURL()"
    by_noise = browser.run(picture)
    browser.click(".plot button[data-noise]")
    assert browser.run(picture) != by_noise
    assert (
        browser.run("return document.querySelector('[data-noise]').getAttribute('aria-pressed')") == "false"
    )
    assert browser.run("return document.querySelectorAll('#noise-of-each-atom svg').length") == 1


def test_a_curve_answers_and_shows_its_reference(browser: Browser, tmp_path: Path) -> None:
    landscape(
        "ndem-ethanol",
        scan=["dihedral 1 0 2 8 -180 180 7"],
        reference="ndem-ethanol",
        reference_label="the same",
        out=tmp_path,
    )
    browser.open(tmp_path / "landscape.html")
    assert browser.errors() == []
    browser.click(".plot canvas", 100, 0)
    said = browser.run("return document.querySelector('.plot output').textContent")
    assert said.startswith("dihedral 1-0-2-8")
    assert "the same" in said


def test_a_free_energy_says_so_and_how_well_it_is_known(browser: Browser, tmp_path: Path) -> None:
    import ase.build
    import numpy as np

    from ffpretrain.md.landscapes import free_energy_landscape, write

    ethanol, frames = ase.build.molecule("CH3CH2OH"), []
    for length in 1.5 + 0.05 * np.random.default_rng(0).normal(size=300):
        frames.append(ethanol.copy())
        frames[-1].set_distance(0, 1, length)
    write([free_energy_landscape(frames, ["bond 0 1"], 300.0, bins=7)], tmp_path)
    browser.open(tmp_path / "landscape.html")
    assert browser.errors() == []
    browser.click(".plot canvas", 60, 0)
    said = browser.run("return document.querySelector('.plot output').textContent")
    assert said.startswith("bond 0-1 1.") and " ± 0." in said and said.endswith(" kcal/mol")
    assert browser.run("return document.querySelector('h1').textContent").startswith("Free energy")


def test_a_report_prints(browser: Browser, report: Path) -> None:
    browser.open(report)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 10_000
