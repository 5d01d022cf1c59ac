"""The one part of the packaging that ``pyproject.toml`` cannot say: which packages and data files there are.

``md/`` and ``datasets/`` stand at the top of the repository and are installed as ``ffpretrain.md`` and
``ffpretrain.datasets``. The lists are computed from the three folders, so that nothing new is forgotten.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
FOLDERS = {"ffpretrain": "ffpretrain", "ffpretrain.md": "md", "ffpretrain.datasets": "datasets"}
CODE = {".py", ".pyc", ".pyo"}


def packages_below(name: str, folder: str) -> list[str]:
    """Return the dotted names of the package in ``folder`` and of all packages inside it."""
    return [name, *(f"{name}.{inner}" for inner in find_packages(str(ROOT / folder)))]


def data_files(name: str, packages: set[str]) -> list[str]:
    """Return the paths, relative to a package's folder, of the files in it that are not code.

    A folder without an ``__init__.py`` belongs to the package above it.
    """
    top = max((top for top in FOLDERS if name == top or name.startswith(f"{top}.")), key=len)
    folder = ROOT.joinpath(FOLDERS[top], *name[len(top) + 1 :].split("."))
    inner = [
        folder / other[len(name) + 1 :].replace(".", "/")
        for other in packages
        if other.startswith(f"{name}.")
    ]
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix not in CODE
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not any(path.is_relative_to(other) for other in inner)
    ]


PACKAGES = sorted(package for name, folder in FOLDERS.items() for package in packages_below(name, folder))

setup(
    packages=PACKAGES,
    package_data={package: data_files(package, set(PACKAGES)) for package in PACKAGES},
)
