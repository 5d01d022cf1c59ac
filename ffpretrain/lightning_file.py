"""Reads Lightning checkpoints of other programs without running code from them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffpretrain.artifacts.card import printable
from ffpretrain.artifacts.files import file_sha256, open_model_file
from ffpretrain.errors import ArtifactError

#: Classes that Lightning before 1.5 wrote as keys of its callbacks' states, and so into the checkpoints that
#: were published with "pre-training via denoising" and Frad (Lightning 1.3). They are read as empty classes
#: of the same name: nothing of Lightning is imported or run. Every other class is refused.
CALLBACKS = (
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class LightningCheckpoint:
    """What an import needs of a checkpoint.

    Attributes:
        path: of the file.
        sha256: of the file.
        state_dict: weights and buffers of the Lightning module.
        hparams: its hyper-parameters, of plain types.
        version: of Lightning; None where the file does not say.
        step: optimiser steps done; None likewise.
    """

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    hparams: dict[str, Any]
    version: str | None
    step: int | None


def read_lightning_checkpoint(path: Path) -> LightningCheckpoint:
    """Read a checkpoint with ``torch.load(weights_only=True)``.

    Args:
        path: of the file.

    Raises:
        ArtifactError: no such file, one that is damaged or no Lightning checkpoint, or one that holds objects
            that only code from the file could restore.
    """
    digest = file_sha256(path)
    with open_model_file(path) as file, _callbacks_as_names(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another pickle protocol; what cannot be read is refused below
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can fail in any way inside the unpickler
            raise _refusal(path, error) from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise ArtifactError(f"{path}: is no Lightning checkpoint: it has no state_dict; give the .ckpt file")
    weights, hparams = content["state_dict"], content.get("hyper_parameters")
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise ArtifactError(f"{path}: its state_dict holds something other than tensors by name")
    if not isinstance(hparams, Mapping):
        raise ArtifactError(
            f"{path}: has no hyper_parameters, so its network cannot be rebuilt; save it with "
            "save_hyperparameters()"
        )
    for key, value in hparams.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise ArtifactError(
                f"{path}: hyper-parameter {printable(str(key), 60)!r} is a {type(value).__name__}, not a "
                "plain value; save it as numbers and text"
            )
    version, step = content.get("pytorch-lightning_version"), content.get("global_step")
    return LightningCheckpoint(
        path,
        digest,
        dict(weights),
        dict(hparams),
        printable(version, 40) if isinstance(version, str) else None,
        step if type(step) is int and step >= 0 else None,
    )


@contextmanager
def _callbacks_as_names() -> Iterator[None]:
    """Let torch read :data:`CALLBACKS` as empty classes, within the block."""
    empty: list[Any] = []
    for name in CALLBACKS:
        module, _, cls = name.rpartition(".")
        empty.append(type(cls, (), {"__module__": module}))
    with torch.serialization.safe_globals(empty):
        yield


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, _PLAIN) and _is_plain(item) for key, item in value.items())
    return type(value) in _PLAIN


def _refusal(path: Path, error: Exception) -> ArtifactError:
    """Return the error for what torch would not read; its own text tells to read the file without a guard."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return ArtifactError(f"{path}: is damaged or no checkpoint; copy it again, or give the .ckpt file")
    return ArtifactError(
        f"{path}: holds an object of {found[1]}, which only code from the file could restore, so it is "
        "refused; save the checkpoint again with plain hyper-parameters and without that object"
    )
