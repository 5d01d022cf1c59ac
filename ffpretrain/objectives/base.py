"""What every objective is: a module that turns a batch into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Backbone
from ffpretrain.datasets import Dataset
from ffpretrain.errors import ConfigError, DataError
from ffpretrain.graphs import Graph, Sample, atoms_per_graph
from ffpretrain.neighbors import neighbor_list
from ffpretrain.noise import Noise
from ffpretrain.objectives.strained import Strained
from ffpretrain.potential import Potential


class Drawn(NamedTuple):
    """All that is random about a step.

    Attributes:
        noise: None where the step has none.
        strained: the step's structures strained; None where it has none of them.
    """

    noise: Noise | None = None
    strained: Strained | None = None


class Objective(nn.Module, ABC):
    """Base class of all objectives.

    Attributes:
        name: registry name.
        needs_labels: whether samples must carry energies and forces.
        network: the potential being trained: the backbone's owner.
    """

    name: ClassVar[str]
    needs_labels: ClassVar[bool]

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.network = potential

    @abstractmethod
    def forward(self, sample: Sample | Graph, generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``{"loss": scalar, ...}`` with the objective's own terms by name.

        ``zero``, ``floor`` and ``chance``, alone or as in ``inp_chance`` after another term, are no parts of
        the loss but what to read it against; see :data:`~ffpretrain.objectives.floors.REFERENCES`.

        Args:
            sample: a batch; a bare graph is enough where no labels are needed.
            generator: source of every random draw of the step.

        Raises:
            DataError: labels the objective needs are missing.
        """

    @property
    def recordable(self) -> bool:
        """Whether :meth:`draw_step` takes all random decisions of a step, :meth:`terms_given` never waits.

        Only then can whole steps be recorded (:mod:`ffpretrain.training.recorded`).
        """
        return False

    def draw_step(self, graph: Graph, index: Tensor | None, generator: torch.Generator) -> Drawn:
        """Return what is random about a step, on the graph's device.

        Args:
            graph: the step's structures; its edges are not read.
            index: identifies each structure ``[B]``.
            generator: source of every random draw of the step.
        """
        return Drawn()

    def terms_given(self, sample: Sample | Graph, drawn: Drawn) -> dict[str, Tensor]:
        """Return what :meth:`forward` does, for draws made before.

        Args:
            sample: a batch.
            drawn: of :meth:`draw_step`, on the batch's device.

        Raises:
            ConfigError: the objective draws while it computes.
        """
        raise ConfigError(f"objective {self.name!r} draws its noise while it computes")

    def check_frames(self, frames: Dataset) -> None:
        """Look at the training frames before anything is trained or written.

        Raises:
            DataError: the objective cannot learn from one.
        """

    @classmethod
    def variant(cls, options: Mapping[str, Any]) -> type[Objective]:
        """Return the class that serves these options; mostly this one."""
        return cls

    @classmethod
    def labels(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what every frame must have: energies and forces, or nothing, or properties by name."""
        return ("energy", "forces") if cls.needs_labels else ()

    @property
    def monitor(self) -> str:
        """The quantity of a validation that selects the best weights; smaller is better."""
        return "forces_mae" if self.needs_labels else "loss"

    def validation_errors(self, sample: Sample) -> dict[str, tuple[float, int]]:
        """Return errors of what was learned, with labels: a sum and what to divide it by, for each name.

        ``..._mse`` becomes the root of its mean. Forces in eV/Å, energies in eV.

        Args:
            sample: a batch with its labels.
        """
        out = self.potential()(sample.graph, stress=False)
        force_error = out["forces"] - sample.targets["forces"]
        energy_error = out["energy"] - sample.targets["energy"]
        each = energy_error / atoms_per_graph(sample.graph)
        components, graphs = force_error.numel(), sample.graph.n_graphs
        return {
            "forces_mae": (float(force_error.abs().sum()), components),
            "forces_mse": (float(force_error.square().sum()), components),
            "energy_mae": (float(energy_error.abs().sum()), graphs),
            "energy_per_atom_mae": (float(each.abs().sum()), graphs),
        }

    def at_step(self, step: int, max_steps: int) -> None:
        """Take notice of where training stands; the trainer says it before each training step.

        Args:
            step: optimiser steps taken so far.
            max_steps: length of the run.
        """

    def unit_of(self, term: str) -> str:
        """Return the unit of a term of :meth:`forward`; most are pure numbers, ``"1"``."""
        return "1"

    def accelerate(self) -> None:
        """Use compiled functions for training batches, where the objective has them.

        Raises:
            ConfigError: it has none.
        """
        raise ConfigError(f"objective {self.name!r} has no compiled path; set compile: false")

    def not_parallel(self) -> str | None:
        """Say why several processes would not give what one gives, or None where they do."""
        return None

    @abstractmethod
    def potential(self, kT: float | None = None, sigma: float | None = None) -> nn.Module:
        """Return what was learned as a potential: called with a graph, it gives energy and forces.

        Args:
            kT: temperature in eV that sets the energy scale of a denoiser; ignored where labels set it.
            sigma: noise standard deviation in Å the field is read at; ignored likewise.
        """


def graph_of(sample: Sample | Graph) -> Graph:
    """Return the graph of a sample, or the graph itself."""
    return sample.graph if isinstance(sample, Sample) else sample


def index_of(sample: Sample | Graph) -> Tensor | None:
    """Return the identifiers of a sample's structures ``[B]``, or None."""
    return sample.extras.get("index") if isinstance(sample, Sample) else None


def happens(probability: float, generator: torch.Generator) -> bool:
    """Decide from the step's generator; without a draw where it is certain."""
    if probability == 1:
        return True
    return bool(torch.rand((), generator=generator, device=generator.device) < probability)


def label(sample: Sample | Graph, name: str) -> Tensor:
    """Return a label of a sample.

    Raises:
        DataError: it is not there.
    """
    if not isinstance(sample, Sample) or name not in sample.targets:
        raise DataError(f"this objective needs the label {name!r}, which the data do not have")
    return sample.targets[name]


def displaced(graph: Graph, displacement: Tensor, cutoff: float) -> Graph:
    """Return the graph with atoms moved and its edges built anew.

    Args:
        graph: one or more structures.
        displacement: ``[N, 3]`` Å.
        cutoff: Å.
    """
    pos = graph.pos + displacement.to(graph.pos)
    edge_index, edge_shift = rebuilt_edges(graph, pos, cutoff)
    return graph._replace(pos=pos, edge_index=edge_index, edge_shift=edge_shift)


def rebuilt_edges(graph: Graph, pos: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Return ``edge_index`` and ``edge_shift`` for new positions of the same structures."""
    edges, shifts, start = [], [], 0
    for b, n in enumerate(torch.bincount(graph.batch, minlength=graph.n_graphs).tolist()):
        cell = graph.cell[b]
        pbc = (cell != 0).any(dim=1).tolist()
        edge_index, shift = neighbor_list(pos[start : start + n], cutoff, cell, pbc)
        edges.append(edge_index + start)
        shifts.append(shift)
        start += n
    return torch.cat(edges, dim=1), torch.cat(shifts)


def with_layers(backbone: Backbone, layers: int, objective: str) -> Backbone:
    """Return a backbone of the same kind and options, but with so many layers and fresh weights.

    Args:
        backbone: of which it is one.
        layers: number of layers.
        objective: that needs it, for the message.

    Raises:
        ConfigError: the backbone has no such option.
    """
    if "layers" not in backbone.config:
        raise ConfigError(f"{objective}: backbone {backbone.name!r} has no option 'layers' to set")
    return type(backbone)(**{**backbone.config, "layers": layers})


def mean_over(values: Tensor, sample: Sample | Graph, count: str) -> Tensor:
    """Return the mean of per-atom or per-structure values, or this process's share of the global one.

    Where a batch is spread over processes the trainer puts the global count, divided by the number of
    processes, into ``extras``; averaging gradients over processes then gives the gradient of the global mean.

    Args:
        values: ``[N]`` or ``[B]``.
        sample: the batch.
        count: ``"n_atoms"`` or ``"n_graphs"``.
    """
    if isinstance(sample, Sample) and count in sample.extras:
        return values.sum() / sample.extras[count]
    return values.mean()


def regression_loss(kind: str, difference: Tensor, delta: float = 0.1) -> Tensor:
    """Return a loss per row of ``difference``.

    Args:
        kind: ``l1`` (sum of magnitudes), ``l2`` (length, not squared), ``mse`` (squared length) or ``huber``
            (quadratic below ``delta``, linear above, summed; divided by delta so that it tends to ``l1``).
        difference: ``[n, d]``, or ``[n]`` for scalars.
        delta: where huber changes, in the units of ``difference``.

    Raises:
        ConfigError: unknown kind.
    """
    rows = difference.unsqueeze(-1) if difference.dim() == 1 else difference
    if kind == "l1":
        return rows.abs().sum(-1)
    if kind == "mse":
        return rows.square().sum(-1)
    if kind == "l2":
        # the constant keeps the derivative of the root finite where prediction equals label
        return (rows.square().sum(-1) + 1e-16).sqrt()
    if kind == "huber":
        loss = nn.functional.huber_loss(rows, torch.zeros_like(rows), reduction="none", delta=delta)
        return loss.sum(-1) / delta
    raise ConfigError(f"unknown loss {kind!r}; known: l1, l2, mse, huber")
