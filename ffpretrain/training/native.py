"""Native messages while training: where they are used, and that they give the plain step's numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ffpretrain.backbones.base import Backbone
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Sample
from ffpretrain.native.build import NativeUnavailable, find_compiler
from ffpretrain.objectives.base import Objective

#: largest difference from the plain step, of the loss and of its gradient, relative to the largest of each
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
#: ``auto`` uses native messages in runs of at least so many steps, for which it is worth building the code:
#: about 10 s, once per machine. What is built already does not count, so that a run goes on as it began.
MIN_STEPS = 200

Compile = Literal["auto"] | bool


class NativeWarning(UserWarning):
    """Training could be faster here, and is not; the numbers are the same."""


def use_native_messages(objective: Objective, compiled: Compile, steps: int) -> bool:
    """Let an objective's backbones compute messages natively where they can.

    Args:
        objective: on its device.
        compiled: ``trainer.compile``; ``auto`` wants at least :data:`MIN_STEPS`.
        steps: length of the run.

    Returns:
        Whether one of them does from now on.
    """
    if not compiled or objective.network.known.device.type != "cpu":
        return False
    if compiled == "auto" and steps < MIN_STEPS:
        return False
    used = False
    for backbone in _backbones(objective):
        if type(backbone).use_native_messages is Backbone.use_native_messages:
            continue
        try:
            backbone.use_native_messages()
            used = True
        except NativeUnavailable as error:
            _say(error)
    return used


def compare(
    objective: Objective, batch: Sample, generator: Callable[[], torch.Generator]
) -> dict[str, float]:
    """Compare a step with native messages with the plain one.

    Args:
        objective: that uses them.
        batch: of the step.
        generator: gives the step's source of noise, each time anew.

    Returns:
        Differences of ``loss`` and ``gradient``, relative to the largest of each.

    Raises:
        ConfigError: they differ by more than :data:`TOLERANCE`.
    """
    native = _loss_and_gradient(objective, batch, generator())
    with plain_messages(objective):
        plain = _loss_and_gradient(objective, batch, generator())
    found = {}
    tolerance = TOLERANCE[objective.network.dtype]
    for name, one, other in zip(("loss", "gradient"), native, plain, strict=True):
        found[name] = float((one - other).abs().max() / other.abs().max().clamp_min(1e-12))
        if not found[name] <= tolerance and bool(torch.isfinite(other).all()):
            raise ConfigError(
                f"native messages change the {name} by {found[name]:.2e} of its largest part (tolerance "
                f"{tolerance:.0e}); run with trainer.compile=false and report this"
            )
    return found


def use_plain_messages(objective: Objective) -> None:
    """Let an objective's backbones compute messages plainly, as everybody who reads the model does."""
    for backbone in _backbones(objective):
        backbone.native_messages = False


class plain_messages:
    """Context in which no backbone of an objective uses native messages."""

    def __init__(self, objective: Objective) -> None:
        self._native = [b for b in _backbones(objective) if b.native_messages]

    def __enter__(self) -> None:
        for backbone in self._native:
            backbone.native_messages = False

    def __exit__(self, *_: object) -> None:
        for backbone in self._native:
            backbone.native_messages = True


def _backbones(objective: Objective) -> list[Backbone]:
    return [module for module in objective.modules() if isinstance(module, Backbone)]


def _loss_and_gradient(
    objective: Objective, batch: Sample, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    loss = objective(batch, generator)["loss"]
    weights = [p for p in objective.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in found])


def _say(error: NativeUnavailable) -> None:
    if find_compiler() is None:
        mend = "training is several times faster with a C++ compiler"
        warnings.warn(f"{error}: {mend}; the numbers are the same", NativeWarning, stacklevel=3)
    else:
        warnings.warn(f"{error}; training plainly, which is slower", NativeWarning, stacklevel=3)
