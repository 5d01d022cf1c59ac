"""The ASE calculator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes, equal
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray
from torch import nn

from ffpretrain.artifacts import load_potential
from ffpretrain.errors import ArtifactError, ConfigError, UnsupportedInputError
from ffpretrain.md.committee import SpreadLimit, SpreadPolicy, refuse_other_molecules
from ffpretrain.md.paths import Evaluation
from ffpretrain.md.runtime import CompileOption, Runtime
from ffpretrain.md.unfamiliar import CHARGE_KEYS, SPIN_KEYS, Familiarity, Policy
from ffpretrain.property import PropertyModel

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.artifacts import ModelCard

Model = str | os.PathLike[str] | nn.Module
_INFO_KEYS = (*CHARGE_KEYS, *SPIN_KEYS)
#: Å, a thousand times what rounding does to a position and a thousandth of what a step does
_ROUNDING = 1e-9


class FFCalculator(Calculator):
    """A trained potential, or a committee of them, as an ASE calculator.

    Gives ``energy``, ``free_energy`` (the same: there is no entropy of electrons), atomic ``energies``,
    ``forces`` and, where the structure is periodic, ``stress`` (Voigt-6, ASE's sign), all float64 in eV and
    Å. A committee gives the mean of its members and, in ``results``, the standard deviations over them (of
    the members as they are, not of a sample): ``energy_std`` eV, ``forces_std [N, 3]`` eV/Å, and from the
    latter ``forces_spread`` eV/Å, that of the atom they agree on least.

    A field, learned without labels, has forces alone: every other property raises ASE's
    ``PropertyNotImplementedError``. ASE's optimisers take it through
    :func:`~ffpretrain.md.without_energy.forces_only`. A model of a property has nothing that ASE knows.

    Args:
        model: a name of :func:`ffpretrain.list_models`, a model file, a
            :class:`~ffpretrain.potential.Potential`, or a list of them.
        device: ``auto`` (CUDA where there is one) or a name torch knows.
        dtype: ``float32`` or ``float64``, of the network; reference energies and sums are float64 in both.
        compile: ``auto`` and True evaluate ``torchmd-et`` and ``painn`` on a CPU by native code, built once
            per machine in seconds: True and long runs wait for that, ``auto`` runs eager until it is there.
            For others True compiles small molecules at the first evaluation (about a minute) and ``auto``
            leaves that to :func:`ffpretrain.md.simulate` on long runs. False runs eager.
        on_unfamiliar: what to do with input the model was not trained on (another composition, a charge or
            multiplicity in ``atoms.info`` it never learned, atoms closer than any in training): ``warn`` once
            for each cause, ``raise`` or ``ignore``. An unknown element is always an error.
        max_spread: largest ``forces_spread`` of a committee in eV/Å; None allows any.
        on_spread: what to do with a structure beyond it: ``flag`` warns once, sets ``spread_exceeded`` in
            ``results`` and counts in ``flagged``; ``stop`` raises, which ends a simulation.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: an unknown option, ``max_spread`` without a committee, or members of a committee with
            different levels of theory or for different molecules.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 (ASE's)

    def __init__(
        self,
        model: Model | Sequence[Model],
        device: str = "auto",
        dtype: str = "float32",
        compile: CompileOption = "auto",
        on_unfamiliar: Policy = "warn",
        *,
        max_spread: float | None = None,
        on_spread: SpreadPolicy = "flag",
    ) -> None:
        super().__init__()
        members = [model] if isinstance(model, str | os.PathLike | nn.Module) else list(model)
        if not members:
            raise ConfigError("the committee has no members; give at least one model")
        potentials = [load_model(member) for member in members]
        self.runtimes = [Runtime(potential, device, dtype, compile) for potential in potentials]
        self.cards: list[ModelCard | None] = [getattr(p, "card", None) for p in potentials]
        self._committee = not isinstance(model, str | os.PathLike | nn.Module)
        self._limit = SpreadLimit(max_spread, on_spread, len(members))
        self._without_energy = [
            _label(m, c)
            for m, c, p in zip(members, self.cards, potentials, strict=True)
            if not getattr(p, "has_energy", True)
        ]
        if self._without_energy:
            self.implemented_properties = ["forces"]
        of_property = [p for p in potentials if isinstance(p, PropertyModel)]
        self._property = f"{of_property[0].name} ({of_property[0].unit})" if of_property else ""
        if self._property:
            self.implemented_properties = []
        seen: set[str] = set()
        self.familiarities = [Familiarity(card, on_unfamiliar, seen) for card in self.cards]
        self._checked: dict[str, Any] | None = None
        _refuse_mixed_theory(self.cards)
        labels = [_label(m, c) for m, c in zip(members, self.cards, strict=True)]
        refuse_other_molecules(labels, self.cards)
        self.parameters.update(
            model=labels,
            device=str(self.runtimes[0].device),
            dtype=dtype,
            compile=compile,
            on_unfamiliar=on_unfamiliar,
        )
        if max_spread is not None:
            self.parameters.update(max_spread=max_spread, on_spread=on_spread)

    @property
    def name(self) -> str:
        """Return the name files are written under."""
        return "ffpretrain"

    @property
    def card(self) -> ModelCard | None:
        """Card of the model, or of the first of a committee; None where nothing is known of it."""
        return self.cards[0]

    @property
    def conservative(self) -> bool:
        """Whether the forces are the gradient of the energy, for every member."""
        return all(getattr(runtime.model, "conservative", True) for runtime in self.runtimes)

    @property
    def backend(self) -> str:
        """How the last structure was evaluated, such as ``dense float32 cpu``; empty before the first."""
        return self.runtimes[0].backend

    @property
    def flagged(self) -> int:
        """How many structures lay beyond ``max_spread`` so far."""
        return self._limit.flagged

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Return a property; called by ASE.

        Raises:
            PropertyNotImplementedError: the model does not have it.
        """
        if self._property:
            raise PropertyNotImplementedError(
                f"{self._without_energy[0]} predicts {self._property} alone, no {name}; "
                "call the model itself for it: load_potential(...)(graph)"
            )
        if name != "forces" and self._without_energy:
            raise PropertyNotImplementedError(
                f"{self._without_energy[0]} learned forces that are no gradient of an energy, so it has no "
                f"{name}; ASE's optimisers relax by forces alone: FIRE(ffpretrain.md.forces_only(atoms))"
            )
        return super().get_property(name, atoms, allow_calculation)

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Refuse changes, which would leave a calculator that is not what it says.

        Raises:
            ConfigError: always, if there is anything to set.
        """
        if kwargs:
            raise ConfigError(f"{', '.join(kwargs)} cannot be changed later; make a new FFCalculator")
        return {}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what changed since the last calculation.

        ASE's own check does not look at ``atoms.info``. It also takes a tenth of a millisecond, three times a
        step of dynamics, so what dynamics asks for is recognised first: structures that are equal to the last
        bit, and those in which the positions alone differ, by more than any tolerance.
        """
        if self.atoms is None:
            return list(all_changes)
        one, other = self.atoms.info, atoms.info
        informed = any(not _same(one.get(key), other.get(key)) for key in _INFO_KEYS)
        changes = _different(self.atoms, atoms)
        if changes and not (changes == ["positions"] and _moved(self.atoms, atoms)):
            changes = list(super().check_state(atoms, tol=tol))
        return [*changes, "info"] if informed else changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluate all properties of a structure; called by ASE.

        Raises:
            UnsupportedInputError: no atoms, an unknown element, or unfamiliar input under ``raise``.
            NonFiniteError: the energy or a force is not finite.
            CommitteeSpreadError: the members disagree by more than ``max_spread``, under ``stop``.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        # until everything below has succeeded there are no results, whatever was there before
        self.results = {}
        structure = self.atoms
        if structure is None or len(structure) == 0:
            raise UnsupportedInputError("the structure has no atoms; give at least one")
        evaluations = [
            runtime.evaluate(structure.numbers, structure.positions, structure.cell.array, structure.pbc)
            for runtime in self.runtimes
        ]
        self._check_familiar(structure)
        for familiarity, evaluation in zip(self.familiarities, evaluations, strict=True):
            familiarity.check_distance(evaluation.shortest, structure)
        self.results = self._results(evaluations)

    def export_properties(self) -> Properties:
        """Return the results that ASE knows by name; a committee's standard deviations are not among them."""
        return Properties({key: value for key, value in self.results.items() if key in all_outputs})

    def expect(self, steps: int) -> None:
        """Say how many evaluations of one structure are to come, so that ``compile="auto"`` can decide."""
        for runtime in self.runtimes:
            runtime.expected_steps = steps

    def fingerprint(self) -> list[str]:
        """Return a SHA-256 of each member's weights."""
        return [runtime.fingerprint() for runtime in self.runtimes]

    def agreement(self) -> list[dict[str, Any]]:
        """Return what the gate measured for each member and path; see :mod:`ffpretrain.md.agreement`."""
        return [found.as_dict() for runtime in self.runtimes for found in runtime.agreement.values()]

    def _check_familiar(self, atoms: Atoms) -> None:
        """Look at composition, charge and multiplicity when one of them may have changed."""
        now = {key: atoms.info.get(key) for key in _INFO_KEYS} | {"numbers": atoms.numbers.tobytes()}
        if self._checked is not None and all(_same(now[key], self._checked[key]) for key in now):
            return
        for familiarity in self.familiarities:
            familiarity.check_structure(atoms)
        self._checked = now

    def _results(self, evaluations: list[Evaluation]) -> dict[str, Any]:
        results: dict[str, Any] = {}
        energies = _stack([e.energy for e in evaluations])
        if energies is not None:
            results["energy"] = results["free_energy"] = float(energies.mean())
        for key in ("energies", "forces", "stress"):
            values = _stack([getattr(e, key) for e in evaluations])
            if values is not None:
                results[key] = values.mean(axis=0) if self._committee else values[0]
                if key == "stress":
                    results[key] = full_3x3_to_voigt_6_stress(results[key])
                elif self._committee and key == "forces":
                    results["forces_std"] = values.std(axis=0)
                    results["forces_spread"] = spread = self._limit.check(results["forces_std"])
                    results["spread_exceeded"] = spread > (self._limit.most or np.inf)
        if energies is not None and self._committee:
            results["energy_std"] = float(energies.std())
        return results


def _different(one: Atoms, other: Atoms) -> list[str]:
    """Return in what two structures differ, be it by a bit, as far as a calculator may look."""
    found = [
        name
        for name in all_changes
        if (name in one.arrays or name in other.arrays)
        and not (
            name in one.arrays and name in other.arrays and _same_array(one.arrays[name], other.arrays[name])
        )
    ]
    if not _same_array(one.cell.array, other.cell.array):
        found.append("cell")
    if not _same_array(one.pbc, other.pbc):
        found.append("pbc")
    return found


def _moved(one: Atoms, other: Atoms) -> bool:
    """Return whether an atom has moved by more than any tolerance for rounding; no NaN has."""
    first, second = one.positions, other.positions
    return first.shape == second.shape and bool(np.abs(first - second).max() > _ROUNDING)


def _same_array(one: NDArray[Any], other: NDArray[Any]) -> bool:
    # the same as numpy.array_equal without what that does for other types, which takes three times as long
    return one.shape == other.shape and bool((one == other).all())


def _same(one: Any, other: Any) -> bool:
    """Compare entries of ``atoms.info``: mostly the same number, which ASE takes 10 µs to see."""
    return one is other or bool(equal(one, other))


def _stack(values: Sequence[Any]) -> NDArray[np.float64] | None:
    """Return the members' values as one array; None where a member has none."""
    return None if any(value is None for value in values) else np.array(values, dtype=np.float64)


def load_model(model: Model) -> nn.Module:
    """Return the potential of a name or a file; one that is given comes back as it is.

    Raises:
        ArtifactError: no such model, or a damaged one.
        ConfigError: a module that is no potential.
    """
    if isinstance(model, nn.Module):
        if not hasattr(model, "cutoff"):
            raise ConfigError(
                f"{type(model).__name__} is not a potential: it has no cutoff; give a Potential"
            )
        return model
    if not isinstance(model, str | os.PathLike):
        raise ArtifactError(f"a model is a name, a file or a Potential, not {type(model).__name__}")
    return load_potential(model if isinstance(model, str) else Path(model))


def _label(model: Model, card: ModelCard | None) -> str:
    if isinstance(model, nn.Module):
        return card.name if card is not None else type(model).__name__
    return model if isinstance(model, str) else Path(model).name


def _refuse_mixed_theory(cards: Sequence[ModelCard | None]) -> None:
    """Refuse a committee whose energies do not mean the same; warn where that is not known of a member."""
    known = {(card.level_of_theory, card.energy_zero) for card in cards if card is not None}
    if len(known) > 1:
        shown = "; ".join(sorted(f"{level} with zero at {zero}" for level, zero in known))
        raise ConfigError(
            f"the members of a committee must share a level of theory and an energy zero: {shown}"
        )
    if known and None in cards:
        warnings.warn(
            "a member of the committee does not say its level of theory; make sure it is the others'",
            stacklevel=3,
        )
