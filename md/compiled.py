"""Compiling the energy and forces of molecules: one traced graph of fixed shape, built by a C++ compiler.

The forces' backward pass is traced with the energies, so that the compiler sees one graph; nothing is
differentiated when it runs. Building takes 20 s to 90 s and halves the time of a step (see
``docs/ase.md``).
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from ffpretrain.datasets.cache import cache_folder
from ffpretrain.md.paths import DenseFunction, dense_function
from ffpretrain.potential import Potential

_T = TypeVar("_T")
#: ``compile="auto"`` compiles for runs of at least this many steps. For aspirin on two cores a compiled step
#: saves 6 ms to 12 ms and building takes about 60 s, so it pays from 5,000 to 10,000 steps on.
COMPILE_MIN_STEPS = 20_000


class CompileWarning(UserWarning):
    """A compiled path was asked for and cannot be had; the same numbers come from the eager one."""


def compile_dense(potential: Potential, z: Tensor, pos: Tensor, molecules: int = 1) -> DenseFunction | None:
    """Return a compiled :func:`~ffpretrain.md.paths.dense_function`, built and called once.

    Args:
        potential: in eval mode, on the device of ``pos``.
        z: atomic numbers ``[N]``.
        pos: positions ``[N, 3]`` Å, float64; only their shape matters.
        molecules: how many equal molecules the atoms are, one after another.

    Returns:
        The function; None, after a :class:`CompileWarning` with the reason, where the machine cannot build it
        (no C++ compiler, most often).
    """
    return compile_function(dense_function(potential, z, molecules, once=True), pos)


def compile_function(
    function: Callable[[Tensor], _T], pos: Tensor, options: dict[str, Any] | None = None
) -> Callable[[Tensor], _T] | None:
    """Return a function of positions, derivatives and all, traced and compiled, built and called once.

    Args:
        function: takes positions ``[N, 3]`` Å and returns a tuple of tensors.
        pos: positions, float64; only their shape matters.
        options: of the compiler.

    Returns:
        The function; None, after a :class:`CompileWarning` with the reason, where it cannot be built.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        traced = make_fx(function)(pos)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        built = torch.compile(traced, dynamic=False, fullgraph=True, options=options)
        with kept_builds(), torch.no_grad():
            built(pos)
    except Exception as error:  # tracing, inductor and the C++ compiler each raise their own kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(
            f"the model cannot be compiled on this machine ({reason[:160]}); running eager, which gives the "
            "same numbers more slowly (ffpretrain doctor reports on the compiler)",
            CompileWarning,
            stacklevel=2,
        )
        return None

    def run(pos: Tensor) -> _T:
        with torch.no_grad():
            result: _T = built(pos)
        return result

    return run


@contextmanager
def kept_builds() -> Iterator[None]:
    """Let torch's compiler keep what it builds in the cache folder, where a later process finds it.

    It files by content: the traced graph with its shapes, torch's version, device, compiler and options.
    Weights are inputs of what it builds, so that a model trained anew is served by the old code with its own
    weights, and never by another model's. Where the environment says where to keep builds, that holds.
    """
    # torch itself writes its default there, a folder of temporary files, when parts of it are imported
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default)
    folder = str(cache_folder() / "inductor") if chosen.startswith(default) else chosen
    with patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):  # and whatever torch adds, taken back
        yield
