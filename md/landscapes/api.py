"""The public function: from a model and a wish to landscapes on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.md.landscapes.evaluate import Evaluator, evaluate, evaluator
from ffpretrain.md.landscapes.files import output_folder, refuse_earlier, write
from ffpretrain.md.landscapes.grids import Wish, make_grid
from ffpretrain.md.landscapes.labels import Labels, label_frames
from ffpretrain.md.landscapes.learned import energy_response
from ffpretrain.md.landscapes.roughness import roughness
from ffpretrain.md.landscapes.scans import Coordinate
from ffpretrain.md.landscapes.surface import UNITS, Array, Geometries, Landscape
from ffpretrain.plots import require_matplotlib

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

    from ffpretrain.datasets.frames import Dataset
    from ffpretrain.potential import Potential


def landscape(
    model: Any,
    atoms: Atoms | None = None,
    *,
    scan: Sequence[str | Coordinate] = (),
    relaxed: bool = False,
    along: str | None = None,
    directions_from: Any = None,
    geometries: Geometries | None = None,
    points: int = 41,
    extent: float = 0.15,
    seed: int = 0,
    fit_head: Dataset | None = None,
    with_untrained: bool = False,
    reference: Any = None,
    reference_label: str | None = None,
    labels: Dataset | None = None,
    dtype: str = "float32",
    forces: bool = True,
    out: str | Path | None = None,
    unit: str = "kcal/mol",
    path: Array | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Landscape]:
    """Evaluate one or more models on a grid of geometries; write figures, an interactive page and numbers.

    Args:
        model: a named model, a model file, a potential, an ASE calculator, or a list of them, compared on the
            same grid and scale.
        atoms: the structure; None takes the reference geometry of the (first) model. A model that was not
            trained on it warns once for each cause.
        scan: one or two coordinates, such as ``"dihedral 0 1 2 3 -180 180 37"``; none draws a random plane.
        relaxed: relax everything but the scanned coordinates, with the first model.
        along: a grid in words: ``modes 0 1``, ``conformations FILE``, ``trajectory FILE`` or ``band FILE``;
            see :func:`ffpretrain.md.landscapes.grids.along`.
        directions_from: a DenoiseVAE model that kept its noise generator; two draws of it span the plane, and
            the noise of each atom is drawn on the molecule.
        geometries: a grid of one's own, from :mod:`ffpretrain.md.landscapes`; replaces the choices above.
        points: along each axis of a plane.
        extent: Å, largest RMS displacement of an atom in a random or learned plane, or along modes.
        seed: of drawn directions and fitted heads.
        fit_head: labelled frames: every model is taken as an encoder, its weights frozen, and gets an energy
            head fitted to them; see :func:`ffpretrain.training.energy_head.fit_energy_head`.
        with_untrained: with ``fit_head``, add the first model's network with fresh weights for comparison.
        reference: a further calculator or model whose energies are drawn on top and compared with.
        reference_label: names it; None takes the calculator's own name.
        labels: labelled frames of the molecule, drawn where they lie and compared with.
        dtype: of the networks.
        forces: False computes energies alone, the same ones, in about half of the time; roughness then has no
            ``force_consistency``. Forces of references are never computed.
        out: folder for ``landscape.png|svg|pdf|html|npz|json``, and ``noise.png|svg``; None writes nothing. A
            stopped evaluation goes on in the same folder.
        unit: of energies in figures and page: ``eV`` or ``kcal/mol``.
        path: points ``[T, 2]`` in the plane, drawn on the map.
        overwrite: replace an earlier landscape in ``out``.
        progress: show a bar on stderr.

    Returns:
        One landscape for each model.

    Raises:
        ConfigError: an option out of range, or several kinds of grid.
        UnsupportedInputError: a structure that the grid or a model cannot take.
        DataError: ``out`` cannot be written or holds another landscape, or frames that do not fit.
        MissingDependencyError: ``out`` is given and matplotlib cannot be loaded.
    """
    if unit not in UNITS:
        raise ConfigError(f"unit={unit!r}: give one of {', '.join(UNITS)}")
    if with_untrained and fit_head is None:
        raise ConfigError("with_untrained=True compares encoders; give fit_head the frames to fit heads to")
    if out is not None:
        require_matplotlib()
        refuse_earlier(Path(out), overwrite)
    given = list(model) if isinstance(model, list | tuple) else [model]
    base = geometries.atoms if geometries is not None else structure_of(given[0], atoms)
    fits: list[dict[str, float]] = []
    if fit_head is not None:
        given, fits = fitted(given, fit_head, seed, with_untrained, progress)
    models = distinct([evaluator(one, dtype) for one in given])
    others = [] if reference is None else [evaluator(reference, dtype)]
    # of the middle alone: points of a grid are strained on purpose. A fitted head was shown the molecule.
    for asked in [*models, *others] if fit_head is None else others:
        if asked.check is not None:
            asked.check(base)
    others = [one._replace(label=reference_label or one.label) for one in others]
    place = nullcontext(None) if out is None else output_folder(Path(out), overwrite)
    with place as folder:
        if geometries is None:
            wish = Wish(scan, relaxed, along, directions_from, points, extent, seed)
            state = None if folder is None else folder / ".landscape-relaxed.part.npz"
            maker = functools.partial(_calculator, given[0])
            bar = functools.partial(_bar, progress=progress)
            geometries, own_path = make_grid(wish, base, maker, bar, state, models[0].identity)
            path = own_path if path is None else path
        run = functools.partial(_run, geometries, folder=folder, progress=progress)
        found = [run(one, i, forces=forces) for i, one in enumerate(models)]
        compared = {
            one.label: run(one, len(models) + i, forces=False).energies for i, one in enumerate(others)
        }
        result = []
        for i, (one, by) in enumerate(zip(found, models, strict=True)):
            own = None if labels is None else _labels(labels, geometries, by, progress)
            fit = fits[i] if fits else {}
            cost = _response(geometries, by)
            more = replace(one, references=compared, roughness=roughness(one), labels=own)
            result.append(replace(more, fit=fit, response=cost))
        if folder is not None:
            write(result, folder, unit, path)
    return result


def _labels(frames: Dataset, geometries: Geometries, model: Evaluator, progress: bool) -> Labels:
    with _bar(f"{model.label}: labelled frames", len(frames), progress) as advance:
        return label_frames(frames, geometries, model, advance)


def _response(geometries: Geometries, model: Evaluator) -> Array | None:
    """Return what displacing each atom alone costs by the model, where the noise of each atom is known."""
    if geometries.noise is None:
        return None
    energies = functools.partial(model.compute, forces=False)
    return energy_response(energies, geometries.atoms, float(geometries.noise.mean()))


def structure_of(model: Any, atoms: Atoms | None) -> Atoms:
    """Return the structure given, or else the reference geometry of a model.

    Raises:
        UnsupportedInputError: neither.
    """
    from ffpretrain.artifacts import read_card

    if atoms is not None:
        return atoms
    card = read_card(model) if isinstance(model, str | Path) else getattr(model, "card", None)
    if card is None or card.reference_geometry is None:
        raise UnsupportedInputError("the model is not for one molecule; give a structure")
    return card.reference_geometry.to_atoms()


def fitted(
    models: Sequence[Any], frames: Dataset, seed: int, with_untrained: bool, progress: bool
) -> tuple[list[Potential], list[dict[str, float]]]:
    """Return models as frozen encoders with energy heads fitted to the same frames, and the heads' errors.

    Raises:
        DataError, ConfigError, ArtifactError: as :func:`ffpretrain.training.energy_head.fit_energy_head`.
    """
    from ffpretrain.training.energy_head import STEPS, fit_energy_head, untrained

    every = [*models, untrained(models[0], seed)] if with_untrained else list(models)
    potentials, errors = [], []
    for i, one in enumerate(every):
        with _bar(f"fit head {i + 1} of {len(every)}", STEPS, progress) as advance:
            found = fit_energy_head(one, frames, seed=seed, progress=advance)
        potentials.append(found.potential)
        numbers = {name: quantity.value for name, quantity in found.errors.items()}
        errors.append({**numbers, "frames_fitted": found.n_fitted, "frames_held_out": found.n_held_out})
    return potentials, errors


def distinct(models: Sequence[Evaluator]) -> list[Evaluator]:
    """Return evaluators whose labels differ: those of one name are numbered, in the order given."""
    labels = [one.label for one in models]
    found = []
    for i, one in enumerate(models):
        again = labels[:i].count(one.label)
        found.append(one._replace(label=f"{one.label} ({again + 1})") if labels.count(one.label) > 1 else one)
    return found


def _calculator(model: Any) -> Calculator:
    from torch import nn

    from ffpretrain.md.calculator import FFCalculator

    is_model = isinstance(model, str | Path | nn.Module)
    # the evaluator of the same model has warned already
    return FFCalculator(model, dtype="float64", on_unfamiliar="ignore") if is_model else model


def _run(
    geometries: Geometries, one: Evaluator, i: int, folder: Path | None, progress: bool, forces: bool
) -> Landscape:
    state = None if folder is None else folder / f".landscape-{i}.part.npz"
    with _bar(one.label, int(np.prod(geometries.shape)), progress) as advance:
        return evaluate(geometries, one, state, advance, forces)


def _bar(title: str, total: int | None, progress: bool) -> AbstractContextManager[Callable[[int], object]]:
    from ffpretrain.cli.progress import counting

    return counting(title, total, quiet=not progress)
