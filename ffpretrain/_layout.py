"""Makes the top-level folders ``md/`` and ``datasets/`` importable from a source checkout.

In a wheel the two folders lie inside the package as ``ffpretrain/md`` and ``ffpretrain/datasets`` and
Python's own importer finds them. In a checkout they stand beside ``ffpretrain/``: an installed top-level
package called ``datasets`` would hide Hugging Face's, so they are only ever imported under ``ffpretrain.``.

The copy of ``ffpretrain`` that is running decides: its two folders are taken from inside it or from beside
it, never from another installation. Standing in a checkout with a wheel installed, ``python -c`` and
``python -m`` take the checkout whole and the console script takes the wheel whole.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE_ROOT = Path(__file__).resolve().parent
_FOLDERS = {"ffpretrain.md": "md", "ffpretrain.datasets": "datasets"}
# Beside an installed package lies site-packages, where a folder ``datasets`` belongs to somebody else.
_CHECKOUT_MARK = "pyproject.toml"


def _package_root(folder: str) -> Path | None:
    """Return the folder that holds one of the two packages, or None where neither place has it."""
    inside = _PACKAGE_ROOT / folder
    if (inside / "__init__.py").is_file():
        return inside
    beside = _PACKAGE_ROOT.parent / folder
    if (_PACKAGE_ROOT.parent / _CHECKOUT_MARK).is_file() and (beside / "__init__.py").is_file():
        return beside
    return None


class SiblingFolderFinder:
    """Finds exactly ``ffpretrain.md`` and ``ffpretrain.datasets``, and nothing else."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of one of the two packages, from the wheel's place or the checkout's."""
        folder = _FOLDERS.get(fullname)
        root = _package_root(folder) if folder is not None else None
        if root is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, root / "__init__.py", submodule_search_locations=[str(root)]
        )


def install() -> None:
    """Register the finder once, ahead of the path-based importers."""
    if not any(finder is SiblingFolderFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, SiblingFolderFinder)
