"""A log of labelled frames that survives being killed at any moment.

One line a frame: the CRC-32 of what follows, a space, JSON. The first line is the header. A line that was
not written to its end has a wrong checksum or no line feed; it is cut off when the journal is opened again.
Only the last line can be so: damage further up is an error.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ffpretrain.datasets.frames import Frame
from ffpretrain.errors import DataError

_SYNC_SECONDS = 1.0


class Journal:
    """The journal at ``path``, opened for this process alone.

    Args:
        path: the file; made with ``header`` where it does not exist.
        header: JSON-able; kept as the first line of a new journal.

    Attributes:
        header: the header, of the file where it was there before.
        entries: what was appended before, in order.

    Raises:
        DataError: the folder cannot be written to, another process holds the journal, or it is damaged.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - held open until close()
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(f"{path}: another process is writing it; wait for that run or stop it") from error
        self._synced = time.monotonic()
        try:
            lines = self._read_and_cut()
            self.header: dict[str, Any] = lines[0] if lines else header
            self.entries: list[dict[str, Any]] = lines[1:]
            if not lines:
                self.append(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry; it is kept even if the process is killed right after."""
        payload = json.dumps(entry, allow_nan=False).encode()
        try:
            self._file.write(b"%08x %b\n" % (zlib.crc32(payload), payload))
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:  # against a power cut
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from error

    def restart(self, header: dict[str, Any]) -> None:
        """Drop every entry and begin anew with another header."""
        self._file.truncate(0)
        self.header, self.entries = header, []
        self.append(header)

    def close(self) -> None:
        """Close the file and let others have it."""
        self._file.close()

    def remove(self) -> None:
        """Delete the journal: its entries are kept elsewhere."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _read_and_cut(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        sound, entries = 0, []
        lines = self._file.readlines()
        for number, line in enumerate(lines, start=1):
            checksum, _, payload = line.rstrip(b"\n").partition(b" ")
            whole = line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(payload)
            if not whole and number < len(lines):
                raise DataError(f"{self.path}: line {number} is damaged; delete the file to begin anew")
            if whole:
                entries.append(json.loads(payload))
                sound += len(line)
        self._file.truncate(sound)
        return entries


def frame_to_json(frame: Frame) -> dict[str, Any]:
    """Return a labelled frame as JSON-able values that :func:`frame_from_json` takes back without loss."""
    entry: dict[str, Any] = {"positions": frame.positions.tolist(), "energy": frame.energy}
    for name in ("forces", "stress"):
        value = getattr(frame, name)
        entry[name] = None if value is None else value.tolist()
    return entry


def frame_from_json(entry: dict[str, Any], like: Frame) -> Frame:
    """Return the frame of an entry; what does not change from frame to frame is taken from ``like``."""
    from dataclasses import replace

    forces, stress = entry["forces"], entry["stress"]
    return replace(
        like,
        positions=np.array(entry["positions"], np.float64),
        energy=float(entry["energy"]),
        forces=None if forces is None else np.array(forces, np.float64),
        stress=None if stress is None else np.array(stress, np.float64),
    )
