"""What ``landscape`` says of its input and its numbers, and what it leaves in its folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import ase.build
import ase.io
import pytest

from ffpretrain.cli import main
from ffpretrain.md import landscape
from ffpretrain.md.unfamiliar import UnfamiliarInputWarning


def command(*words: object) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(["landscape", *map(str, words)])
    return caught.value.code


def test_an_unfamiliar_molecule_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ase.io.write(tmp_path / "methanol.xyz", ase.build.molecule("CH3OH"))
    words = ("ndem-ethanol", "--structure", tmp_path / "methanol.xyz", "--along", "modes 0", "--points", 5)
    assert command(*words, "--out", tmp_path / "drawn") == 0
    error = capsys.readouterr().err
    assert error.count("CH4O is not what the model was trained on") == 1
    assert error.count("warning") == 1


def test_the_molecule_of_the_training_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfamiliarInputWarning)
        landscape("ndem-ethanol", points=3)
