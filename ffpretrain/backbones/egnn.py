"""EGNN, the E(n)-equivariant graph network (Satorras, Hoogeboom and Welling, ICML 2021), with more vectors.

Published, one layer (eq. 3 to 6, residual as in appendix C, attention as eq. 8):

    ``m_ij = phi_e(h_i, h_j, |x_i - x_j|^2, a_ij)``, with attention times ``e_ij = sigmoid(phi_inf(m_ij))``
    ``x_i <- x_i + C sum_j (x_i - x_j) phi_x(m_ij)``                      (``update_positions``)
    ``h_i <- h_i + phi_h(h_i, sum_j m_ij)``

over all pairs of atoms. 3D-EMGP uses 7 layers of 128, attention, fixed positions, and for ``a_ij`` the
one-hot class of the pair, 1, 2 or 3 bonds apart or other (``numbers`` and ``bonds``); DenoiseVAE states the
layers alone, 7 and 4. The paper does not join attention and moving positions; as in the authors' code,
``phi_x`` then reads messages that attention has weighed.

Ours:

* A cutoff. Messages are multiplied by the cosine cutoff of the distance between the atoms where they stand at
  first, vectors by its square: heads take norms of vectors and round them off near zero, which would show in
  the forces where the last neighbour leaves if vectors vanished no faster than scalars.
  ``smooth_cutoff=False`` leaves that out; with a cutoff beyond the largest distance it is the published
  network, with a smaller one the energy jumps where an atom crosses it.
* Vector features, which the published network lacks, but for one vector, the displacement
  ``u_i = sum over layers of C sum_j (x_i - x_j) phi_x(m_ij)``. Here each channel has such a sum with weights
  of its own, a linear function of the message (G) in the place of ``phi_x``:
  ``v_i = sum over layers of sum_j (x_j - x_i) G m_ij  +  c u_i``, F channels, c learned, without its last
  term where positions are fixed. G commutes with the sum and acts on atoms. Scalars do not read vectors.
* Vectors among the input (``vector_input``): their projections on ``x_j - x_i``, mixed, are added inside
  ``phi_e`` of the first layer, and they themselves, mixed, to ``v_i``.

C, one over the number of other atoms, is left to the weights of ``phi_x``: with it parts far apart would
not have the sum of their energies. Features start from an embedding of the elements, and the last ones
are the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffpretrain.backbones.base import Backbone, Features, check_positive
from ffpretrain.backbones.radial import cosine_cutoff
from ffpretrain.backbones.topology import HOP_CLASSES, Topology
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.pairs import Pairs


class EGNN(Backbone):
    """E(n)-equivariant graph network; registry name ``egnn``. The module says what is published.

    Args:
        hidden: features F.
        layers: number of layers.
        cutoff: Å.
        max_z: size of the element embedding; atomic numbers run from 1 to ``max_z - 1``.
        attention: weigh each message by a sigmoid of it.
        update_positions: move the atoms, inside the network, after each layer.
        smooth_cutoff: multiply what atoms send by the cutoff function.
        numbers: atomic numbers of the molecule that ``bonds`` belong to, in order.
        bonds: pairs of atoms, counted from 0; types all pairs by the number of bonds between them. The
            network then serves this molecule, or several of it, alone. None: edges have no type.
        vector_input: have the weights that vectors among the extra input features need.

    Raises:
        ConfigError: a size or the cutoff is not positive, only one of ``numbers`` and ``bonds``, or bonds
            that do not fit.
    """

    name: ClassVar[str] = "egnn"
    has_vectors: ClassVar[bool] = True

    def __init__(
        self,
        hidden: int = 128,
        layers: int = 7,
        cutoff: float = 5.0,
        max_z: int = 100,
        attention: bool = True,
        update_positions: bool = False,
        smooth_cutoff: bool = True,
        numbers: Sequence[int] | None = None,
        bonds: Sequence[Sequence[int]] | None = None,
        vector_input: bool = False,
    ) -> None:
        check_positive("egnn", hidden=hidden, layers=layers, cutoff=cutoff, max_z=max_z)
        if (numbers is None) != (bonds is None):
            raise ConfigError("egnn: give both numbers (of one molecule) and bonds (its pairs), or neither")
        config = {
            "hidden": hidden,
            "layers": layers,
            "cutoff": cutoff,
            "max_z": max_z,
            "attention": attention,
            "update_positions": update_positions,
            "smooth_cutoff": smooth_cutoff,
            "numbers": None if numbers is None else [int(z) for z in numbers],
            "bonds": None if bonds is None else [[int(i) for i in bond] for bond in bonds],
            "vector_input": False,
        }
        super().__init__(cutoff, hidden, max_z, config)
        self.smooth = smooth_cutoff
        self.topology = None if numbers is None or bonds is None else Topology(numbers, bonds)
        self.embedding = nn.Embedding(max_z, hidden)
        classes = 0 if self.topology is None else HOP_CLASSES
        self.layers = nn.ModuleList(
            EquivariantLayer(hidden, classes, attention, update_positions) for _ in range(layers)
        )
        self.displacement = nn.Parameter(torch.ones(hidden)) if update_positions else None
        self.vec_input: nn.Linear | None = None
        if vector_input:
            self.accept_vectors()

    def accept_vectors(self) -> None:
        """See :class:`~ffpretrain.backbones.base.Backbone`: what mixes vectors of the input."""
        if not self.vector_input:
            f = self.n_features
            self.vec_input = nn.Linear(f, 3 * f, bias=False).to(self.embedding.weight)
            self.vector_input = self.config["vector_input"] = True

    def forward(self, graph: Graph, initial: Features | None = None) -> Features:
        """See :class:`~ffpretrain.backbones.base.Backbone`.

        Raises:
            UnsupportedInputError: bonds were given and the structure is not of their molecule.
        """
        if self.topology is not None:
            self.topology.check(graph)
        return super().forward(graph, initial)

    def encode(self, z: Tensor, pairs: Pairs, initial: Features | None = None) -> Features:
        """See :class:`~ffpretrain.backbones.base.Backbone`."""
        x, given = self.with_initial(self.embedding(z), initial)
        weight, classes = self._weight(pairs), None
        if self.topology is not None:
            classes = self.topology.classes(z, pairs)
            weight = weight + self.topology.nan_unless_fit(z).to(weight)
        vec, inner, moved = x.new_zeros(len(x), 3, self.n_features), None, None
        if given is not None and self.vec_input is not None:
            of_center, of_neighbor, vec = self.vec_input(given).split(self.n_features, dim=-1)
            both = pairs.center(of_center) + pairs.neighbor(of_neighbor)
            inner = (both * pairs.vector.unsqueeze(-1)).sum(-2)
        for layer in self.layers:
            vector = pairs.vector
            if moved is not None:
                vector = vector + pairs.neighbor(moved) - pairs.center(moved)
            x, along, step = layer(x, pairs, vector, weight, classes, inner)
            vec, inner = vec + along, None
            if step is not None:
                moved = step if moved is None else moved + step
        if moved is not None:
            vec = vec + moved.unsqueeze(-1) * self.displacement
        return Features(x, vec)

    def _weight(self, pairs: Pairs) -> Tensor:
        """Return the factor of what each pair sends ``[P]``."""
        if self.smooth:
            weight = cosine_cutoff(pairs.distance, self.cutoff)
        else:
            # a list may keep pairs beyond the cutoff, and so does the dense layout
            weight = (pairs.distance < self.cutoff).to(pairs.distance)
        return weight if pairs.other is None else weight * pairs.other


class EquivariantLayer(nn.Module):
    """One layer: message, step and update.

    ``edge_in`` is the published first matrix of ``phi_e``, columns ``[h_i | h_j | d^2 | class]``. It acts on
    atoms before they are spread to pairs.

    Args:
        hidden: features F.
        classes: number of edge classes; 0 for none.
        attention: as :class:`EGNN`.
        update_positions: likewise.
    """

    def __init__(self, hidden: int, classes: int, attention: bool, update_positions: bool) -> None:
        super().__init__()
        self.columns = [hidden, hidden, 1, classes]
        self.edge_in = nn.Linear(sum(self.columns), hidden)
        self.edge_out = nn.Linear(hidden, hidden)
        self.attention = nn.Linear(hidden, 1) if attention else None
        self.node_in = nn.Linear(2 * hidden, hidden)
        self.node_out = nn.Linear(hidden, hidden)
        self.vec_out = nn.Linear(hidden, hidden, bias=False)
        self.step: nn.Sequential | None = None
        if update_positions:
            last = nn.Linear(hidden, 1, bias=False)
            # small steps at first, as in the authors' code: they feed back on every later distance
            nn.init.xavier_uniform_(last.weight, gain=1e-3)
            self.step = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), last)

    def forward(
        self,
        x: Tensor,
        pairs: Pairs,
        vector: Tensor,
        weight: Tensor,
        classes: Tensor | None,
        inner: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return updated ``x [N, F]``, what vectors gain ``[N, 3, F]``, and the step ``[N, 3]``, if any.

        Args:
            x: scalar features ``[N, F]``.
            pairs: neighbours.
            vector: from centre to neighbour as they stand now, Å ``[P, 3]``.
            weight: factor of what each pair sends ``[P]``.
            classes: of the pairs, int64 ``[P]``, or None.
            inner: added inside ``phi_e`` ``[P, F]``, or None.
        """
        message = self.message(x, pairs, vector, classes, inner)
        sent = message * weight.unsqueeze(-1)
        # vectors by the square of the factor, see the module
        arm = vector * weight.square().unsqueeze(-1)
        along = self.vec_out(pairs.sum(message.unsqueeze(-2) * arm.unsqueeze(-1)))
        step = None
        if self.step is not None:
            # phi_x has a bias within, so the factor comes after it
            step = -pairs.sum(self.step(message) * arm)
        update = self.node_in(torch.cat([x, pairs.sum(sent)], dim=-1))
        return x + self.node_out(functional.silu(update)), along, step

    def message(
        self, x: Tensor, pairs: Pairs, vector: Tensor, classes: Tensor | None, inner: Tensor | None
    ) -> Tensor:
        """Return ``m_ij``, attention included, ``[P, F]``; arguments as :meth:`forward`."""
        center, neighbor, square, typed = self.edge_in.weight.split(self.columns, dim=1)
        mixed = pairs.center(functional.linear(x, center, self.edge_in.bias))
        mixed = mixed + pairs.neighbor(functional.linear(x, neighbor))
        mixed = mixed + vector.square().sum(-1, keepdim=True) * square.T
        if classes is not None:
            mixed = mixed + functional.embedding(classes, typed.T)
        if inner is not None:
            mixed = mixed + inner
        message = functional.silu(self.edge_out(functional.silu(mixed)))
        return message if self.attention is None else message * torch.sigmoid(self.attention(message))
