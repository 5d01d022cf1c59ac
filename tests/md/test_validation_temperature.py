"""The temperature of frames: known where they are drawn from a known ensemble."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ffpretrain import load_potential, units
from ffpretrain.datasets.frames import DatasetMetadata, Frame, InMemoryDataset
from ffpretrain.datasets.store_writer import write_store
from ffpretrain.errors import DataError
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.temperature import configurational_temperature, settled
from ffpretrain.md.validation.training_data import read_frames

NUMBERS = np.array([8, 1, 1, 6])


class Springs:
    """A quartic and coupled well: ``U = x K x / 2 + c sum(x^4)``, far from diagonal."""

    def __init__(self, quartic: float) -> None:
        rng = np.random.default_rng(1)
        root = rng.normal(size=(12, 12))
        self.stiffness, self.quartic = root @ root.T + 5 * np.eye(12), quartic

    def forces(self, x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, 12)
        return -(flat @ self.stiffness + 4 * self.quartic * flat**3).reshape(x.shape)

    def energy(self, x: np.ndarray) -> np.ndarray:
        flat = x.reshape(-1, 12)
        return 0.5 * ((flat @ self.stiffness) * flat).sum(1) + self.quartic * (flat**4).sum(1)

    def evaluate_batch(self, structures: list[Atoms]) -> list[SimpleNamespace]:
        return [SimpleNamespace(forces=self.forces(atoms.positions)) for atoms in structures]

    def drawn(self, kelvin: float, count: int) -> np.ndarray:
        """Exact samples: Gaussian ones, thinned by what the quartic part makes of them."""
        rng = np.random.default_rng(2)
        kT = units.KB * kelvin
        root = np.linalg.cholesky(kT * np.linalg.inv(self.stiffness))
        x = rng.normal(size=(60 * count, 12)) @ root.T
        kept = x[rng.random(len(x)) < np.exp(-self.quartic * (x**4).sum(1) / kT)]
        assert len(kept) >= count
        return kept[:count].reshape(count, 4, 3)


@pytest.mark.parametrize(("kelvin", "quartic"), [(300.0, 0.0), (640.0, 0.0), (500.0, 300.0)])
def test_the_temperature_of_a_known_ensemble(kelvin: float, quartic: float) -> None:
    springs = Springs(quartic)
    positions = springs.drawn(kelvin, 4000)
    runtime: Any = springs
    found = configurational_temperature(runtime, NUMBERS, positions, springs.forces(positions), 0)
    assert 0 < found.error < 0.03 * kelvin
    assert abs(found.kelvin - kelvin) < 3 * found.error
    again = configurational_temperature(runtime, NUMBERS, positions, springs.forces(positions), 0)
    assert again == found


def test_the_stated_error_is_the_spread_of_estimates() -> None:
    springs: Any = Springs(0.0)
    parts = springs.drawn(500.0, 4000).reshape(20, 200, 4, 3)
    found = [
        configurational_temperature(springs, NUMBERS, x, springs.forces(x), k) for k, x in enumerate(parts)
    ]
    spread = np.std([one.kelvin for one in found])
    assert spread == pytest.approx(np.mean([one.error for one in found]), rel=0.5)


def test_a_surface_that_curves_down_has_none() -> None:
    springs: Any = Springs(0.0)
    positions = springs.drawn(300.0, 30)
    springs.stiffness = -springs.stiffness
    with pytest.raises(DataError, match="curvature there is not positive; give --data-temperature"):
        configurational_temperature(springs, NUMBERS, positions, springs.forces(positions), 0)


def test_a_temperature_near_one_that_is_run_anyway_is_that_one() -> None:
    assert settled(517.3, (300.0, 500.0)) == 500.0
    assert settled(637.4, (300.0, 500.0)) == 640.0
    assert settled(312.0, (300.0, 500.0)) == 300.0
    assert settled(1.0, ()) == 10.0


def methane_frames(folder: Path, forces: bool, sampling: float | None, count: int = 30) -> Path:
    rng, methane = np.random.default_rng(3), molecule("CH4")
    frames = []
    for _ in range(count):
        positions = methane.positions + rng.normal(0, 0.03, (5, 3))
        force = rng.normal(0, 2.0, (5, 3))
        frames.append(
            Frame(
                methane.numbers,
                positions,
                energy=0.0,
                forces=force if forces else None,
                properties={} if sampling is None else {"sampling_forces": sampling * force},
            )
        )
    path = folder / "frames.h5"
    write_store(path, InMemoryDataset(frames, DatasetMetadata("methane")))
    return path


def test_forces_of_the_potential_that_was_sampled_count(morse: type[torch.nn.Module], tmp_path: Path) -> None:
    examined = Subject(morse(), molecule("CH4"), "cpu")

    def measured(folder: str, **options: Any) -> float:
        (tmp_path / folder).mkdir()
        found = read_frames([methane_frames(tmp_path / folder, **options)], examined, None, ())
        assert found.measured is not None and found.kelvin == settled(found.measured.kelvin, ())
        return found.measured.kelvin

    labels = measured("labels", forces=True, sampling=None)
    assert measured("both", forces=True, sampling=2.0) == pytest.approx(4 * labels)
    given = read_frames([methane_frames(tmp_path, forces=True, sampling=None)], examined, 350.0, ())
    assert given.kelvin == 350.0 and given.measured is None


@pytest.mark.parametrize(
    ("options", "why"),
    [({"forces": False}, "frames without forces"), ({"forces": True, "count": 10}, "only 10 frames")],
)
def test_what_cannot_be_measured_must_be_given(
    morse: type[torch.nn.Module], tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    examined = Subject(morse(), molecule("CH4"), "cpu")
    path = methane_frames(tmp_path, sampling=None, **options)
    with pytest.raises(DataError, match=f"{why}: .*give --data-temperature"):
        read_frames([path], examined, None, ())
    assert read_frames([path], examined, 300.0, ()).kelvin == 300.0


def test_the_frames_of_ethanol_were_not_sampled_at_500_K(shared_data: Path) -> None:
    file = shared_data / "rmd17" / "rmd17_ethanol_train_01.npz"
    found = read_frames([file], Subject(load_potential("ndem-ethanol"), None, "cpu"), None, (300.0, 500.0))
    assert found.measured is not None and 610 < found.measured.kelvin < 670
    assert found.kelvin in (630.0, 640.0, 650.0)
