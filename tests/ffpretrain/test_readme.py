"""The Python in the README runs as it stands there, from the root of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def run(block: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    return names


def test_every_example_is_listed() -> None:
    listed = set(re.findall(r"^\| `([a-z_]+(?:\.py|/))` \|", README.read_text(), flags=re.MULTILINE))
    folder = README.parent / "examples"
    scripts = {path.name for path in folder.glob("*.py")}
    packages = {f"{path.parent.name}/" for path in folder.glob("*/pyproject.toml")}
    assert listed == scripts | packages


def test_the_calculator_moves_aspirin(blocks: list[str]) -> None:
    atoms = run(blocks[0])["atoms"]
    assert np.isfinite(atoms.get_total_energy())  # type: ignore[attr-defined]
    assert 50 < atoms.get_temperature() < 800  # type: ignore[attr-defined]


def test_both_ways_into_openmm_give_one_energy(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import openmm

    monkeypatch.chdir(README.parent)
    names = run(blocks[1])
    energies = []
    for system in (names["system"], names["same"]):
        context = openmm.Context(
            system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
        )
        context.setPositions(names["pdb"].positions)  # type: ignore[attr-defined]
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    assert len(blocks) == 2
    assert energies[0] == pytest.approx(energies[1], abs=1e-3)
    assert energies[0] < -1e6
