"""A potential: backbone, energy head and reference energies; forces and stress by differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.errors import ConfigError, UnsupportedInputError
from ffpretrain.graphs import Graph
from ffpretrain.heads import EnergyHead

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard


class Model(nn.Module):
    """A backbone with a head, and the elements it was trained on: what a model file holds.

    Args:
        backbone: any backbone.
        head: turns the backbone's features into what the model predicts.
        known: whether the model was trained on an atomic number ``[max_z]``, bool; others are refused.
        card: what is known of a trained model.
    """

    #: whether the forces are the gradient of an energy, which then is given too
    conservative: ClassVar[bool]
    #: whether it gives an energy
    has_energy: ClassVar[bool] = True
    #: buffers that stay float64 whatever the precision of the network
    exact: ClassVar[tuple[str, ...]] = ()
    known: Tensor

    def __init__(
        self, backbone: Backbone, head: nn.Module, known: Tensor, card: ModelCard | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.card = card
        self.register_buffer("known", known)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module, but keep the exact buffers in float64."""
        exact = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    def cutoff(self) -> float:
        """Largest distance of an edge in Å."""
        return self.backbone.cutoff

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.backbone.dtype

    @property
    def elements(self) -> list[int]:
        """Atomic numbers the model accepts."""
        return self.known.nonzero().flatten().tolist()

    def features(self, graph: Graph) -> Features:
        """Return the backbone's :class:`~ffpretrain.backbones.base.Features` of a graph."""
        self.check_elements(graph.z)
        return self.backbone(graph)

    def check_elements(self, z: Tensor) -> None:
        """Refuse atomic numbers the model never saw.

        Raises:
            UnsupportedInputError: names the elements found and those the model has.
        """
        in_range = (z > 0) & (z < len(self.known))
        if bool(in_range.all()) and bool(self.known[z].all()):
            return
        from ase.data import chemical_symbols

        have = set(self.elements)
        unknown = set(z.tolist()) - have
        ordered = sorted(unknown - {0})
        names = [chemical_symbols[n] if 0 < n < len(chemical_symbols) else str(n) for n in ordered]
        if 0 in unknown:  # a dummy atom, which ASE writes so
            names.append("X, which is no element")
        raise UnsupportedInputError(
            f"the model was not trained on {', '.join(names)}; it knows "
            f"{', '.join(chemical_symbols[n] for n in sorted(have) if n < len(chemical_symbols))}"
        )


