"""Named models: files that come with the package, each with its SHA-256 in ``registry.json``.

Importing this module loads neither torch nor safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ffpretrain.errors import ArtifactError, nearest

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard

__all__ = ["list_models", "model_card", "model_path", "register_model"]

_FOLDER = Path(__file__).resolve().parent
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class Entry(NamedTuple):
    """A line of the registry.

    Attributes:
        file: name of the file beside the registry.
        sha256: its checksum.
        description: one line.
    """

    file: str
    sha256: str
    description: str


def list_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(read_registry())


def model_path(name: str) -> Path:
    """Return the file of a named model, its checksum verified.

    Raises:
        ArtifactError: no model has this name (the nearest are named), or its file is missing or damaged.
    """
    read_model(name)
    return _FOLDER / _entry(name).file


def model_card(name: str) -> ModelCard:
    """Return the card of a named model; as :func:`model_path`."""
    from ffpretrain.artifacts.files import card_of_bytes

    return card_of_bytes(read_model(name), str(_FOLDER / _entry(name).file))


def read_model(name: str) -> bytes:
    """Return the content of a named model's file, its checksum verified.

    Raises:
        ArtifactError: as :func:`model_path`.
    """
    from ffpretrain.artifacts.files import open_model_file

    entry = _entry(name)
    with open_model_file(_FOLDER / entry.file) as file:
        content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise ArtifactError(
            f"{_FOLDER / entry.file}: the named model {name!r} is damaged (SHA-256 {found[:12]}…, registered "
            f"{entry.sha256[:12]}…); reinstall ffpretrain"
        )
    return content


def locate(model: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Return the file that a user means, and the model's name where it is a named one.

    Args:
        model: a name, which comes first, or a path.

    Raises:
        ArtifactError: neither a name nor something that exists; the nearest names are given.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise ArtifactError(f"a model is given by name or path, not as {type(model).__name__}")
    registry = read_registry()
    if isinstance(model, str) and model in registry:
        return _FOLDER / registry[model].file, model
    path = Path(model)
    if path.exists():
        return path, None
    if isinstance(model, str) and path.name == model and not path.suffix:
        known = nearest(model, registry) if registry else "; no named models are installed: give a file"
        raise ArtifactError(f"no model is called {model!r} and no file either{known}")
    raise ArtifactError(f"{path}: no such model file; check the path")


def register_model(name: str, path: str | os.PathLike[str]) -> Entry:
    """Copy a model file into the package's folder and enter it in the registry, replacing one of that name.

    For those who maintain the package: ``python -m ffpretrain.zoo add NAME FILE``.

    Args:
        name: lower-case letters, digits and single hyphens; must be the name in the file's card.
        path: of the model file, which is loaded to prove that it is whole.

    Raises:
        ArtifactError: a name of another form or other than the card's, a file that does not load, or a folder
            that cannot be written.
    """
    from ffpretrain.artifacts import load_potential
    from ffpretrain.artifacts.files import open_model_file, write_file

    if not _NAME.fullmatch(name):
        raise ArtifactError(f"model name {name!r}: use lower-case letters, digits and single hyphens")
    card = load_potential(os.fspath(path)).card
    if card is None or card.name != name:
        said = None if card is None else card.name
        raise ArtifactError(f"{path}: its card calls the model {said!r}, not {name!r}; export it anew")
    with open_model_file(Path(path)) as file:
        content = file.read()
    entry = Entry(f"{name}.safetensors", hashlib.sha256(content).hexdigest(), card.description)
    registry = {**read_registry(), name: entry}
    write_file(_FOLDER / entry.file, content)
    text = json.dumps(
        {key: registry[key]._asdict() for key in sorted(registry)}, indent=2, ensure_ascii=False
    )
    write_file(_FOLDER / "registry.json", (text + "\n").encode())
    return entry


def read_registry() -> dict[str, Entry]:
    """Return the entries of ``registry.json`` by name.

    Raises:
        ArtifactError: the registry is missing or damaged.
    """
    file = _FOLDER / "registry.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): Entry(**fields) for name, fields in raw.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file}: the registry of named models is missing or damaged; reinstall ffpretrain"
        ) from error


def _entry(name: str) -> Entry:
    registry = read_registry()
    if name not in registry:
        raise ArtifactError(f"no model is called {name!r}{nearest(name, registry)}")
    return registry[name]
