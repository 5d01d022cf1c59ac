"""State of the process that a training run needs, borrowed and given back; errors of child processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import DDPStrategy

from ffpretrain import errors

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # set by Lightning for deterministic runs
#: what Lightning and torch say about choices that are made on purpose here
_EXPECTED = (
    r".*does not have many workers.*",
    r".*recommended to use .*sync_dist=True.*",
    r".*GPU available but not used.*",
    r".*ended before the epoch ended and your dataloader is not resumable.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*treespec, LeafSpec.*",
    r".*Be aware that when using .ckpt_path.*",
    r".*Grad strides do not match bucket view strides.*",
    r".*TensorFloat32 tensor cores.*",
)


class SpawnedProcesses(DDPStrategy):
    """Several processes, spawned so that the caller's program is not run again.

    Some weights get no gradient in some steps, such as an auxiliary head in a step without its task, which
    DDP has to be told.
    """

    def __init__(self) -> None:
        super().__init__(start_method="spawn", find_unused_parameters=True)

    def setup_environment(self) -> None:
        """Prepare a spawned process: as quiet as the first one."""
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message)
        super().setup_environment()


@contextmanager
def borrowed_process(threads: int | None) -> Iterator[None]:
    """Hold the number of threads, torch's deterministic mode and the signal handlers, and put them back.

    Lightning's remarks are kept quiet meanwhile; warnings that are not expected come through.

    Args:
        threads: CPU threads of torch; None leaves their number.
    """
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    had_workspace = _WORKSPACE in os.environ
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        if threads is not None:
            torch.set_num_threads(threads)
        with warnings.catch_warnings():
            for message in _EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if not had_workspace:
            os.environ.pop(_WORKSPACE, None)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if in_main:
            signal.signal(signal.SIGINT, handler)


def user_error_of(error: Exception) -> Exception:
    """Return the user error that a child process ended with, or the error itself.

    Args:
        error: of the process launcher; its text ends with the child's traceback.
    """
    found = re.findall(r"^(?:ffpretrain\.errors\.)(\w+): (.*)$", str(error), re.MULTILINE)
    if not found:
        return error
    name, message = found[-1]
    kind = getattr(errors, name, None)
    return kind(message) if isinstance(kind, type) and issubclass(kind, errors.UserError) else error