class Potential(Model):
    """Conservative potential ``E = scale * sum_i e_i + sum_i E_ref(z_i) + shift``, ``F = -dE/dx``.

    The network's part is computed in the precision of its weights; the scale, the reference energies, the
    shift and the sum over atoms are float64, so that differences of 1e-5 eV survive on totals of -20,000 eV.

    Args:
        backbone: any backbone.
        head: gives the atomic energies ``e_i``; None builds an :class:`~ffpretrain.heads.EnergyHead`.
        scale: eV per unit of the network's output.
        shift: eV added once per structure, whatever its size. Only weights of other programs need it: with
            it, two molecules far apart no longer have the sum of their energies.
        reference_energies: eV by atomic number; None leaves every reference at zero.
        elements: atomic numbers the model was trained on; others are refused. None takes those of
            ``reference_energies``, or accepts all that the embedding holds.
        card: what is known of a trained model.

    Raises:
        ConfigError: an element or reference energy for which the backbone has no embedding.
    """

    conservative: ClassVar[bool] = True
    exact: ClassVar[tuple[str, ...]] = ("scale", "shift", "reference")
    head: EnergyHead
    scale: Tensor
    shift: Tensor
    reference: Tensor

    def __init__(
        self,
        backbone: Backbone,
        head: EnergyHead | None = None,
        *,
        scale: float = 1.0,
        shift: float = 0.0,
        reference_energies: Mapping[int, float] | None = None,
        elements: list[int] | None = None,
        card: ModelCard | None = None,
    ) -> None:
        if elements is None:
            elements = list(reference_energies or range(1, backbone.max_z))
        if head is None:
            head = EnergyHead(backbone.n_features, backbone.has_vectors)
        known_elements(reference_energies or (), backbone)  # refuses those without an embedding
        super().__init__(backbone, head, known_elements(elements, backbone), card)
        reference = torch.zeros(backbone.max_z, dtype=torch.float64)
        for number, energy in (reference_energies or {}).items():
            reference[number] = energy
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float64))
        self.register_buffer("reference", reference)

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        """Evaluate a graph.

        Args:
            graph: positions in Å, complete up to the cutoff; best in float64.
            forces: differentiate; False returns energies only.
            stress: None gives a stress where a cell has a volume.

        Returns:
            ``energy [B]`` eV float64, ``energies [N]`` eV float64 (without the shift), ``forces [N, 3]`` eV/Å
            in the precision of ``graph.pos``, and ``stress [B, 3, 3]`` eV/Å³ (positive under tension, as ASE;
            zero for a structure whose cell has no volume). In training mode all can be differentiated again.

        Raises:
            UnsupportedInputError: an element the model never saw.
        """
        if torch.is_inference_mode_enabled():
            # forces need a derivative, which inference mode forbids; copies made outside of it allow one
            with torch.inference_mode(False):
                copies = (t.clone() if isinstance(t, Tensor) else t for t in graph)
                return self.forward(Graph._make(copies), forces=forces, stress=stress)
        self.check_elements(graph.z)
        volume = torch.linalg.det(graph.cell).abs()
        periodic = bool((volume > 0).any()) if stress is None else stress
        create_graph = self.training and torch.is_grad_enabled()
        with torch.set_grad_enabled(forces or create_graph):
            pos = graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_(forces)
            strained, strain = graph._replace(pos=pos), None
            if forces and periodic:
                strained, strain = _apply_strain(strained)
            energies = self.atomic_energies(self.backbone(strained), graph.z)
            energy = energies.new_zeros(graph.n_graphs).index_add(0, graph.batch, energies) + self.shift
            out = {"energy": energy, "energies": energies}
            if forces:
                wanted = [pos] if strain is None else [pos, strain]
                grads = torch.autograd.grad(
                    energy.sum(), wanted, create_graph=create_graph, materialize_grads=True
                )
                out["forces"] = -grads[0]
                if strain is not None:
                    density = torch.where(volume > 0, 1 / volume.clamp(min=1e-12), 0.0)
                    symmetric = 0.5 * (grads[1] + grads[1].transpose(1, 2))
                    out["stress"] = symmetric * density.view(-1, 1, 1)
        return out if create_graph else {key: value.detach() for key, value in out.items()}

    def atomic_energies(self, features: Features, z: Tensor) -> Tensor:
        """Return atomic energies ``[N]`` in eV, float64, reference energies included."""
        return self.head(features).to(self.scale.dtype) * self.scale + self.reference[z]


def known_elements(elements: Iterable[int], backbone: Backbone) -> Tensor:
    """Return whether each atomic number is among ``elements``, bool ``[max_z]``.

    Raises:
        ConfigError: one for which the backbone has no embedding.
    """
    known = torch.zeros(backbone.max_z, dtype=torch.bool)
    for number in elements:
        if not 0 < number < backbone.max_z:
            raise ConfigError(
                f"no embedding for atomic number {number}: the backbone's max_z={backbone.max_z} allows "
                f"1 to {backbone.max_z - 1}"
            )
        known[number] = True
    return known


def _apply_strain(graph: Graph) -> tuple[Graph, Tensor]:
    """Deform positions and lattice shifts by a symmetric strain of zero that gradients flow to."""
    strain = graph.pos.new_zeros(graph.n_graphs, 3, 3).requires_grad_(True)
    symmetric = 0.5 * (strain + strain.transpose(1, 2))
    per_atom = symmetric[graph.batch]
    pos = graph.pos + torch.einsum("ni,nij->nj", graph.pos, per_atom)
    per_edge = per_atom[graph.edge_index[1]]
    shift = graph.edge_shift + torch.einsum("ei,eij->ej", graph.edge_shift, per_edge)
    return graph._replace(pos=pos, edge_shift=shift), strain
