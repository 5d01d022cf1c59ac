"""From a potential to a model file and back.

The card is the one place of truth for everything but the weights: scale, shift and reference energies stand
in it as decimal numbers that read back to the same float64, and are not stored as tensors.
"""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ffpretrain import zoo
from ffpretrain.artifacts.card import ModelCard, parse_card, printable
from ffpretrain.artifacts.files import (
    FORMAT,
    card_of,
    check_content,
    content_sha256,
    open_model_file,
    read_header,
    write_file,
)
from ffpretrain.artifacts.networks import describe, rebuild
from ffpretrain.errors import ArtifactError, ConfigError
from ffpretrain.potential import Model

# buffers that the card holds
_IN_CARD = {"scale", "shift", "reference", "factor", "known"}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def make_card(potential: Model, name: str, **fields: Any) -> ModelCard:
    """Return a card for a model.

    Args:
        potential: what describes the network (backbone, head, elements, cutoff, scales, reference energies)
            is taken from it.
        name: of the model.
        **fields: the other fields of :class:`~ffpretrain.artifacts.ModelCard`.

    Raises:
        ArtifactError: an unknown or wrong field, one that the potential decides, or a potential that no file
            could rebuild.
    """
    network = describe(potential)
    for key in fields:
        if key in network:
            raise ArtifactError(f"card of {name!r}: {key} is taken from the potential; leave it out")
    return parse_card({"name": name, **fields, **network}, f"card of {name!r}")


def save_potential(potential: Model, path: str | Path, card: ModelCard) -> Path:
    """Write a potential to one ``.safetensors`` file, in one step.

    The same weights and card give the same bytes. Weights are stored in the precision they have.

    Args:
        potential: on any device; of a class that a file can hold: a
            :class:`~ffpretrain.potential.Potential` or one of the others in
            :mod:`ffpretrain.artifacts.networks`, no subclass of them.
        path: of the file, ending in ``.safetensors``; its folder is made where absent.
        card: what is known of the model. The fields that describe the network and the versions are written as
            the potential and this package have them.

    Returns:
        The path.

    Raises:
        ArtifactError: another ending, a potential that no file could rebuild, weights that are not finite or
            of mixed precision, a card that does not fit, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path}: a model file ends in .safetensors; name it {path.name}.safetensors")
    complete = parse_card({**card.model_dump(), **describe(potential)}, str(path))
    # clones: the format refuses tensors that share memory
    state = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in _network_state(potential).items()
    }
    _check_numbers(state, str(path))
    metadata = {"format": FORMAT, "card": complete.to_json()}
    write_file(path, _sealed(safetensors.torch.save(state, metadata), str(path)))
    return path


def load_potential(
    model: str | Path | Model,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    trainable: bool = False,
) -> Model:
    """Return a model in eval mode: a potential, or what else the file holds. Nothing in it is executed.

    Args:
        model: a name of :func:`~ffpretrain.zoo.list_models`, the path of a model file, or a model. A model is
            returned itself where it already is in eval mode, on the device and of the precision; otherwise a
            copy is, and the one given stays as it was.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for a GPU where there is one.
        dtype: precision of the network: ``"float32"``, ``"float64"`` or the torch type; None keeps that of
            the file. Scale, reference energies and sums are float64 always.
        trainable: let gradients flow to the weights, to train further (after ``.train()``); off, dynamics do
            not spend time on them. Needed for a file of kind ``pretrained``, which is there to be trained.
            Does not apply to a model that is given.

    Raises:
        ArtifactError: an unknown name (the nearest are named), or a file that is missing, damaged, of another
            kind, newer than this package, that contradicts its card, or that has learned no energy yet.
        ConfigError: an unknown device or precision, or a device that is absent.
    """
    target, precision = resolve_device(device), _resolve_dtype(dtype)
    if isinstance(model, Model):
        return _adopt(model, target, precision)
    path, name = zoo.locate(model)
    blob = _read(path) if name is None else zoo.read_model(name)
    where = str(path)
    header = read_header(io.BytesIO(blob), len(blob), where)
    card = card_of(header, where)
    check_content(header, blob, where)
    if card.kind == "pretrained" and not trainable:
        raise ArtifactError(
            f"{where}: holds pretrained weights that have learned no energy yet; fine-tune it first: "
            f"ffpretrain train RECIPE model.pretrained={where}"
        )
    potential = rebuild(card, where)
    _fill(potential, blob, where)
    potential.eval()
    if not trainable:
        potential.requires_grad_(False)
    return potential.to(target, precision)


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; ``"auto"`` is the first CUDA GPU, or the CPU where there is none.

    Raises:
        ConfigError: not a device, one without float64 arithmetic, or one that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ConfigError(
            f"device {str(device)!r} is not supported (energies need float64); give auto, cpu, cuda or cuda:N"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (chosen.index or 0) >= count:
        found = f"only {count} CUDA GPU{'s' * (count > 1)}" if count else "no CUDA GPU"
        raise ConfigError(f"device {str(device)!r} is absent: torch finds {found} here; use device='auto'")
    return chosen


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in _DTYPES.values():
        raise ConfigError(f"unknown precision {dtype!r}; give 'float32' or 'float64'")
    return chosen


def _adopt(potential: Model, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Return the potential itself where it fits, else a copy in eval mode, moved and cast."""
    here = potential.known.device
    same_device = here.type == device.type and device.index in (None, here.index)
    if same_device and dtype in (None, potential.dtype) and not potential.training:
        return potential
    return copy.deepcopy(potential).eval().to(device, dtype)


