"""What one check found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: ``undecided``: too few data or too short a run to tell; ``reported`` is a number without a threshold; ``not
#: run`` says why in its summary
Status = Literal["passed", "missed", "undecided", "reported", "not run"]


@dataclass(frozen=True)
class Check:
    """One check's verdict and numbers.

    Attributes:
        name: of the check.
        status: the verdict.
        summary: one line of plain English.
        measured: numbers, JSON-able.
        series: curves for the report, each a list of numbers.
    """

    name: str
    status: Status
    summary: str
    measured: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Check:
        """Return the check that :meth:`as_dict` was of."""
        return cls(**values)


def verdict(ok: bool) -> Status:
    """Return ``passed`` or ``missed``."""
    return "passed" if ok else "missed"
