"""Objectives and backbones: every pair trains for a step or is refused with the reason, as documented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ffpretrain.backbones import list_backbones
from ffpretrain.errors import NonFiniteError
from ffpretrain.objectives import list_objectives, matrix
from ffpretrain.objectives.coord import Coord
from ffpretrain.objectives.matrix import Cell, all_pairs, labelled_sample, matrix_table, try_pair
from ffpretrain.plugins import plugin_names

DOCS = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str], Cell]:
    """All pairs of what comes with the package."""
    objectives = sorted(set(list_objectives()) - set(plugin_names("ffpretrain.objectives")))
    backbones = sorted(set(list_backbones()) - set(plugin_names("ffpretrain.backbones")))
    return all_pairs(objectives, backbones)


def test_the_table_in_the_documentation_is_what_comes_out(cells: dict[tuple[str, str], Cell]) -> None:
    """After a change: ``python -m ffpretrain.objectives.matrix docs/objectives.md``."""
    assert matrix_table(cells) in DOCS.read_text(encoding="utf-8")


def test_four_fifths_of_the_pairs_work(cells: dict[tuple[str, str], Cell]) -> None:
    assert len(cells) >= 40
    assert sum(cell.works for cell in cells.values()) >= 0.8 * len(cells)


def test_a_refusal_says_what_is_missing(cells: dict[tuple[str, str], Cell]) -> None:
    refused = {pair: cell for pair, cell in cells.items() if not cell.works}
    assert {backbone for _, backbone in refused} <= {"schnet"}
    assert all("vector" in cell.reason and "\n" not in cell.reason for cell in refused.values())
    assert cells["coord", "schnet"] == Cell(
        True, {"head": "energy-gradient"}, cells["coord", "schnet"].reason
    )
    assert "set head='energy-gradient'" in cells["coord", "schnet"].reason


def test_a_pair_that_is_built_and_does_not_train_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Coord.forward

    def broken(value: float) -> Any:
        def call(self: Coord, *arguments: Any) -> dict[str, torch.Tensor]:
            terms = forward(self, *arguments)
            head = next(self.noise_head.parameters())  # type: ignore[union-attr]
            return {"loss": value * head.sum() if value else terms["loss"] / 0.0}

        return call

    sample = labelled_sample()
    monkeypatch.setattr(Coord, "forward", broken(1.0))
    with pytest.raises(NonFiniteError, match="coord with painn: no gradient reaches the backbone"):
        try_pair("coord", "painn", sample)
    monkeypatch.setattr(Coord, "forward", broken(0.0))
    with pytest.raises(NonFiniteError, match="coord with painn: the loss or a gradient is not finite"):
        try_pair("coord", "painn", sample)


def test_the_table_is_written_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: dict[tuple[str, str], Cell]
) -> None:
    monkeypatch.setattr(matrix, "all_pairs", lambda: cells)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    matrix.main(page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert matrix_table(cells) in text
