"""Downloads, against a server on this machine: resume, checksums, mirrors, and no network at all."""

import fcntl
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffpretrain.datasets import catalog, open_dataset
from ffpretrain.datasets.catalog import CATALOG, Download, RemoteFile
from ffpretrain.datasets.download import download, fetch
from ffpretrain.errors import DataError

BODY = np.random.default_rng(0).bytes(1_000_000)
MD5 = hashlib.md5(BODY).hexdigest()
SHA256 = hashlib.sha256(BODY).hexdigest()
# nothing listens on port 9 of this machine
NOWHERE = "http://127.0.0.1:9/file.bin"


class Server:
    """Serves bytes by path, with ranges; can break off, forget ranges, or change its mind."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file.bin": BODY}
        self.etag: str | None = '"v1"'
        self.break_after: int | None = None
        self.ranges = True
        self.status: int | None = None
        self.requests: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/file.bin") -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.requests.append(wanted)
        body = self.files.get(request.path)
        if self.status is not None or body is None:
            request.send_error(self.status or 404)
            return
        same = request.headers.get("If-Range") in (None, self.etag)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges and same else 0
        if start >= len(body):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(body)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.etag:
            request.send_header("ETag", self.etag)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        stop = len(body) if self.break_after is None else start + self.break_after
        request.wfile.write(body[start:stop])
        if stop < len(body):
            request.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_fetch_verifies_and_records(tmp_path: Path, server: Server) -> None:
    seen: list[tuple[str, int, int | None]] = []
    result = fetch(RemoteFile("file.bin", (server.url(),), MD5), tmp_path, lambda *step: seen.append(step))
    assert (result.sha256, result.verified, result.fetched, result.resumed_from) == (SHA256, True, True, 0)
    assert result.path.read_bytes() == BODY
    assert names(tmp_path) == {"file.bin", "downloads.json"}
    assert seen[-1] == ("file.bin", len(BODY), len(BODY))
    assert json.loads((tmp_path / "downloads.json").read_text())["file.bin"]["sha256"] == SHA256


@pytest.mark.parametrize("md5", [MD5, None])
def test_broken_download_is_resumed(tmp_path: Path, server: Server, md5: str | None) -> None:
    server.break_after = 400_000
    file = RemoteFile("file.bin", (server.url(),), md5)
    with pytest.raises(DataError, match=r"broke off after 400,000 of 1,000,000 bytes.*same command to go on"):
        fetch(file, tmp_path)
    assert "file.bin" not in names(tmp_path)
    assert (tmp_path / "file.bin.part").stat().st_size == 400_000
    server.break_after = None
    result = fetch(file, tmp_path)
    assert server.requests == [None, "bytes=400000-"]
    assert (result.resumed_from, result.sha256) == (400_000, SHA256)
    assert names(tmp_path) == {"file.bin", "downloads.json"}


def test_several_breaks(tmp_path: Path, server: Server) -> None:
    server.break_after = 300_000
    file = RemoteFile("file.bin", (server.url(),), MD5)
    for _ in range(3):
        with pytest.raises(DataError, match="broke off"):
            fetch(file, tmp_path)
    assert fetch(file, tmp_path).sha256 == SHA256
    assert server.requests == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_server_without_ranges_starts_again(tmp_path: Path, server: Server) -> None:
    server.break_after = 400_000
    file = RemoteFile("file.bin", (server.url(),), MD5)
    with pytest.raises(DataError):
        fetch(file, tmp_path)
    server.break_after, server.ranges = None, False
    result = fetch(file, tmp_path)
    assert (result.resumed_from, result.sha256) == (0, SHA256)


def test_file_that_changed_meanwhile_is_not_glued(tmp_path: Path, server: Server) -> None:
    server.break_after = 400_000
    file = RemoteFile("file.bin", (server.url(),))
    with pytest.raises(DataError):
        fetch(file, tmp_path)
    server.break_after, server.etag = None, '"v2"'
    server.files["/file.bin"] = BODY[::-1]
    result = fetch(file, tmp_path)
    assert result.resumed_from == 0
    assert result.path.read_bytes() == BODY[::-1]


def test_without_checksum_and_validator_nothing_is_resumed(tmp_path: Path, server: Server) -> None:
    server.etag = None
    server.break_after = 400_000
    file = RemoteFile("file.bin", (server.url(),))
    with pytest.raises(DataError):
        fetch(file, tmp_path)
    server.break_after = None
    assert fetch(file, tmp_path).resumed_from == 0
    assert server.requests == [None, None]


def test_complete_part_is_only_checked(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file.bin.part").write_bytes(BODY)
    result = fetch(RemoteFile("file.bin", (server.url(),), MD5), tmp_path)
    assert (result.resumed_from, result.sha256) == (len(BODY), SHA256)


@pytest.mark.parametrize("left", [b"", b"another beginning"])
def test_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server, left: bytes) -> None:
    if left:
        (tmp_path / "file.bin.part").write_bytes(left)
    wrong = "0" * 32 if not left else MD5
    with pytest.raises(DataError, match=r"has MD5 .*, its publisher gives .*it was deleted") as caught:
        fetch(RemoteFile("file.bin", (server.url(),), wrong), tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"check the network.*fetch http://127\.0\.0\.1:9.*save it as"
    ) as caught:
        fetch(RemoteFile("file.bin", (NOWHERE,), MD5), tmp_path)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_publisher_refuses(tmp_path: Path, server: Server, status: int) -> None:
    server.status = status
    with pytest.raises(DataError, match=f"answers {status}"):
        fetch(RemoteFile("file.bin", (server.url(),), MD5), tmp_path)
    assert names(tmp_path) == set()


def test_mirror_is_tried(tmp_path: Path, server: Server) -> None:
    result = fetch(RemoteFile("file.bin", (NOWHERE, server.url()), MD5), tmp_path)
    assert result.sha256 == SHA256


def test_file_in_place_is_kept(tmp_path: Path, server: Server) -> None:
    file = RemoteFile("file.bin", (server.url(),), MD5)
    fetch(file, tmp_path)
    again = fetch(file, tmp_path)
    assert (again.fetched, again.verified) == (False, True)
    assert len(server.requests) == 1


@pytest.mark.parametrize("md5", [MD5, None])
def test_damaged_file_in_place(tmp_path: Path, server: Server, md5: str | None) -> None:
    file = RemoteFile("file.bin", (server.url(),), md5)
    fetch(file, tmp_path)
    (tmp_path / "file.bin").write_bytes(BODY[:-1])
    with pytest.raises(DataError, match=r"is damaged.*download again"):
        fetch(file, tmp_path)


def test_two_processes_do_not_mix(tmp_path: Path, server: Server) -> None:
    with (tmp_path / "file.bin.part").open("a+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is downloading it"):
            fetch(RemoteFile("file.bin", (server.url(),), MD5), tmp_path)


def test_dataset_from_archive(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for part, count in (("train", 3), ("test", 2)):
            arrays = io.BytesIO()
            shape = (count, 2, 3)
            np.savez(arrays, z=np.array([1, 1]), R=np.ones(shape), F=np.ones(shape), E=np.ones(count))
            archive.writestr(f"../outside/ethanol_ccsd_t-{part}.npz", arrays.getvalue())
    server.files["/ethanol_ccsd_t.zip"] = stream.getvalue()
    known = CATALOG["md17-ethanol-ccsd-t"]
    remote = RemoteFile(known.files[0].name, (server.url("/ethanol_ccsd_t.zip"),))
    monkeypatch.setitem(
        catalog.CATALOG,
        "md17-ethanol-ccsd-t",
        Download(known.summary, known.folder, (remote,), known.unpacked),
    )
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path / "cache"))
    (file,) = download("md17-ethanol-ccsd-t")
    assert not file.verified
    assert not (tmp_path / "cache" / "outside").exists()
    dataset = open_dataset("md17", "ethanol-ccsd-t")
    assert {name: len(part) for name, part in dataset.metadata.splits.items()} == {"train": 3, "test": 2}


def test_rmd17_archive_is_unpacked(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = io.BytesIO()
    np.savez(
        arrays,
        nuclear_charges=np.array([1, 1]),
        coords=np.zeros((4, 2, 3)),
        energies=np.zeros(4),
        forces=np.zeros((4, 2, 3)),
    )
    content = {
        "rmd17/npz_data/rmd17_ethanol.npz": arrays.getvalue(),
        "rmd17/splits/index_train_01.csv": b"2\n0\n",
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:bz2") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    server.files["/rmd17.tar.bz2"] = stream.getvalue()
    remote = RemoteFile(
        "rmd17.tar.bz2", (server.url("/rmd17.tar.bz2"),), hashlib.md5(stream.getvalue()).hexdigest()
    )
    monkeypatch.setitem(
        catalog.CATALOG, "rmd17", Download("", "rmd17", (remote,), ("rmd17/npz_data/rmd17_ethanol.npz",))
    )
    monkeypatch.setenv("FFPRETRAIN_CACHE", str(tmp_path))
    assert download("rmd17")[0].verified
    assert open_dataset("rmd17", "ethanol").metadata.splits["train_01"].tolist() == [2, 0]
    assert names(tmp_path / "rmd17") == {"rmd17", "rmd17.tar.bz2", "downloads.json"}


def test_unknown_dataset_and_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'md17-aspirin'"):
        download("md17-asprin")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        download("qm9", tmp_path / "file" / "folder")


def test_no_network_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFile("file.bin", (NOWHERE,))
    monkeypatch.setitem(catalog.CATALOG, "qm9", Download("", "qm9", (remote,)))
    with pytest.raises(DataError, match="check the network"):
        download("qm9", tmp_path / "qm9")
    assert not (tmp_path / "qm9").exists()


def test_catalog_gives_checksums_where_publishers_do() -> None:
    verified = {name for name, known in CATALOG.items() if all(file.md5 for file in known.files)}
    assert verified == {"rmd17", "qm9"}
    assert all(file.urls[0].startswith("http") for known in CATALOG.values() for file in known.files)
