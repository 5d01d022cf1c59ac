"""What the checks look at: a model's named outputs, how each transforms, and how two results are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ffpretrain.graphs import Graph

#: a potential, or any function from a graph to named outputs
Model: TypeAlias = Callable[[Graph], Mapping[str, Tensor]]


class SymmetryError(Exception):
    """A model breaks a symmetry or a consistency that it should have; the message gives the numbers."""


class Kind(NamedTuple):
    """How an output behaves.

    Attributes:
        per: ``"atom"`` where the first axis counts atoms, ``"structure"`` where it counts structures.
        rank: ``"scalar"`` is invariant under rotation, ``"vector"`` is ``[..., 3]``, ``"features"`` are
            vectors ``[N, 3, F]``, ``"tensor"`` is ``[..., 3, 3]``.
    """

    per: Literal["atom", "structure"]
    rank: Literal["scalar", "vector", "features", "tensor"]


KINDS: dict[str, Kind] = {
    "energy": Kind("structure", "scalar"),
    "energies": Kind("atom", "scalar"),
    "forces": Kind("atom", "vector"),
    "stress": Kind("structure", "tensor"),
    "scalars": Kind("atom", "scalar"),
    "vectors": Kind("atom", "features"),
}


#: offsets and weights of the five-point first derivative; its error is of fourth order in the step
STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))


def evaluate(model: Model, graph: Graph) -> dict[str, Tensor]:
    """Return a model's outputs, and its backbone's features where it has the method ``features``."""
    out = dict(model(graph))
    features: Any = getattr(model, "features", None)
    if callable(features):
        scalars, vectors = features(graph)
        out["scalars"] = scalars
        if vectors is not None:
            out["vectors"] = vectors
    return {name: value.detach() for name, value in out.items()}


def rotated(name: str, value: Tensor, rotation: Tensor, kinds: Mapping[str, Kind]) -> Tensor:
    """Return what an output must become when positions become ``pos @ rotation.T``.

    Raises:
        KeyError: the output's kind is not known.
    """
    rank, matrix = kinds[name].rank, rotation.to(value)
    if rank == "vector":
        return value @ matrix.T
    if rank == "features":
        return torch.einsum("ij,njf->nif", matrix, value)
    if rank == "tensor":
        return matrix @ value @ matrix.T
    return value


def compare(
    what: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float, floor: float = 1e-3
) -> float:
    """Compare outputs by name.

    Args:
        what: begins the message.
        got: outputs to judge; may hold more names than ``want``.
        want: what they must be.
        tolerance: largest difference, relative to the largest entry of the output.
        floor: the largest entry counts as at least this.

    Returns:
        The largest difference of any output, relative as the tolerance is.

    Raises:
        SymmetryError: an output is missing, has another shape, is not finite, or differs.
    """
    largest = 0.0
    for name, value in want.items():
        if name not in got or got[name].shape != value.shape:
            shape = tuple(got[name].shape) if name in got else "missing"
            raise SymmetryError(f"{what}: {name} is {shape} instead of {tuple(value.shape)}")
        if value.numel() == 0:
            continue
        difference = (got[name].double() - value.double()).abs()
        scale = max(float(value.abs().max()), floor)
        worst = float(difference.max())
        if not worst <= tolerance * scale:
            place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
            raise SymmetryError(
                f"{what}: {name} differs by {worst:.3e} at {place}; the largest entry is {scale:.3e}, the "
                f"tolerance {tolerance:.0e} of it"
            )
        largest = max(largest, worst / scale)
    return largest


def tolerance_for(model: Model, graph: Graph, tolerance: float | None) -> float:
    """Return a tolerance if one is given, else 1e-9 for a model in float64 and 1e-4 for others."""
    if tolerance is not None:
        return tolerance
    dtype = getattr(model, "dtype", graph.pos.dtype)
    return 1e-9 if dtype == torch.float64 else 1e-4


def require_double(model: Model, what: str) -> None:
    """Refuse a check by finite differences in single precision.

    Raises:
        ValueError: the model's ``dtype`` is not float64.
    """
    if getattr(model, "dtype", torch.float64) != torch.float64:
        raise ValueError(f"{what} needs a model in float64; call .double() on it")


def cutoff_of(model: Model) -> float:
    """Return a model's cutoff in Å, from its attribute ``cutoff``."""
    return float(model.cutoff)  # type: ignore[attr-defined]
