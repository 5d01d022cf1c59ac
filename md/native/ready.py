"""Whether native code is at hand, is worth waiting for, or is built in the background for the next time."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings

from torch import nn

from ffpretrain.md.compiled import CompileWarning
from ffpretrain.md.native.build import NativeUnavailable, failure, find_compiler, is_built
from ffpretrain.md.native.weights import KINDS
from ffpretrain.potential import Potential

#: ``compile="auto"`` waits for the C++ compiler in runs of at least this many steps: building takes 10 s to
#: 20 s once per machine, and a native step of aspirin saves about 20 ms.
NATIVE_MIN_STEPS = 1000


def prepare(model: nn.Module, wait: bool) -> None:
    """Return where native code may be used now; start building it where it is not there yet.

    Args:
        model: what is to be evaluated.
        wait: whether the caller builds the code, if it must be, and waits for that.

    Raises:
        NativeUnavailable: another process builds the code now, for later ones, or there is no compiler.
    """
    if not isinstance(model, Potential) or type(model.backbone) not in KINDS:
        return  # never evaluated natively; what follows says so
    if find_compiler() is None:
        reason = "no C++ compiler found; install g++ or clang++, or set CXX to one"
        _say(f"{reason}: running eager, the same numbers more slowly")
        raise NativeUnavailable(reason)
    if is_built():
        return
    if wait:
        _say("building the native code with the C++ compiler: 10 to 20 s, once per machine and version")
        return
    if (before := failure()) is not None:
        _say(
            f"{before}: running eager, the same numbers more slowly (--compile, or compile=True, tries again)"
        )
        raise NativeUnavailable(before)
    _build_apart()
    reason = "the native code is being built in the background"
    _say(
        f"{reason}, which takes about 20 s; what has begun stays eager, several times slower, and "
        "calculators made later find it (--compile, or compile=True from Python, waits for it instead)"
    )
    raise NativeUnavailable(reason)


def say_failed(model: nn.Module, reason: NativeUnavailable) -> None:
    """Warn where the library was waited for and could not be built, so that nobody takes eager for native."""
    if isinstance(model, Potential) and type(model.backbone) in KINDS and not is_built():
        _say(f"{reason}: running eager, the same numbers more slowly")


@functools.cache
def _say(message: str) -> None:
    """Warn once a process."""
    warnings.warn(message, CompileWarning, stacklevel=6)


@functools.cache
def _build_apart() -> None:
    """Build in a process of its own, which outlives this one."""
    subprocess.Popen(
        [sys.executable, "-c", "from ffpretrain.md.native.build import load_library; load_library()"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
