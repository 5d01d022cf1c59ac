"""Errors a user can mend. Each message is one line: what is wrong, where, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Anything caused by input: the command line prints it as one line and exits with code 2."""


class DataError(UserError):
    """A data file, frame or label is missing, damaged or contradictory."""


class ConfigError(UserError):
    """A recipe or option is unknown, of the wrong type or out of range."""


class ArtifactError(UserError):
    """A model file is missing, damaged, newer than this package or does not fit the input."""


class UnsupportedInputError(UserError):
    """A structure lies outside what a model can evaluate (unknown element, charge or spin, no atoms)."""


class MissingDependencyError(UserError, ImportError):
    """An optional package is absent; the message names the exact ``pip install``."""


class NonFiniteError(UserError, ArithmeticError):
    """A loss, gradient, energy or position is NaN or infinite."""


def nearest(name: str, known: Iterable[str], under: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known names, or list the known ones.

    Args:
        name: what the user wrote, without what it stands under.
        known: the names that exist there.
        under: where in a tree that is, such as ``trainer``: names are given as ``'trainer.x'``, in full.
    """
    dotted = f"{under}." if under else ""
    options = sorted(known)
    close = difflib.get_close_matches(name.lower(), options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(dotted + c) for c in close) + "?"
    return "; known: " + ", ".join(dotted + option for option in options)
