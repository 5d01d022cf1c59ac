"""All checks at once, on small structures made for the purpose."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from ffpretrain.backbones.base import Backbone
from ffpretrain.potential import Potential
from ffpretrain.testing import periodic, physics, symmetry
from ffpretrain.testing.outputs import SymmetryError
from ffpretrain.testing.structures import crystal, random_molecule, stretched, symmetric_molecules

_USUAL = (6, 1, 8, 7, 9)


def randomize(module: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Add noise to every trainable parameter, in place.

    Fresh networks hide errors: biases start at zero, and what is multiplied by them with it.

    Args:
        module: any.
        seed: of the noise.
        size: its standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise).to(parameter))


def potential_of(backbone: Backbone, seed: int = 0) -> Potential:
    """Return a float64 potential with a randomised copy of a backbone and a new energy head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = Potential(copy.deepcopy(backbone)).double().eval()
    randomize(potential, seed)
    return potential


def checks(potential: Potential, seed: int = 0) -> dict[str, Callable[[], object]]:
    """Return every check of the kit, by name, ready to call.

    Args:
        potential: in float64 and eval mode, as :func:`potential_of` makes it.
        seed: of the structures and transformations.
    """
    cutoff, known = potential.cutoff, potential.elements
    elements = [z for z in _USUAL if z in known] or known[:3]
    generator = torch.Generator().manual_seed(seed)
    small = random_molecule(elements, 4, cutoff, generator)
    large, other = (stretched(random_molecule(elements, 8, cutoff, generator), cutoff) for _ in range(2))
    solid = crystal(elements, cutoff)
    symmetric = symmetric_molecules(elements, cutoff)

    def second_derivatives() -> None:
        for name, graph in {**symmetric, "random": small}.items():
            for layout, model in (("edges", potential), ("dense", physics.DenseModel(potential))):
                try:
                    physics.check_second_derivatives(model, graph)
                except SymmetryError as error:
                    raise SymmetryError(f"{name} molecule, {layout} layout: {error}") from error

    return {
        "rotation": lambda: symmetry.check_rotation(potential, large, seed=seed),
        "reflection": lambda: symmetry.check_reflection(potential, large, seed=seed),
        "translation": lambda: symmetry.check_translation(potential, large, seed=seed),
        "permutation": lambda: symmetry.check_permutation(potential, large, seed=seed),
        "batching": lambda: symmetry.check_batching(potential, [small, large, symmetric["atom"], other]),
        "forces": lambda: physics.check_forces(potential, large),
        "smoothness": lambda: physics.check_smoothness(potential, elements),
        "isolated_atoms": lambda: physics.check_isolated_atoms(potential, elements),
        "size_consistency": lambda: physics.check_size_consistency(potential, small, large),
        "layouts": lambda: physics.check_layouts(potential, [large, other]),
        "precision": lambda: physics.check_precision(potential, large),
        "second_derivatives": second_derivatives,
        "periodic_rotation": lambda: symmetry.check_rotation(potential, solid, seed=seed),
        "supercell": lambda: periodic.check_supercell(potential, solid),
        "wrapping": lambda: periodic.check_wrapping(potential, solid, seed=seed),
        "stress": lambda: periodic.check_stress(potential, solid),
    }


#: names of all checks, for parametrised tests
CHECK_NAMES = (
    "rotation",
    "reflection",
    "translation",
    "permutation",
    "batching",
    "forces",
    "smoothness",
    "isolated_atoms",
    "size_consistency",
    "layouts",
    "precision",
    "second_derivatives",
    "periodic_rotation",
    "supercell",
    "wrapping",
    "stress",
)


def run_check(name: str, backbone: Backbone, seed: int = 0) -> None:
    """Run one check on a backbone with a fresh energy head.

    Args:
        name: one of :data:`CHECK_NAMES`.
        backbone: small, so that it is quick: some 16 features and 2 layers.
        seed: of weights and structures.

    Raises:
        SymmetryError: the check fails.
        KeyError: no check has this name.
    """
    checks(potential_of(backbone, seed), seed)[name]()


def check_all(backbone: Backbone, seed: int = 0) -> None:
    """Run every check on a backbone with a fresh energy head.

    Args:
        backbone: as :func:`run_check`.
        seed: of weights and structures.

    Raises:
        SymmetryError: some checks fail; the message has one line for each.
    """
    failures = []
    for name, check in checks(potential_of(backbone, seed), seed).items():
        try:
            check()
        except SymmetryError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise SymmetryError("\n".join(failures))
