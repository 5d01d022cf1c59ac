"""What is done already, so that a long validation can be stopped and gone on with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ffpretrain.datasets._io import write_atomically
from ffpretrain.errors import DataError
from ffpretrain.md.output import write_text
from ffpretrain.md.validation.result import Check

FORMAT = "ffpretrain.md.validation.state"
VERSION = 1


@dataclass
class State:
    """Finished checks of one validation.

    Attributes:
        path: of the file.
        identity: what must be the same when the validation goes on.
        checks: by name.
        minimum: relaxed positions ``[N, 3]`` Å; None before they are known.
        reference: of the check on own frames.
        seconds: time spent so far.
    """

    path: Path
    identity: dict[str, Any]
    checks: dict[str, Check] = field(default_factory=dict)
    minimum: list[list[float]] | None = None
    reference: str | None = None
    seconds: float = 0.0

    def save(self) -> None:
        """Write the state, whole or not at all.

        Raises:
            DataError: the file cannot be written.
        """
        text = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "checks": {name: check.as_dict() for name, check in self.checks.items()},
            "minimum": self.minimum,
            "reference": self.reference,
            "seconds": self.seconds,
        }
        write_text(self.path, json.dumps(text, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path, identity: dict[str, Any]) -> State:
        """Read a state.

        Raises:
            DataError: there is none, it is damaged or newer, or of a validation with other settings.
        """
        if not path.exists():
            raise DataError(f"{path}: no validation to go on with; run once without --resume")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["version"] > VERSION:
                raise DataError(f"{path}: is of a newer package; update this one or start anew")
            checks = {name: Check.from_dict(values) for name, values in found["checks"].items()}
            state = cls(
                path, found["identity"], checks, found["minimum"], found["reference"], found["seconds"]
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: is damaged ({error}); start the validation anew") from error
        for key, now in json.loads(json.dumps(identity)).items():
            had = state.identity.get(key)
            if had != now:
                raise DataError(
                    f"{path}: that validation had {key}={_short(had)}, now it is {_short(now)}; go on with "
                    "its own settings (or start anew in another folder)"
                )
        return state


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as an ``.npz``, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_atomically(path, lambda temporary: np.savez(temporary, **arrays))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
