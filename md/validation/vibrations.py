"""Vibrations at the minimum: is it one, and what are its wavenumbers?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ffpretrain import units
from ffpretrain.datasets.modes import modes_of_hessian, wavenumbers
from ffpretrain.errors import ConfigError, NonFiniteError, UnsupportedInputError
from ffpretrain.graphs import Graph
from ffpretrain.md.validation.bonds import Limits
from ffpretrain.md.validation.result import Check, verdict
from ffpretrain.md.validation.thresholds import ASYMMETRY, IMAGINARY, RELAXED

if TYPE_CHECKING:
    from ase import Atoms

    from ffpretrain.md.validation.subject import Subject

#: steps of one relaxation
STEPS = 2000
#: times an imaginary mode is followed downhill
FOLLOWED = 3
#: Å √amu, first step along an imaginary mode
PUSH = 0.2

Array = NDArray[np.float64]


def check_vibrations(subject: Subject) -> tuple[Check, Atoms]:
    """Relax the structure in float64 and look at the vibrations there.

    A structure that relaxes onto a saddle point has imaginary modes; each is followed downhill to a lower
    minimum, which explains it. One that is left there is unexplained and a miss.

    Returns:
        The check, and the relaxed structure, or the given one where it could not be relaxed.
    """
    atoms, followed = subject.atoms.copy(), []
    try:
        force = _relax(subject, atoms)
        _refuse_pieces(subject, atoms)
        for attempt in range(FOLLOWED + 1):
            hessian, asymmetry = symmetric_hessian(subject.potential, subject.graph(atoms))
            squared, modes = modes_of_hessian(atoms, hessian)
            numbers = wavenumbers(squared)
            if attempt == FOLLOWED or not numbers[0] < -IMAGINARY:
                break
            lower, gain = _follow(subject, atoms, modes[0])
            if gain <= 0:
                break
            followed.append({"wavenumber": float(numbers[0]), "energy_gained": gain})
            atoms = lower
            force = _largest_force(subject, atoms)
    except (NonFiniteError, UnsupportedInputError, _CannotRelax) as error:
        return Check("vibrations", "missed", f"no minimum found: {error}"), subject.atoms.copy()
    except ConfigError as error:
        return Check("vibrations", "missed", str(error)), atoms
    return _judge(atoms, numbers, asymmetry, force, followed), atoms


def hessian(model: nn.Module, graph: Graph) -> Array:
    """Return the second derivatives of the energy ``[3N, 3N]`` eV/Å², by differentiating the forces.

    Row by row minus the derivative of a force component, as it comes: only a conservative model's is
    symmetric.

    Args:
        model: a potential in float64; its mode is put back.
        graph: one structure.

    Raises:
        ConfigError: the model's forces cannot be differentiated.
    """
    mode = model.training
    model.train()
    try:
        pos = graph.pos.detach().clone().requires_grad_(True)
        forces = model(graph._replace(pos=pos))["forces"].flatten()
        if not forces.requires_grad:
            raise ConfigError(
                "the model's forces cannot be differentiated, so it has no vibrations to look at"
            )
        rows = [torch.autograd.grad(component, pos, retain_graph=True)[0] for component in forces]
    finally:
        model.train(mode)
    return -torch.stack(rows).reshape(len(rows), -1).to("cpu", torch.float64).numpy()


def symmetric_hessian(model: nn.Module, graph: Graph) -> tuple[Array, float]:
    """Return the symmetric part of :func:`hessian`, and the largest asymmetry over the largest entry."""
    found = hessian(model, graph)
    if not np.isfinite(found).all():
        raise NonFiniteError("a second derivative of the energy is not finite")
    asymmetry = float(np.abs(found - found.T).max() / max(np.abs(found).max(), 1e-12))
    return 0.5 * (found + found.T), asymmetry


class _CannotRelax(Exception):
    """The relaxation did not come to an end."""


def _relax(subject: Subject, atoms: Atoms) -> float:
    """Relax atoms in place; return the largest force component in eV/Å."""
    from ase.optimize import BFGS, LBFGS

    atoms.calc = subject.exact
    method: Any = BFGS if len(atoms) <= 200 else LBFGS
    if not method(atoms, logfile=None).run(fmax=RELAXED, steps=STEPS):
        left = _largest_force(subject, atoms)
        raise _CannotRelax(
            f"after {STEPS} steps of relaxation the largest force is {left:.3g} eV/Å, wanted {RELAXED}"
        )
    return _largest_force(subject, atoms)


def _refuse_pieces(subject: Subject, atoms: Atoms) -> None:
    """Refuse a relaxed structure that is another molecule or none: far-away atoms have no forces either."""
    limits = Limits(subject.atoms, None, subject.card, torch.device("cpu"))
    broken = limits.explain(torch.tensor(atoms.positions))
    if broken:
        raise _CannotRelax(f"relaxation breaks the structure: {broken}")


def _largest_force(subject: Subject, atoms: Atoms) -> float:
    return float(np.abs(subject.exact.get_forces(atoms)).max())


def _follow(subject: Subject, atoms: Atoms, mode: Array) -> tuple[Atoms, float]:
    """Go downhill along a mode ``[N, 3]``, both ways; return the lower end and the energy gained in eV."""
    start = float(subject.exact.get_potential_energy(atoms))
    ends = []
    for sign in (1.0, -1.0):
        moved = atoms.copy()
        moved.positions += sign * PUSH * mode / np.sqrt(atoms.get_masses())[:, None]
        _relax(subject, moved)
        ends.append((float(subject.exact.get_potential_energy(moved)), moved))
    energy, lower = min(ends, key=lambda end: end[0])
    return lower, start - energy


def _judge(
    atoms: Atoms, numbers: Array, asymmetry: float, force: float, followed: list[dict[str, float]]
) -> Check:
    imaginary = numbers[numbers < -IMAGINARY]
    real = numbers[numbers > IMAGINARY]
    ok = not len(imaginary) and asymmetry <= ASYMMETRY
    if len(imaginary):
        shown = ", ".join(f"{-number:.0f}i" for number in imaginary)
        summary = f"imaginary modes without explanation: {shown} 1/cm"
    elif asymmetry > ASYMMETRY:
        summary = (
            f"the Hessian is not symmetric ({asymmetry:.1e} of its largest entry): the forces are no gradient"
        )
    else:
        summary = f"{len(numbers)} real modes"
        summary += f", {real[0]:.0f} to {real[-1]:.0f} 1/cm" if len(real) else ""
    if followed:
        steps = ", ".join(f"{-f['wavenumber']:.0f}i 1/cm" for f in followed)
        summary += f"; the structure relaxed to a saddle point ({steps}), followed down to a lower minimum"
    measured = {
        "wavenumbers": numbers.tolist(),
        "imaginary": imaginary.tolist(),
        "followed": followed,
        "zero_point_energy": float(0.5 * real.sum() * units.INVERSE_CM),
        "hessian_asymmetry": asymmetry,
        "largest_force": force,
        "energy": float(atoms.get_potential_energy()) if atoms.calc is not None else None,
    }
    return Check("vibrations", verdict(ok), summary, measured)
