"""Recipes that come with the package, one YAML file each, and how any recipe is loaded. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffpretrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ffpretrain.training.config import Recipe

__all__ = ["list_recipes", "load_recipe", "recipe_path"]

_FOLDER = Path(__file__).resolve().parent


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(recipe: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe.

    Args:
        recipe: a name of :func:`list_recipes`, which comes first, or a path.

    Raises:
        ConfigError: neither; the nearest names are offered.
    """
    if isinstance(recipe, str) and recipe in list_recipes():
        return _FOLDER / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.exists():
        return path
    if path.suffix or os.sep in str(recipe):
        raise ConfigError(
            f"{path}: no such recipe file; check the path, or give one of: {', '.join(list_recipes())}"
        )
    raise ConfigError(f"no recipe is called {str(recipe)!r}{nearest(str(recipe), list_recipes())}")


def load_recipe(
    recipe: str | os.PathLike[str],
    changes: Mapping[str, Any] | Sequence[str] = (),
    data: str | os.PathLike[str] | None = None,
) -> Recipe:
    """Load and check a recipe.

    Args:
        recipe: a name of :func:`list_recipes`, a YAML file, or the folder of a run.
        changes: values by dotted key such as ``trainer.max_steps``, or ``key=value`` words.
        data: replaces the recipe's data source; its reader options and molecule are dropped, being of
            another source.

    Raises:
        ConfigError: no such recipe, no YAML, an unknown key (the nearest is named) or a wrong value.
    """
    from ffpretrain.recipes.reading import apply_changes, read_yaml
    from ffpretrain.training.config import validate_recipe

    path = recipe_path(recipe)
    raw = read_yaml(path)
    if data is not None:
        raw = apply_changes(raw, {"data.source": str(data), "data.molecule": None, "data.options": {}})
    raw = apply_changes(raw, changes)
    return validate_recipe(raw, f"recipe {recipe}")