def _read(path: Path) -> bytes:
    """Return a file's content; one whose header is no model's is refused before the rest is read."""
    with open_model_file(path) as file:
        read_header(file, os.fstat(file.fileno()).st_size, str(path))
        file.seek(0)
        return file.read()


def _network_state(potential: Model) -> dict[str, Tensor]:
    """Return the tensors that a file holds: weights and buffers of backbone and head."""
    return {name: tensor for name, tensor in potential.state_dict().items() if name not in _IN_CARD}


def _sealed(blob: bytes, where: str) -> bytes:
    """Add the checksum and sort the header's keys: safetensors leaves the metadata's order to chance."""
    found = read_header(io.BytesIO(blob), len(blob), where)
    metadata = {**found.metadata, "sha256": content_sha256(found, blob)}
    text = json.dumps({**found.tensors, "__metadata__": metadata}, sort_keys=True, separators=(",", ":"))
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + blob[found.start :]


def _fill(potential: Model, blob: bytes, where: str) -> None:
    """Load the weights, in the precision they are stored in, after checking them against the network."""
    try:
        stored = safetensors.torch.load(blob)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{where}: its weights are damaged ({printable(str(error))}); copy or download the file again"
        ) from error
    wanted = _network_state(potential)
    problems = [
        *_listed("missing", wanted.keys() - stored.keys()),
        *_listed("unexpected", stored.keys() - wanted.keys()),
        *_listed(
            "of another shape or type",
            (name for name in wanted.keys() & stored.keys() if not _alike(wanted[name], stored[name])),
        ),
    ]
    if problems:
        raise ArtifactError(
            f"{where}: the weights do not fit the network of its card: {'; '.join(problems)}; "
            "the file is damaged or was made by another version of the backbone"
        )
    precision = _check_numbers(stored, where)
    potential.to(precision).load_state_dict(stored, strict=False)


def _alike(a: Tensor, b: Tensor) -> bool:
    same_type = a.dtype == b.dtype or (a.is_floating_point() and b.is_floating_point())
    return a.shape == b.shape and same_type


def _listed(what: str, names: Iterable[str]) -> list[str]:
    """Return ``["what: first, second, third and n more"]``, or nothing where there are no names."""
    found = [printable(name, 80) for name in sorted(names)]
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{what}: {', '.join(found[:3])}{more}"]


def _check_numbers(state: Mapping[str, Tensor], where: str) -> torch.dtype:
    """Return the precision of the weights.

    Raises:
        ArtifactError: values that are not finite, or weights that are not all float32 or all float64.
    """
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    precisions = {tensor.dtype for tensor in floating.values()}
    if len(precisions) != 1 or not precisions <= set(_DTYPES.values()):
        found = ", ".join(sorted(str(p).removeprefix("torch.") for p in precisions)) or "none"
        raise ArtifactError(f"{where}: weights must be all float32 or all float64, found {found}; cast them")
    bad = _listed("in", (name for name, tensor in floating.items() if not bool(torch.isfinite(tensor).all())))
    if bad:
        raise ArtifactError(f"{where}: weights are NaN or infinite {bad[0]}; take an earlier checkpoint")
    return precisions.pop()
