"""The ``ffpretrain`` command. Verbs live one to a module and are imported when they are called."""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

import typer

from ffpretrain.cli.app import build_command
from ffpretrain.errors import UserError

__all__ = ["main", "run"]

USER_ERROR = 2
INTERRUPTED = 130

# What a path given by the user can cause. Any other exception is a bug and keeps its traceback.
_PATH_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)

#: an option or argument that is unknown, missing or of the wrong type; where it is defined depends on typer
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process.

    Exit codes: 0 on success, 1 where a validation misses a threshold, 2 on bad input (one line on stderr says
    what, where and the mend), 130 on Ctrl-C.

    Args:
        arguments: the words after the program's name; ``sys.argv[1:]`` when None.

    Raises:
        SystemExit: always, with the exit code, unless a bug raises something else.
    """
    words = None if arguments is None else list(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = build_command().main(args=words, prog_name="ffpretrain", standalone_mode=False)
    except _UsageError as error:
        _leave_usage(error)
    except UserError as error:
        _leave(str(error))
    except _PATH_ERRORS as error:
        _leave(_path_message(error))
    except ImportError as error:
        package = _broken_package(error)
        if package is None:
            raise
        _leave(
            f"{package} cannot be loaded ({error}); install it anew: ffpretrain doctor lists what is needed"
        )
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def run() -> NoReturn:
    """Be the program ``ffpretrain``: :func:`main`, and after Ctrl-C leave at once.

    What is to be said and written has been by then. Taking torch and a dataset in memory apart piece by piece
    would take seconds more, in which a second Ctrl-C prints a traceback.

    Raises:
        SystemExit: with the exit code.
    """
    try:
        main()
    except SystemExit as left:
        if left.code == INTERRUPTED:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the line of source code that Python adds."""
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


def _leave(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(USER_ERROR)


def _leave_usage(error: Any) -> NoReturn:
    """Say in one line what is wrong with the words of a command; without any, print the help asked for."""
    context = getattr(error, "ctx", None)
    if context is None or type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(USER_ERROR)
    # pydantic's way of beginning a message says nothing to a user
    message = str(error.format_message()).replace("Value error, ", "").strip().removesuffix(".")
    _leave(f"{message}; see {context.command_path} --help")


def _path_message(error: OSError) -> str:
    """Return what is wrong with which path; some libraries raise these errors without a file name."""
    if error.filename is None:
        return str(error)
    path = error.filename2 or error.filename
    return f"{path}: {(error.strerror or str(error)).lower()}; {_mend(error)}"


def _broken_package(error: ImportError) -> str | None:
    """Return the package of others that an import failed in; None where it is this one, which is a bug."""
    inside = [error.name or ""]
    trace = error.__traceback__
    while trace is not None:
        inside.append(str(trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    # the module that was looked for, or else the innermost one that ran and is not Python's own
    looked_for, *ran = inside
    others = [name.partition(".")[0] for name in reversed(ran) if name.partition(".")[0] != "importlib"]
    package = looked_for.partition(".")[0] or next(iter(others), "")
    return None if package in ("", "ffpretrain", "__main__") else package


def _mend(error: OSError) -> str:
    """Return what a user can do about a path that the system refused."""
    if isinstance(error, FileNotFoundError):
        return "check the spelling and the folder you are in"
    if isinstance(error, PermissionError):
        return "choose a file or folder you may read and write"
    return "give another path"
