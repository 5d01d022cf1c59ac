"""What a report is made of: a model, the run it comes from, and what lies beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ffpretrain.artifacts import load_potential
from ffpretrain.datasets import open_dataset
from ffpretrain.datasets.frames import Dataset
from ffpretrain.datasets.splits import load_splits
from ffpretrain.errors import DataError
from ffpretrain.evaluation import Predictions, predict
from ffpretrain.potential import Model
from ffpretrain.report.figures import parity_script
from ffpretrain.report.landscapes import add_landscape
from ffpretrain.report.page import Page
from ffpretrain.report.sections import (
    card_section,
    dynamics_section,
    errors_section,
    training_section,
    validation_section,
)
from ffpretrain.training.folder import MODEL_FILE, RECIPE_FILE, SPLITS_FILE

#: frames evaluated for the parity plots, the first of those that are there
MOST_FRAMES = 300


def write_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    frames: Dataset | None = None,
    limit: int = MOST_FRAMES,
    beside: str | os.PathLike[str] | None = None,
) -> Path:
    """Write one self-contained HTML page about a model; nothing is loaded when it is opened.

    Args:
        source: folder of a training run (with its curves, its held-out frames, and whatever
            ``ffpretrain md``, ``validate`` and ``landscape`` wrote into folders in it), a model file, or a
            named model.
        out: the page; its folder is made.
        frames: labelled frames for the parity plots; None takes the run's held-out ones where its data are at
            hand.
        limit: largest number of frames evaluated.
        beside: another folder whose runs of dynamics, validations and landscapes are shown.

    Returns:
        The page's path.

    Raises:
        DataError: the folder holds no model, or the page cannot be written.
        UserError: the model, or frames that do not fit it.
    """
    folder = Path(source) if Path(source).is_dir() else None
    if beside is not None and not Path(beside).is_dir():
        raise DataError(f"{beside}: is no folder; give one that holds runs, landscapes or validations")
    model = load_potential(_model_of(source, folder))
    card = model.card
    title = card.name if card is not None else Path(source).stem
    page = Page(title, card.description if card is not None else "")
    if card is not None:
        page.add("Model", *card_section(card))
    note = ""
    if frames is None and folder is not None:
        frames, note = _held_out(folder)
    if folder is not None and (log := folder / "logs" / "metrics.csv").is_file():
        page.add("Training", *training_section(log))
    if frames is not None:
        what = frames.metadata.name
        page.add("Errors", *errors_section(_predict(model, frames, limit), what))
        page.use("parity", parity_script())
    elif note:
        page.add("Errors", f"<p>{note}</p>")
    if folder is not None or beside is not None:
        _add_folders(page, [path for path in (folder, beside) if path is not None], frames)
    return _write(page, Path(out))


def _model_of(source: str | os.PathLike[str], folder: Path | None) -> str:
    if folder is None:
        return str(source)
    found = [folder / MODEL_FILE] if (folder / MODEL_FILE).is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise DataError(
            f"{folder}: holds no model file; give the folder of a training run or a model, and --beside "
            f"{folder} where this one holds its dynamics, validation or landscape"
        )
    if len(found) != 1:
        raise DataError(f"{folder}: holds {len(found)} model files; give the path of one")
    return str(found[0])


def _held_out(folder: Path) -> tuple[Dataset | None, str]:
    """Return a run's test frames, or else its validation frames; where they are not here, a sentence."""
    from ffpretrain.recipes import load_recipe

    if not (folder / RECIPE_FILE).is_file() or not (folder / SPLITS_FILE).is_file():
        return None, ""
    data = load_recipe(folder / RECIPE_FILE).data
    try:
        every = open_dataset(data.source, *([data.molecule] if data.molecule else []), **data.options)
    except DataError as error:
        return None, f"The run's data are not here ({error}); give labelled frames to see errors."
    parts = load_splits(folder / SPLITS_FILE, every).apply(every)
    return (parts["test"] if len(parts["test"]) else parts["val"]), ""


def _predict(model: Model, frames: Dataset, limit: int) -> Predictions:
    return predict(model, frames[: min(limit, len(frames))])


def _add_folders(page: Page, folders: Sequence[str | os.PathLike[str]], frames: Dataset | None) -> None:
    inner = sorted(path for folder in folders for path in Path(folder).iterdir() if path.is_dir())
    dynamics = {path.name: path for path in inner if (path / "md.json").is_file()}
    if dynamics:
        page.add("Dynamics", *dynamics_section(dynamics, frames))
    for path in [*map(Path, folders), *inner]:
        if (path / "validation.json").is_file():
            page.add("Validation", *validation_section(path / "validation.json"))
    for path in inner:
        pictures = "landscape" in path.name and list(path.glob("*.png"))
        if pictures or (path / "landscape.json").is_file():
            add_landscape(page, path)


def _write(page: Page, out: Path) -> Path:
    temporary = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page.html(), encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(f"{out}: cannot be written ({error.strerror}); give --out a path you own") from None
    return out
