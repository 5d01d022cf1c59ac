"""Model files as bytes: finding, checking and writing them, and their header. No torch here."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ffpretrain.artifacts.card import ModelCard, parse_card
from ffpretrain.errors import ArtifactError

FORMAT = "ffpretrain"
_MAX_HEADER = 100_000_000  # the format's own limit, in bytes
_CHUNK = 1 << 20


class Header(NamedTuple):
    """What stands before the numbers in a ``.safetensors`` file.

    Attributes:
        metadata: text by name: ``format``, ``card`` and ``sha256`` in a model file.
        tensors: type, shape and place by tensor name, as the file has them.
        start: where the numbers begin, in bytes.
    """

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    start: int


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Raises:
        ArtifactError: the file cannot be read.
    """
    value = hashlib.sha256()
    with open_model_file(Path(path)) as file:
        while block := file.read(_CHUNK):
            value.update(block)
    return value.hexdigest()


def open_model_file(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        ArtifactError: no such file, a folder (the model files in it are named) or one that may not be read.
    """
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f"give {path / inside[0]}" if inside else "give a .safetensors file"
        raise ArtifactError(f"{path}: is a folder, not a model file; {hint}")
    if not path.exists():
        raise ArtifactError(f"{path}: no such model file; check the path")
    if not path.is_file():
        raise ArtifactError(f"{path}: is a device or pipe, not a model file; give a .safetensors file")
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def read_header(file: BinaryIO, size: int, where: str) -> Header:
    """Read the header of a ``.safetensors`` file; the numbers stay unread.

    Args:
        file: at its beginning.
        size: of the whole file in bytes.
        where: for messages.

    Raises:
        ArtifactError: a pickle or another kind of file, or a truncated or damaged one.
    """
    start = file.read(8)
    _refuse_pickles(start, where)
    if size < 8:
        raise _truncated(where, size, 8)
    length = int.from_bytes(start, "little")
    first = file.read(1)
    if not 2 <= length <= _MAX_HEADER or first not in (b"{", b""):
        raise ArtifactError(f"{where}: is not a .safetensors model file; give one that ffpretrain wrote")
    if size < 8 + length:
        raise _truncated(where, size, 8 + length)
    try:
        header = json.loads(first + file.read(length - 1))
        metadata = header.pop("__metadata__", {})
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        raise ArtifactError(f"{where}: its header is damaged; copy or download the file again") from error
    if size < 8 + length + end:
        raise _truncated(where, size, 8 + length + end)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or "card" not in metadata:
        raise ArtifactError(
            f"{where}: has no ffpretrain model card, so its weights cannot be interpreted; "
            "give a file that ffpretrain wrote"
        )
    return Header(metadata, header, 8 + length)


def content_sha256(header: Header, content: bytes) -> str:
    """Return the checksum that a model file carries: of its card, the places of its tensors and the numbers.

    Args:
        header: of the file.
        content: the whole file.
    """
    value = hashlib.sha256(str(header.metadata["card"]).encode())
    value.update(json.dumps(header.tensors, sort_keys=True, separators=(",", ":")).encode())
    value.update(memoryview(content)[header.start :])
    return value.hexdigest()


def check_content(header: Header, content: bytes, where: str) -> None:
    """Compare a file with the checksum it carries; one of format 0 carries none.

    Raises:
        ArtifactError: they differ.
    """
    if header.metadata.get("sha256") not in (None, content_sha256(header, content)):
        raise ArtifactError(
            f"{where}: is damaged (it does not match the checksum it carries); copy or download it again"
        )


def _truncated(where: str, size: int, expected: int) -> ArtifactError:
    return ArtifactError(
        f"{where}: is truncated ({size} of at least {expected} bytes); copy or download it again"
    )


def _refuse_pickles(start: bytes, where: str) -> None:
    """Refuse what only unpickling could read, by its first bytes: zip archives of torch and plain pickles."""
    if start[:4] == b"PK\x03\x04":
        kind = "a zip archive, as torch.save writes for checkpoints"
    elif start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "a pickle"
    else:
        return
    raise ArtifactError(
        f"{where}: is {kind}; unpickling runs code from the file, so it is refused: "
        "give the model's .safetensors file"
    )


def card_of(header: Header, where: str) -> ModelCard:
    """Return the card of a header.

    Raises:
        ArtifactError: the card is not JSON, does not fit or is of a newer format.
    """
    try:
        raw = json.loads(header.metadata["card"])
    except (ValueError, RecursionError, TypeError) as error:
        raise ArtifactError(f"{where}: its model card is damaged; copy or download the file again") from error
    if not isinstance(raw, dict) or "format_version" not in raw:
        raise ArtifactError(f"{where}: its model card has no format_version; the file is damaged")
    return parse_card(raw, where)


def card_of_bytes(blob: bytes, where: str) -> ModelCard:
    """Return the card of a file's content; as :func:`card_of`."""
    return card_of(read_header(io.BytesIO(blob), len(blob), where), where)


def card_of_file(path: Path) -> ModelCard:
    """Return the card of a file, reading its header only.

    Raises:
        ArtifactError: the file is missing, damaged, of another kind or newer than this package.
    """
    with open_model_file(path) as file:
        return card_of(read_header(file, os.fstat(file.fileno()).st_size, str(path)), str(path))


def write_file(path: Path, content: bytes) -> None:
    """Write a file in one step: it is there whole or not at all; its folder is made where absent.

    Raises:
        ArtifactError: the folder cannot be made or the file not written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{path}: cannot be written ({reason}); choose another place") from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
