"""Errors of a model on labelled frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ffpretrain.artifacts import MeasuredErrors, Quantity
from ffpretrain.datasets.frames import Dataset
from ffpretrain.errors import DataError, NonFiniteError
from ffpretrain.potential import Model
from ffpretrain.property import PropertyModel
from ffpretrain.training.data import collate, sample_from_frame
from ffpretrain.training.properties import PropertyReader
from ffpretrain.units import KCAL_PER_MOL

#: structures evaluated together are chosen so that a batch holds about this many atoms
ATOMS_PER_BATCH = 512


@dataclass(frozen=True)
class Predictions:
    """Labels and predictions side by side.

    Attributes:
        energy: predicted, eV ``[F]``; None where the frames have no energies.
        energy_label: eV ``[F]``.
        forces: predicted, eV/Å ``[A, 3]``, atoms of all frames in order; None where there are no labels.
        forces_label: eV/Å ``[A, 3]``.
        numbers: atomic numbers ``[A]``.
        n_atoms: atoms of each frame ``[F]``.
    """

    energy: NDArray[np.float64] | None
    energy_label: NDArray[np.float64] | None
    forces: NDArray[np.float64] | None
    forces_label: NDArray[np.float64] | None
    numbers: NDArray[np.int64]
    n_atoms: NDArray[np.int64]


def check_level_of_theory(potential: Model, frames: Dataset) -> None:
    """Refuse to compare a model with labels of another level of theory.

    Raises:
        DataError: both are known and differ.
    """
    ours = potential.card.level_of_theory if potential.card is not None else None
    theirs = frames.metadata.level_of_theory
    if ours and theirs and ours != theirs:
        raise DataError(
            f"the model was trained on {ours} labels and {frames.metadata.name} has {theirs}; "
            "evaluate on labels of the same method"
        )


def unfamiliar(model: Model, frames: Dataset) -> list[str]:
    """Say what of the frames the model was not trained on: compositions, total charges, multiplicities.

    Nothing is known of a model without a card. Elements it never saw are left to it: it refuses them.

    Args:
        model: whose card is read.
        frames: that it is to be evaluated on.

    Returns:
        One line for each kind of difference; none where all frames are familiar.
    """
    card = model.card
    if card is None:
        return []
    from ase.data import chemical_symbols
    from ase.formula import Formula

    found: dict[str, Counter[Any]] = {
        "composition": Counter(),
        "charge": Counter(),
        "multiplicity": Counter(),
    }
    for frame in frames:
        found["composition"][tuple(sorted(frame.numbers.tolist()))] += 1
        found["charge"][frame.charge] += 1
        found["multiplicity"][frame.spin] += 1
    formulas: Counter[Any] = Counter()
    for numbers, count in found["composition"].items():
        formulas[Formula.from_list([chemical_symbols[z] for z in numbers]).format("hill")] += count
    found["composition"] = formulas
    known = {"composition": card.compositions, "charge": card.charges, "multiplicity": card.spins}
    lines = []
    for what, learned in known.items():
        strange = {value: n for value, n in found[what].items() if learned and value not in learned}
        if strange:
            names = _some(sorted(strange, key=str))
            lines.append(
                f"{sum(strange.values())} of {len(frames)} frames have {what} {names}, which the model was "
                f"not trained on ({_some(learned or [])})"
            )
    return lines


def _some(values: Sequence[Any], most: int = 3) -> str:
    """Return the first of some values, and how many more there are."""
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def predict(potential: Model, frames: Dataset, progress: Callable[[int], Any] | None = None) -> Predictions:
    """Evaluate a model on every frame.

    Args:
        potential: in eval mode; of a field without an energy, forces alone are compared.
        frames: with energies, forces or both.
        progress: called with the number of frames done after each batch.

    Raises:
        DataError: no frames, labels missing on some frames, or another level of theory than the model's.
        UnsupportedInputError: an element the model never saw.
        NonFiniteError: the model gives NaN or an infinity; names the frame.
    """
    if len(frames) == 0:
        raise DataError(f"{frames.metadata.name} has no frames to evaluate")
    check_level_of_theory(potential, frames)
    has_energy, has_forces = frames[0].energy is not None, frames[0].forces is not None
    if not (has_energy or has_forces):
        raise DataError(
            f"{frames.metadata.name} has neither energies nor forces; label it (ffpretrain label)"
        )
    if not potential.has_energy and not has_forces:
        raise DataError(f"the model has no energy and {frames.metadata.name} has no forces to compare with")
    device = potential.known.device
    size = max(1, ATOMS_PER_BATCH // max(1, len(frames[0])))
    columns: dict[str, list[NDArray[Any]]] = {k: [] for k in ("e", "el", "f", "fl", "z", "n")}
    for start in range(0, len(frames), size):
        chunk = [frames[i] for i in range(start, min(start + size, len(frames)))]
        for i, frame in enumerate(chunk, start):
            if (frame.energy is not None) != has_energy or (frame.forces is not None) != has_forces:
                raise DataError(
                    f"frame {i} of {frames.metadata.name} does not have the same labels as frame 0; "
                    "evaluate frames that are labelled alike"
                )
        batch = collate([sample_from_frame(f, potential.cutoff, start + i) for i, f in enumerate(chunk)])
        out = potential(batch.graph.to(device), forces=has_forces, stress=False)
        for key in ("energy", "forces"):
            if key in out and not bool(torch.isfinite(out[key]).all()):
                raise NonFiniteError(
                    f"the model's {key} is not finite between frames {start} and {start + len(chunk) - 1} of "
                    f"{frames.metadata.name}; check these frames or the model"
                )
        columns["z"].append(batch.graph.z.numpy())
        columns["n"].append(np.array([len(f) for f in chunk]))
        if has_energy and potential.has_energy:
            columns["e"].append(out["energy"].cpu().numpy())
            columns["el"].append(batch.targets["energy"].numpy())
        if has_forces:
            columns["f"].append(out["forces"].double().cpu().numpy())
            columns["fl"].append(batch.targets["forces"].numpy())
        if progress is not None:
            progress(start + len(chunk))
    joined = {key: np.concatenate(value) if value else None for key, value in columns.items()}
    return Predictions(
        joined["e"], joined["el"], joined["f"], joined["fl"],
        _present(joined["z"]), _present(joined["n"]),
    )  # fmt: skip


def _present(array: NDArray[Any] | None) -> NDArray[Any]:
    if array is None:
        raise DataError("no frames were evaluated")
    return array


def error_table(predictions: Predictions) -> dict[str, Quantity]:
    """Return MAE and RMSE with their units; forces per component over all atoms, also in kcal/mol/Å.

    Args:
        predictions: from :func:`predict`.
    """
    table: dict[str, Quantity] = {}

    def add(name: str, residual: NDArray[np.float64], unit: str, factor: float = 1.0) -> None:
        table[f"{name}_mae"] = Quantity(value=float(np.abs(residual).mean()) * factor, unit=unit)
        table[f"{name}_rmse"] = Quantity(value=float(np.sqrt(np.square(residual).mean())) * factor, unit=unit)

    p = predictions
    if p.forces is not None and p.forces_label is not None:
        residual = p.forces - p.forces_label
        add("forces", residual, "eV/angstrom")
        add("forces_kcal", residual, "kcal/mol/angstrom", 1 / KCAL_PER_MOL)
        rms = float(np.sqrt(np.square(p.forces_label).mean()))
        table["forces_label_rms"] = Quantity(value=rms, unit="eV/angstrom")
        from ase.data import chemical_symbols

        for number in sorted(set(p.numbers.tolist())):
            own = residual[p.numbers == number]
            table[f"forces_mae_{chemical_symbols[number]}"] = Quantity(
                value=float(np.abs(own).mean()), unit="eV/angstrom"
            )
    if p.energy is not None and p.energy_label is not None:
        residual = p.energy - p.energy_label
        add("energy", residual, "eV")
        add("energy_kcal", residual, "kcal/mol", 1 / KCAL_PER_MOL)
        add("energy_per_atom", residual / p.n_atoms, "eV/atom")
        std = float(np.std(p.energy_label))
        table["energy_label_std"] = Quantity(value=std, unit="eV")
    return table


def measure(
    model: Model, frames: Dataset, progress: Callable[[int], Any] | None = None
) -> dict[str, Quantity]:
    """Return the errors of a model on labelled frames, with units.

    Args:
        model: in eval mode.
        frames: with energies or forces, or with the property that the model is of.
        progress: called with the number of frames done after each batch.

    Raises:
        ConfigError: the frames have no such property.
        DataError: no frames, labels missing on some frames, of another unit, or another level of theory.
        UnsupportedInputError: an element the model never saw.
        NonFiniteError: the model gives NaN or an infinity; names the frame.
    """
    if isinstance(model, PropertyModel):
        return _property_errors(model, frames, progress)
    return error_table(predict(model, frames, progress))


def _property_errors(
    model: PropertyModel, frames: Dataset, progress: Callable[[int], Any] | None
) -> dict[str, Quantity]:
    read = PropertyReader.of(frames, model.name)
    if read.unit != model.unit:
        raise DataError(f"{read.dataset} has {model.name} in {read.unit}, the model in {model.unit}")
    if len(frames) == 0:
        raise DataError(f"{read.dataset} has no frames to evaluate")
    check_level_of_theory(model, frames)
    labels = np.array([read(frame, i) for i, frame in enumerate(frames)])
    found = []
    size = max(1, ATOMS_PER_BATCH // max(1, len(frames[0])))
    for start in range(0, len(frames), size):
        chunk = [frames[i] for i in range(start, min(start + size, len(frames)))]
        batch = collate([sample_from_frame(f, model.cutoff, start + i) for i, f in enumerate(chunk)])
        value = model(batch.graph.to(model.known.device))[model.name]
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"the model's {model.name} is not finite between frames {start} and {start + len(chunk) - 1} "
                f"of {read.dataset}; check these frames or the model"
            )
        found.append(value.cpu().numpy())
        if progress is not None:
            progress(start + len(chunk))
    residual = np.concatenate(found) - labels
    errors = {
        "mae": np.abs(residual).mean(),
        "rmse": np.sqrt(np.square(residual).mean()),
        "label_std": np.std(labels),
    }
    return {f"{model.name}_{key}": Quantity(value=float(v), unit=model.unit) for key, v in errors.items()}


def measured_errors(predictions: Predictions, dataset: str) -> MeasuredErrors:
    """Return the errors as a card holds them.

    Args:
        predictions: from :func:`predict`.
        dataset: says which frames, such as ``"rmd17 aspirin, test_01"``.
    """
    return MeasuredErrors(
        dataset=dataset, n_frames=len(predictions.n_atoms), quantities=error_table(predictions)
    )
