"""What a model was not trained on: other compositions, charges, spins, atoms closer than any in training."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from ase.data import chemical_symbols
from ase.formula import Formula
from numpy.typing import NDArray
from torch import nn

from ffpretrain.errors import ConfigError, UnsupportedInputError, nearest
from ffpretrain.neighbors import neighbor_list

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.artifacts import ModelCard

Policy = Literal["warn", "raise", "ignore"]
POLICIES = ("warn", "raise", "ignore")
#: ``atoms.info`` keys read as total charge in e and multiplicity 2S + 1
CHARGE_KEYS = ("charge", "total_charge")
SPIN_KEYS = ("spin", "spin_multiplicity", "multiplicity")


class UnfamiliarInputWarning(UserWarning):
    """The structure lies outside what the model was trained on; its results may be wrong."""


class Familiarity:
    """Compares structures with what a model's card says of its training.

    An unknown element is not a matter of policy: the potential itself refuses it.

    Args:
        card: of the model; None where nothing is known of it: then any charge but 0 and any multiplicity but
            1 is unfamiliar, and nothing else.
        policy: ``warn`` (once for each cause), ``raise`` or ``ignore``.
        seen: causes already warned of; the members of a committee share one set.

    Raises:
        ConfigError: another policy.
    """

    def __init__(self, card: ModelCard | None, policy: Policy, seen: set[str] | None = None) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"unknown on_unfamiliar={policy!r}{nearest(str(policy), POLICIES)}")
        self.policy = policy
        self.charges = _integers(getattr(card, "charges", None), [0])
        self.spins = _integers(getattr(card, "spins", None), [1])
        self.compositions = set(getattr(card, "compositions", None) or [])
        self.min_distance: float | None = getattr(card, "min_distance", None)
        self._seen: set[str] = set() if seen is None else seen

    def check_structure(self, atoms: Atoms) -> None:
        """Report a composition, total charge or multiplicity the model never learned.

        Raises:
            UnsupportedInputError: where the policy says so, or a charge or spin is not a whole number.
        """
        formula = atoms.get_chemical_formula(mode="hill")
        if self.compositions and formula not in self.compositions:
            self._report(
                f"composition {formula}",
                f"{formula} is not what the model was trained on ({_some(sorted(self.compositions))})",
            )
        charge = stated(atoms.info, CHARGE_KEYS)
        if charge is not None and charge not in self.charges:
            self._report(
                f"charge {charge}",
                f"the structure has charge {charge}, the model learned {_some(self.charges)} only",
            )
        spin = stated(atoms.info, SPIN_KEYS)
        if spin is not None and spin not in self.spins:
            self._report(
                f"spin {spin}",
                f"the structure has multiplicity {spin}, the model learned {_some(self.spins)} only",
            )

    def check_distance(self, shortest: float, atoms: Atoms) -> None:
        """Report two atoms closer than any two in training.

        Args:
            shortest: Å, distance of the two closest atoms.
            atoms: where they are.

        Raises:
            UnsupportedInputError: where the policy says so.
        """
        if self.min_distance is None or shortest >= self.min_distance or self.policy == "ignore":
            return
        if self.policy == "warn" and "distance" in self._seen:
            return
        first, second = closest_pair(atoms, shortest)
        self._report(
            "distance",
            f"atoms {first} and {second} are {shortest:.3f} Å apart, closer than any two in training "
            f"({self.min_distance:.3f} Å)",
        )

    def _report(self, cause: str, message: str) -> None:
        if self.policy == "raise":
            raise UnsupportedInputError(f"{message}; on_unfamiliar='warn' goes on all the same")
        if self.policy == "warn" and cause not in self._seen:
            self._seen.add(cause)
            warnings.warn(f"{message}; its results may be wrong", UnfamiliarInputWarning, stacklevel=4)


def checked_numbers(numbers: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Return atomic numbers ``[N]`` as int64.

    Raises:
        UnsupportedInputError: none, or something else than one whole number for each atom.
    """
    raw = np.asarray(numbers)
    if raw.ndim != 1 or raw.size == 0 or not np.issubdtype(raw.dtype, np.integer):
        raise UnsupportedInputError("the atomic numbers must be whole numbers, one for each atom")
    return raw.astype(np.int64)


def require_molecule(model: nn.Module, numbers: NDArray[np.int64]) -> None:
    """Refuse atoms that a model is not for; for engines, where a topology is given once and for all.

    Args:
        model: a potential.
        numbers: atomic numbers ``[N]``.

    Raises:
        UnsupportedInputError: an element or a composition it was not trained on.
        ConfigError: it gives forces without an energy.
    """
    if not getattr(model, "conservative", True):
        raise ConfigError(
            "the model has no energy that its forces are the gradient of, which this engine needs; use a "
            "potential"
        )
    check = getattr(model, "check_elements", None)
    if check is not None:
        buffer = next(itertools.chain(model.buffers(), model.parameters()), torch.empty(0))
        check(torch.as_tensor(numbers, device=buffer.device))
    card: ModelCard | None = getattr(model, "card", None)
    formula = Formula.from_list([chemical_symbols[number] for number in numbers]).format("hill")
    if card is not None and card.compositions and formula not in card.compositions:
        raise UnsupportedInputError(
            f"the atoms are {formula}, but {card.name!r} was trained on {_some(sorted(card.compositions))}; "
            "give the atoms of that molecule only"
        )


def stated(info: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Return the first of some entries of ``atoms.info`` as a whole number; None where there is none.

    Raises:
        UnsupportedInputError: it is not a whole number.
    """
    for key in keys:
        value = info.get(key)
        if value is None:
            continue
        try:
            number = float(np.asarray(value).reshape(()))
        except (TypeError, ValueError):
            number = float("nan")
        if not number.is_integer():
            raise UnsupportedInputError(f"atoms.info[{key!r}] = {value!r} is not a whole number; correct it")
        return int(number)
    return None


def closest_pair(atoms: Atoms, shortest: float) -> tuple[int, int]:
    """Return the two atoms that are ``shortest`` Å apart, periodic images included, lower index first."""
    pos, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    index, shift = neighbor_list(pos, shortest + 1e-6, cell, [bool(p) for p in atoms.pbc])
    squared = (pos[index[0]] + shift - pos[index[1]]).square().sum(-1)
    first, second = index[:, int(squared.argmin())].sort().values.tolist()
    return first, second


def _integers(values: Any, default: list[int]) -> list[int]:
    return [int(value) for value in values] if values else default


def _some(values: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"
