"""The folder of a run: whether one may start or go on there, and what it was started with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ffpretrain.datasets.splits import PARTS, Splits, load_splits
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.recipes.reading import read_yaml
from ffpretrain.training.checkpoints import LAST
from ffpretrain.training.config import Recipe, validate_recipe

RECIPE_FILE, SPLITS_FILE, MODEL_FILE = "recipe.yaml", "splits.json", "model.safetensors"
_FOLDERS = ("checkpoints", "logs")
#: keys that change no number of the training; a resumed run may differ in them
HARMLESS = {"name", "description", "licence", "citation", "data.options.root", "trainer.threads"}
#: files that are known by checksum, so that they may have moved
_PLACES = {"data.source", "data.molecule", "data.split_file"}


def check_folder(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a run cannot use.

    Args:
        out: of the run.
        recipe: that is to be run.
        resume: the run in the folder is to go on.
        overwrite: the run in the folder is to be replaced.

    Raises:
        ConfigError: both flags; a run is there and neither flag is given; the recipe differs from that of the
            run.
        DataError: nothing is there to resume.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    if resume:
        if not (out / "checkpoints" / LAST).is_file():
            mend = "start again with --overwrite" if _run_files(out) else "leave out --resume"
            raise DataError(
                f"{out}: holds no checkpoint to resume from (one is written at each validation); {mend}"
            )
        _check_same(out / RECIPE_FILE, recipe)
        return
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; give --out a folder")
    if _run_files(out) and not overwrite:
        raise ConfigError(
            f"{out}: already holds a run; go on with --resume, replace it with --overwrite, or give "
            "another --out"
        )


def start_folder(out: Path, recipe: Recipe) -> None:
    """Make the folder of a new run, without what an earlier run left there, and write its recipe.

    Raises:
        DataError: the folder cannot be written.
    """
    for path in _run_files(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f".{RECIPE_FILE}.part"
        temporary.write_text(recipe_text(recipe), encoding="utf-8")
        temporary.replace(out / RECIPE_FILE)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); give --out a folder you may write"
        ) from error


def check_splits(out: Path, splits: Splits) -> None:
    """Refuse to resume with other frames than the run was started with.

    Raises:
        DataError: the saved split, or the checksum of the data, differs.
    """
    path = out / SPLITS_FILE
    if not path.is_file():
        return
    saved = load_splits(path)
    if dict(saved.sha256) != dict(splits.sha256):
        raise DataError(f"{path}: the run was started with other data files; resume with those, by checksum")
    for part in PARTS:
        if not np.array_equal(saved[part], splits[part]):
            raise DataError(
                f"{path}: the {part} frames of the run are others; resume with the same data and split"
            )


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe with all its defaults, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes differ and that a training depends on."""
    a, b = (_flat(recipe.model_dump(mode="json")) for recipe in (one, other))
    return sorted(key for key in (a.keys() | b.keys()) - HARMLESS if a.get(key) != b.get(key))


def _check_same(path: Path, recipe: Recipe) -> None:
    if not path.is_file():
        return  # a run that was started from Python without a recipe file: the weights' shapes are compared
    started = validate_recipe(read_yaml(path), str(path))
    keys = differing_keys(started, recipe)
    if keys:
        was, now = (_flat(r.model_dump(mode="json")).get(keys[0]) for r in (started, recipe))
        more = f" and {len(keys) - 1} more ({', '.join(keys[1:4])})" if len(keys) > 1 else ""
        raise ConfigError(
            f"{path}: the run was started with {keys[0]}={was!r}, not {now!r}{more}; resume with the same "
            "recipe, or start a new run from its weights with model.pretrained"
        )


def _flat(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one with dotted keys; an empty one counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = Path(value).name if name in _PLACES and isinstance(value, str) else value
    return flat


def _run_files(out: Path) -> list[Path]:
    names = (RECIPE_FILE, SPLITS_FILE, MODEL_FILE, *_FOLDERS)
    return [out / name for name in names if (out / name).exists()]
