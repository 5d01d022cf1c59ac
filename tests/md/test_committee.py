"""The limit on how far the members of a committee may disagree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms

from ffpretrain import FFCalculator
from ffpretrain.errors import ConfigError
from ffpretrain.md import simulate
from ffpretrain.md.committee import CommitteeSpreadError, CommitteeSpreadWarning
from ffpretrain.potential import Potential

Build = Callable[..., Potential]


@pytest.fixture
def members(build_potential: Build) -> list[Potential]:
    return [build_potential(seed) for seed in range(3)]


def spread_by_hand(members: list[Potential], atoms: Atoms) -> float:
    forces = np.array([FFCalculator(m, "cpu", "float64").get_forces(atoms) for m in members])
    deviation = np.linalg.norm(forces - forces.mean(0), axis=2)
    return float(np.sqrt((deviation**2).mean(0)).max())


def test_flagging_warns_once_and_counts(members: list[Potential], ethanol: Atoms) -> None:
    spread = spread_by_hand(members, ethanol)
    calculator = FFCalculator(members, "cpu", "float64", max_spread=0.99 * spread)
    ethanol.calc = calculator
    with pytest.warns(CommitteeSpreadWarning, match="spread of .* eV/Å, more than max_spread="):
        ethanol.get_forces()
    assert calculator.results["forces_spread"] == pytest.approx(spread, rel=1e-9)
    assert calculator.results["spread_exceeded"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ethanol.positions[0, 0] += 1e-3
        ethanol.get_forces()
    assert calculator.flagged == 2


def test_within_the_limit_nothing_is_said(members: list[Potential], ethanol: Atoms) -> None:
    limit = 1.01 * spread_by_hand(members, ethanol)
    ethanol.calc = FFCalculator(members, "cpu", "float64", max_spread=limit, on_spread="stop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ethanol.get_forces()
    assert ethanol.calc.results["spread_exceeded"] is False and ethanol.calc.flagged == 0
    assert ethanol.calc.todict()["max_spread"] == limit


def test_stopping_ends_a_simulation(members: list[Potential], ethanol: Atoms, tmp_path: Path) -> None:
    limit = 1.0001 * spread_by_hand(members, ethanol)
    calculator = FFCalculator(members, "cpu", "float64", max_spread=limit, on_spread="stop")
    with pytest.raises(CommitteeSpreadError, match=r"max_spread=.* good steps\)"):
        simulate(ethanol, calculator, ensemble="nve", temperature=300, steps=50, out=tmp_path / "run")
    assert (tmp_path / "run" / "last_frame.extxyz").exists()
    assert calculator.results == {}


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {"max_spread": 0.1}, "needs a committee"),
        (2, {"max_spread": 0.0}, "positive number"),
        (2, {"max_spread": float("nan")}, "positive number"),
        (2, {"max_spread": True}, "positive number"),
        (2, {"max_spread": "0.1"}, "positive number"),
        (2, {"on_spread": "halt"}, "unknown on_spread='halt'"),
    ],
)
def test_bad_limits_are_refused(
    count: int, options: dict[str, Any], message: str, members: list[Potential]
) -> None:
    with pytest.raises(ConfigError, match=message):
        FFCalculator(members[:count], "cpu", **options)


def test_a_run_keeps_what_was_flagged(members: list[Potential], ethanol: Atoms, tmp_path: Path) -> None:
    """Steps beyond the limit and the largest spread, also of the steps before a run was continued."""
    limit = 1.0001 * spread_by_hand(members, ethanol)
    run: dict[str, Any] = {"ensemble": "nve", "temperature": 300, "interval": 1, "out": tmp_path / "run"}

    def continued(steps: int, **options: Any) -> dict[str, Any]:
        calculator = FFCalculator(members, "cpu", "float64", max_spread=limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CommitteeSpreadWarning)
            return simulate(ethanol, calculator, steps=steps, **run, **options).summary["committee"]

    first, whole = continued(6), continued(12, resume=True)
    frames = ase.io.read(tmp_path / "run" / "trajectory.traj", ":")
    spreads = [spread_by_hand(members, frame) for frame in frames]
    assert len(spreads) == 13
    assert 0 < first["flagged"] == sum(s > limit for s in spreads[:7])
    assert whole["flagged"] == sum(s > limit for s in spreads)
    assert whole["largest_forces_spread"] == pytest.approx(max(spreads), rel=1e-9)
    alone = simulate(ethanol, members[0], ensemble="nve", steps=1, device="cpu", dtype="float64")
    assert alone.summary["committee"] is None


def test_members_for_different_molecules_are_refused(with_card: Build) -> None:
    ethanol, both = with_card(), with_card(compositions=["C2H6O", "CH4O"])
    FFCalculator([ethanol, both], "cpu")
    other = with_card(compositions=["C9H8O4"])
    with pytest.raises(ConfigError, match="trained on C2H6O, 'tiny' on C9H8O4; give models") as caught:
        FFCalculator([ethanol, both, other], "cpu")
    assert "\n" not in str(caught.value)
