"""The table of objectives and backbones in the documentation, made by training each pair for one step.

``python -m ffpretrain.objectives.matrix docs/objectives.md`` writes it anew between its two marks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ffpretrain.backbones import Backbone, backbone_class, create_backbone, list_backbones
from ffpretrain.datasets import open_dataset
from ffpretrain.errors import ConfigError, NonFiniteError
from ffpretrain.graphs import Sample
from ffpretrain.objectives import create_objective, list_objectives, objective_class
from ffpretrain.training.data import collate, sample_from_frame
from ffpretrain.training.reference import write_between

BEGIN, END = "<!-- matrix: made by ffpretrain.objectives.matrix -->", "<!-- end of matrix -->"
#: sizes of the networks that are tried, where a backbone has these options
SIZES: dict[str, Any] = {"hidden": 16, "layers": 2, "heads": 2, "rbf": 8, "cutoff": 5.0}
#: what is tried where an objective has this option and refuses its default
FALLBACK = {"head": "energy-gradient"}


class Cell(NamedTuple):
    """What came of a pair.

    Attributes:
        works: whether it was built and trained for a step.
        options: of the objective, beside its defaults, that it took.
        reason: why it was refused, with its defaults.
    """

    works: bool
    options: dict[str, Any]
    reason: str


def try_pair(objective: str, backbone: str, sample: Sample) -> Cell:
    """Build an objective around a backbone and train it for one step.

    Args:
        objective: registry name.
        backbone: registry name.
        sample: a batch with all labels.

    Returns:
        The outcome; a pair that is refused when it is built is none that works.

    Raises:
        NonFiniteError: it was built, but its loss or a gradient is not finite, or none reaches the backbone.
    """
    known = inspect.signature(objective_class(objective).__init__).parameters
    choices: list[dict[str, Any]] = [{}]
    choices += [{key: value} for key, value in FALLBACK.items() if key in known]
    reason = ""
    for options in choices:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                built = create_objective(objective, backbone=small_backbone(backbone), **options)
        except ConfigError as error:
            reason = reason or str(error)
            continue
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3)
        for seed in range(2):
            loss = built(sample, torch.Generator().manual_seed(seed))["loss"]
            optimizer.zero_grad()
            loss.backward()
            grads = [p.grad for p in built.network.backbone.parameters() if p.grad is not None]
            if not torch.isfinite(loss) or not all(bool(torch.isfinite(g).all()) for g in grads):
                raise NonFiniteError(f"{objective} with {backbone}: the loss or a gradient is not finite")
            if not any(bool(g.any()) for g in grads):
                raise NonFiniteError(f"{objective} with {backbone}: no gradient reaches the backbone")
            optimizer.step()
        return Cell(True, options, reason)
    return Cell(False, {}, reason)


def small_backbone(name: str) -> Backbone:
    """Return a backbone of :data:`SIZES`, as far as it has these options."""
    known = inspect.signature(backbone_class(name).__init__).parameters
    return create_backbone(name, **{key: value for key, value in SIZES.items() if key in known})


def labelled_sample() -> Sample:
    """Return two frames of the bundled ethanol set, with their labels."""
    frames = open_dataset("ethanol-gfn2")
    return collate([sample_from_frame(frames[i], SIZES["cutoff"], i) for i in range(2)])


def all_pairs(
    objectives: Sequence[str] | None = None, backbones: Sequence[str] | None = None
) -> dict[tuple[str, str], Cell]:
    """Return the outcome of every pair, by names; plug-ins included where no names are given."""
    rows, columns = objectives or list_objectives(), backbones or list_backbones()
    sample = labelled_sample()
    return {(row, column): try_pair(row, column, sample) for row in rows for column in columns}


def matrix_table(cells: dict[tuple[str, str], Cell]) -> str:
    """Return the outcomes as a Markdown table, the reasons of those that do not work below it."""
    rows, columns = (list(dict.fromkeys(pair[axis] for pair in cells)) for axis in range(2))
    lines = [
        f"| objective | {' | '.join(f'`{name}`' for name in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    notes: list[str] = []
    for row in rows:
        shown = []
        for column in columns:
            cell = cells[row, column]
            if cell.works:
                shown.append(", ".join(f"`{k}: {v}`" for k, v in cell.options.items()) or "yes")
            else:
                notes.append(f"{row} with {column}: {cell.reason}")
                shown.append(f"refused ({len(notes)})")
        lines.append(f"| `{row}` | {' | '.join(shown)} |")
    works = sum(cell.works for cell in cells.values())
    lines += ["", f"{works} of {len(cells)} pairs train. Refused when built, in these words:", ""]
    return "\n".join([*lines, *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def main(path: Path) -> None:
    """Write the table anew in a Markdown file that holds the two marks."""
    write_between(path, BEGIN, END, matrix_table(all_pairs()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
