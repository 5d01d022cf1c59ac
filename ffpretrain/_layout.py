"""Makes the top-level folders ``md/`` and ``datasets/`` importable from a source checkout.

In a wheel the two folders lie inside the package as ``ffpretrain/md`` and ``ffpretrain/datasets`` and Python's
own importer finds them. In an editable install they stand beside ``ffpretrain/``: an installed top-level
package called ``datasets`` would hide Hugging Face's, so they are only ever imported under ``ffpretrain.``.
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


class SiblingFolderFinder:
    """Finds exactly ``ffpretrain.md`` and ``ffpretrain.datasets``, and nothing else."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of one of the two packages, from the wheel's place or the checkout's."""
        folder = _FOLDERS.get(fullname)
        if folder is None:
            return None
        for root in (_PACKAGE_ROOT / folder, _PACKAGE_ROOT.parent / folder):
            init = root / "__init__.py"
            if init.is_file():
                return importlib.util.spec_from_file_location(
                    fullname, init, submodule_search_locations=[str(root)]
                )
        return None


def install() -> None:
    """Register the finder once, ahead of the path-based importers."""
    if not any(finder is SiblingFolderFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, SiblingFolderFinder)  # type: ignore[arg-type]
