"""Fetching published datasets: resumed where a download broke off, checked, and never half in place.

pooch names the cache folder; it cannot resume, so the transfer itself is here.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ffpretrain._version import __version__
from ffpretrain.datasets import _io
from ffpretrain.datasets.cache import cache_folder
from ffpretrain.datasets.catalog import Download, RemoteFile, find_download
from ffpretrain.errors import DataError

RECORD = "downloads.json"
TIMEOUT = 30.0
_CHUNK = 1 << 18

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes present and the bytes expected (None where unknown)."""


@dataclass(frozen=True)
class FetchedFile:
    """One file in place.

    Attributes:
        path: where it lies.
        sha256: computed from what lies there.
        verified: whether the publisher's checksum was compared; False means that there is none.
        fetched: False where the file was in place already.
        resumed_from: bytes that an earlier, broken download had left.
    """

    path: Path
    sha256: str
    verified: bool
    fetched: bool
    resumed_from: int = 0


def download(
    name: str, root: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> list[FetchedFile]:
    """Fetch a dataset of the catalog into the cache folder, and unpack it where it is an archive.

    Files in place are checked and kept. What was fetched is recorded with its SHA-256 in ``downloads.json``.

    Args:
        name: such as ``"rmd17"`` or ``"md17-aspirin"``.
        root: folder in place of the dataset's own in the cache folder.
        progress: told of every block that arrives.

    Raises:
        DataError: the name is unknown, the network or the publisher fails, or a checksum is wrong.
    """
    chosen = find_download(name)
    folder = Path(root).expanduser() if root is not None else cache_folder() / chosen.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    try:
        results = [fetch(file, folder, progress) for file in chosen.files]
    except DataError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where nothing at all arrived
        raise
    _unpack(chosen, folder)
    return results


def fetch(file: RemoteFile, folder: Path, progress: Progress | None = None) -> FetchedFile:
    """Fetch one file into ``folder``: into ``NAME.part`` first, continued where an earlier attempt broke off.

    Args:
        file: what to fetch.
        folder: must exist.
        progress: told of every block that arrives.

    Raises:
        DataError: no location answers, the transfer breaks off, or the checksum is wrong.
    """
    target = folder / file.name
    if target.is_file():
        return _present(file, target)
    part = folder / f"{file.name}.part"
    with _locked(part) as handle:
        resumed_from = _from_any(file, handle, target, progress)
        handle.flush()
        os.fsync(handle.fileno())
        _check(file, part)
        sha256 = _io.digest(part, "sha256")
        part.replace(target)
    _tag(part).unlink(missing_ok=True)
    _record(folder, file, sha256)
    return FetchedFile(target, sha256, file.md5 is not None, True, resumed_from)


def _present(file: RemoteFile, target: Path) -> FetchedFile:
    """Check a file that is in place against the publisher's checksum, or the one recorded when it came."""
    sha256 = _io.sha256_of(target)
    if file.md5 is not None:
        right = _io.digest(target, "md5") == file.md5
    else:
        recorded = _read_record(target.parent).get(file.name, {}).get("sha256")
        right = recorded in (None, sha256)
    if not right:
        raise DataError(f"{target}: is damaged (its checksum is wrong); delete it and download again")
    return FetchedFile(target, sha256, file.md5 is not None, False)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open the partial file for one process only."""
    try:
        handle = part.open("a+b")
    except OSError as error:
        raise DataError(f"{part}: cannot be written ({error.strerror}); choose another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{part}: another process is downloading it; wait for that one") from error
        try:
            yield handle
        finally:
            if part.is_file() and part.stat().st_size == 0:
                part.unlink()


def _from_any(file: RemoteFile, handle: BinaryIO, target: Path, progress: Progress | None) -> int:
    """Fetch from the first location that answers; return where the transfer was resumed."""
    problems = []
    for url in file.urls:
        try:
            return _transfer(url, file, handle, progress)
        except urllib.error.HTTPError as error:
            problems.append(f"{_host(url)} answers {error.code} {error.reason}")
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            problems.append(f"{_host(url)}: {' '.join(str(reason).split()) or type(error).__name__}")
    raise DataError(
        f"{file.name}: cannot be downloaded ({'; '.join(problems)}); check the network and run the same "
        f"command to go on, or fetch {file.urls[0]} elsewhere and save it as {target}"
    )


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).netloc


def _transfer(url: str, file: RemoteFile, handle: BinaryIO, progress: Progress | None) -> int:
    """Append what is missing of one file; return the number of bytes there were."""
    part = Path(handle.name)
    start = handle.seek(0, os.SEEK_END)
    headers = {"User-Agent": f"ffpretrain/{__version__}"}
    validator = _validator(part, url)
    if start and (validator or file.md5):
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    elif start:
        # without a checksum or a validator, two versions of the file could be glued together unseen
        start = _restart(handle)
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        if error.headers.get("Content-Range", "") == f"bytes */{start}":
            return start
        _restart(handle)
        return _transfer(url, file, handle, progress)
    with response:
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise http.client.HTTPException("answered with another part than was asked for")
        elif response.status == http.HTTPStatus.OK:
            start = _restart(handle)
        else:
            raise http.client.HTTPException(f"answers {response.status} without the file")
        _remember_validator(part, url, response.headers)
        _copy(response, handle, file, start, progress)
    return start


def _copy(
    response: http.client.HTTPResponse,
    handle: BinaryIO,
    file: RemoteFile,
    start: int,
    progress: Progress | None,
) -> None:
    length = response.headers.get("Content-Length")
    expected = start + int(length) if length else file.size
    done = start
    while block := response.read(_CHUNK):
        handle.write(block)
        done += len(block)
        if progress is not None:
            progress(file.name, done, expected)
    if expected is not None and done != expected:
        handle.flush()
        raise http.client.HTTPException(f"broke off after {done:,} of {expected:,} bytes")


def _restart(handle: BinaryIO) -> int:
    handle.seek(0)
    handle.truncate()
    return 0


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _validator(part: Path, url: str) -> str | None:
    """Return the strong ETag under which this location sent the bytes at hand."""
    try:
        content = json.loads(_tag(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # absent or damaged: the transfer starts anew
    return content.get("etag") if content.get("url") == url else None


def _remember_validator(part: Path, url: str, headers: Any) -> None:
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        text = json.dumps({"url": url, "etag": etag})
        _io.write_atomically(_tag(part), lambda file: _write_text(file, text))
    else:
        _tag(part).unlink(missing_ok=True)


def _check(file: RemoteFile, part: Path) -> None:
    """Compare with the publisher's checksum; a wrong file is deleted."""
    if file.md5 is None:
        return
    found = _io.digest(part, "md5")
    if found != file.md5:
        part.unlink()
        _tag(part).unlink(missing_ok=True)
        raise DataError(
            f"{file.name}: the download has MD5 {found}, its publisher gives {file.md5}; it was deleted, "
            "download again"
        )


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); delete it") from error
    return record


def _record(folder: Path, file: RemoteFile, sha256: str) -> None:
    record = _read_record(folder)
    record[file.name] = {"url": file.urls[0], "sha256": sha256, "verified": file.md5 is not None}
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    _io.write_atomically(folder / RECORD, lambda path: _write_text(path, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _unpack(chosen: Download, folder: Path) -> None:
    """Unpack archives into a scratch folder first, then move file by file into place."""
    if all((folder / name).is_file() for name in chosen.unpacked):
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as scratch:
        for file in chosen.files:
            _extract(folder / file.name, Path(scratch))
        for source in sorted(Path(scratch).rglob("*")):
            if source.is_file():
                target = folder / source.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
    missing = [name for name in chosen.unpacked if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: the archive does not hold {missing[0]}; the publisher may have changed it"
        )


def _extract(archive: Path, scratch: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as content:
                for member in content.infolist():
                    # file names only: nothing can be written outside the scratch folder
                    name = Path(member.filename).name
                    if name.endswith(".npz"):
                        with content.open(member) as source, (scratch / name).open("wb") as target:
                            shutil.copyfileobj(source, target)
        else:
            with tarfile.open(archive) as content:
                content.extractall(scratch, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: cannot be unpacked ({reason}); delete it and download again") from error
