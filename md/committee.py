"""Which models make a committee, and how far they may disagree before a structure is flagged or refused."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ffpretrain.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard

SpreadPolicy = Literal["flag", "stop"]
POLICIES = ("flag", "stop")


class CommitteeSpreadError(UserError):
    """The members of a committee disagree about a structure by more than was allowed."""


class CommitteeSpreadWarning(UserWarning):
    """The members of a committee disagree about a structure by more than was wanted."""


class SpreadLimit:
    """Watches the spread of a committee's forces.

    The spread of a structure is the largest over its atoms of ``sqrt(mean_k |F_k - mean F|²)``, k over the
    members (the maximal force deviation of DP-GEN: Zhang et al. 2020, Comput. Phys. Commun. 253, 107206).

    Args:
        most: eV/Å; None allows any.
        policy: ``flag`` warns at the first structure beyond and counts them all, ``stop`` raises.
        members: of the committee.

    Attributes:
        flagged: structures beyond the limit so far.

    Raises:
        ConfigError: a limit that is not a positive number or without a committee, or an unknown policy.
    """

    def __init__(self, most: float | None, policy: SpreadPolicy, members: int) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"unknown on_spread={policy!r}{nearest(str(policy), POLICIES)}")
        if most is not None:
            if (
                isinstance(most, bool)
                or not isinstance(most, int | float | np.number)
                or not 0 < most < np.inf
            ):
                raise ConfigError(f"max_spread must be a positive number in eV/Å, not {most!r}")
            if members < 2:
                raise ConfigError("max_spread needs a committee: give a list of at least two models")
        self.most, self.policy, self.flagged = most, policy, 0

    def check(self, forces_std: NDArray[np.float64]) -> float:
        """Return the spread in eV/Å of a structure, given the members' deviations ``[N, 3]``.

        Raises:
            CommitteeSpreadError: it is beyond the limit and the policy is ``stop``.
        """
        per_atom = np.sqrt(np.square(forces_std).sum(axis=1))
        spread = float(per_atom.max())
        if self.most is None or spread <= self.most:
            return spread
        message = (
            f"the committee's forces on atom {int(per_atom.argmax())} have a spread of {spread:.3f} eV/Å, "
            f"more than max_spread={self.most:g}"
        )
        if self.policy == "stop":
            raise CommitteeSpreadError(f"{message}; train on structures like this one, or allow more")
        self.flagged += 1
        if self.flagged == 1:
            warnings.warn(f"{message}; its results may be wrong", CommitteeSpreadWarning, stacklevel=4)
        return spread


class SpreadRecord:
    """What a committee's spread was over a run.

    Args:
        structures: looked at, of which the calculator gave a spread.
        flagged: of these beyond the limit.
        largest: spread in eV/Å.
    """

    def __init__(self, structures: int = 0, flagged: int = 0, largest: float = 0.0) -> None:
        self.structures, self.flagged, self.largest = structures, flagged, largest

    def add(self, results: Mapping[str, Any]) -> None:
        """Take the calculator's results of a step; those without a spread count for nothing."""
        spread = results.get("forces_spread")
        if spread is not None:
            self.structures += 1
            self.flagged += bool(results.get("spread_exceeded"))
            self.largest = max(self.largest, float(spread))

    def state(self) -> dict[str, Any]:
        """Return what the record is made from again."""
        return {"structures": self.structures, "flagged": self.flagged, "largest": self.largest}

    def summary(self) -> dict[str, Any] | None:
        """Return how many steps were flagged and the largest spread in eV/Å; None without a committee."""
        if not self.structures:
            return None
        return {"flagged": self.flagged, "largest_forces_spread": self.largest}


def refuse_other_molecules(names: Sequence[str], cards: Sequence[ModelCard | None]) -> None:
    """Refuse a committee of which no molecule is known to all members, as far as their cards tell.

    Args:
        names: of the members.
        cards: theirs; None where nothing is known of one.

    Raises:
        ConfigError: names two members and what they were trained on.
    """
    both = zip(names, cards, strict=True)
    known = [(name, set(card.compositions)) for name, card in both if card and card.compositions]
    for place, (name, compositions) in enumerate(known):
        for other, others in known[:place]:
            if compositions.isdisjoint(others):
                raise ConfigError(
                    f"the members of a committee must be for the same molecules: {other!r} was trained on "
                    f"{_few(others)}, {name!r} on {_few(compositions)}; give models of one molecule"
                )


def _few(compositions: Collection[str], most: int = 3) -> str:
    shown = ", ".join(sorted(compositions)[:most])
    return shown if len(compositions) <= most else f"{shown} and {len(compositions) - most} more"
