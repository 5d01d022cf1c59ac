"""Whether installed packages can be imported, asked of another process: some take seconds or crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

#: s, after which a module that is still being imported is given up
_PATIENCE = 60

_TRY = """
import contextlib, importlib, json, os, sys, warnings
warnings.simplefilter("ignore")
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a package prints on its own is no answer
for name in sys.argv[1:]:
    try:
        module, _, function = name.partition(":")
        found = importlib.import_module(module)
        if function:
            getattr(found, function)()
        error = None
    except BaseException as failure:
        lines = str(failure).strip().splitlines()
        error = lines[0] if lines else type(failure).__name__
    print(json.dumps([name, error]), file=out, flush=True)
os._exit(0)
"""


class Imports:
    """Modules that another process tries to import, from the moment this is made.

    Args:
        modules: of packages that are installed; ``module:function`` where an import loads too little to tell,
            and the function is called.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._left = list(modules)
        self._process = self._start()

    def errors(self) -> dict[str, str]:
        """Wait for the answers; return what went wrong by module, the first line of it."""
        found: dict[str, str] = {}
        while self._process is not None:
            crash = "the interpreter crashes"
            try:
                text, _ = self._process.communicate(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                text, _ = self._process.communicate()
                crash = f"it takes more than {_PATIENCE} s"
            answers: dict[str, str | None] = dict(json.loads(line) for line in text.splitlines())
            found |= {name: error for name, error in answers.items() if error is not None}
            self._left = [name for name in self._left if name not in answers]
            if self._left:  # the process ended in the import of the first of them
                found[self._left.pop(0)] = crash
            self._process = self._start()
        return found

    def _start(self) -> subprocess.Popen[str] | None:
        if not self._left:
            return None
        command = [sys.executable, "-c", _TRY, *self._left]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, text=True)
