"""Energies and forces of equal molecules as one compiled function, for training and for dynamics.

Forces are a derivative, and training differentiates them again, which ``torch.compile`` cannot do by itself:
it refuses double backward. So the energy and its derivative are first traced into one graph of plain
operations (``make_fx``); what is left for the compiler is an ordinary function, differentiated once.
Molecules of equal size use the dense layout of :mod:`ffpretrain.pairs`: fixed shapes, no gather, no scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ffpretrain.backbones.base import Backbone
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.pairs import DensePairs, PairRows
from ffpretrain.potential import Potential

#: largest force error of a compiled function against the eager one, relative to the largest force
FORCE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
#: the same for the gradient of the summed squares of the forces with respect to the weights
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
_NOT_SMOOTH = (
    "compile needs a backbone that is smooth at the cutoff; set vector_cutoff=true (torchmd-et) or "
    "smooth_cutoff=true (egnn)"
)


class AtomicEnergies(nn.Module):
    """Backbone and head as a function of elements and positions of equal molecules."""

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.backbone, self.head = potential.backbone, potential.head

    def forward(self, z: Tensor, pos: Tensor, n_molecules: int, rows: PairRows) -> Tensor:
        """Return atomic energies ``[M * n]`` in the network's unit."""
        pairs = DensePairs(pos, n_molecules, self.backbone.dtype, rows)
        return self.head(self.backbone.encode(z, pairs))


class CompiledForces:
    """Drop-in for ``potential(graph)`` while training on batches of equal molecules.

    One function is built for each (number of molecules, number of atoms) met, the first time it is met: one
    to three minutes on a CPU, once per machine and size thanks to the compiler's own cache. The first result
    of each is compared with the eager one, forces and the gradients that training takes of them.

    Args:
        potential: its weights are read at every call, so it may be trained.

    Raises:
        ConfigError: the backbone's messages do not vanish at the cutoff, so pairs beyond it cannot be kept.
    """

    def __init__(self, potential: Potential) -> None:
        if not potential.backbone.smooth:
            raise ConfigError(_NOT_SMOOTH)
        self._potential = potential
        self._network = AtomicEnergies(potential)
        self._functions: dict[tuple[int, int], Callable[..., Any]] = {}
        #: largest relative force difference from the eager path, by (molecules, atoms)
        self.agreement: dict[tuple[int, int], float] = {}
        #: the same of the weights' gradients
        self.gradient_agreement: dict[tuple[int, int], float] = {}

    def __call__(self, graph: Graph) -> dict[str, Tensor]:
        """Evaluate a batch of equal, non-periodic molecules; as :meth:`Potential.forward` in training mode.

        Raises:
            ConfigError: molecules of different sizes, or a compiled result that differs from the eager one.
        """
        n_molecules, n_atoms = graph.n_graphs, len(graph.z) // graph.n_graphs
        key = (n_molecules, n_atoms)
        names, params = zip(*self._network.named_parameters(), strict=True)
        if key not in self._functions:
            require_equal_molecules(graph)
            self._functions[key] = self._build(graph, names, params)
            self._compare(key, graph, params)
        return self._evaluate(key, graph, params)

    def _evaluate(self, key: tuple[int, int], graph: Graph, params: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # molecules are centred so that float32 positions lose nothing
        pos = _centered(graph).to(self._potential.dtype)
        atomic, gradient = self._functions[key](list(params), graph.z, pos)
        scale = self._potential.scale
        energies = atomic.to(scale.dtype) * scale + self._potential.reference[graph.z]
        energy = energies.view(key).sum(1) + self._potential.shift
        return {"energy": energy, "energies": energies, "forces": -gradient.to(scale.dtype) * scale}

    def _build(self, graph: Graph, names: tuple[str, ...], params: tuple[Tensor, ...]) -> Callable[..., Any]:
        from torch.fx.experimental.proxy_tensor import make_fx

        network, n_molecules = self._network, graph.n_graphs
        rows = PairRows.of(len(graph.z) // n_molecules, graph.z.device)

        def energy_and_gradient(weights: list[Tensor], z: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            pos = pos.requires_grad_(True)
            state = dict(zip(names, weights, strict=True))
            atomic = torch.func.functional_call(network, state, (z, pos, n_molecules, rows))
            return atomic, torch.autograd.grad(atomic.sum(), pos, create_graph=True)[0]

        examples = [p.detach().clone().requires_grad_(p.requires_grad) for p in params]
        pos = _centered(graph).to(self._potential.dtype).clone()
        traced = make_fx(energy_and_gradient)(examples, graph.z, pos)
        _reattach(traced)
        return torch.compile(traced, fullgraph=True)

    def _compare(self, key: tuple[int, int], graph: Graph, params: tuple[Tensor, ...]) -> None:
        """Compare forces and the gradients of their square with the eager ones.

        Raises:
            ConfigError: they differ.
        """
        forces, gradients = [], []
        for out in (self._evaluate(key, graph, params), self._potential(graph)):
            forces.append(out["forces"].detach())
            wanted = [p for p in params if p.requires_grad]
            square = 0.5 * (out["forces"] / self._potential.scale).square().sum()
            found = torch.autograd.grad(square, wanted, allow_unused=True, materialize_grads=True)
            gradients.append(torch.cat([g.flatten() for g in found]))
        dtype = self._potential.dtype
        for what, pair, table, tolerance in (
            ("forces", forces, self.agreement, FORCE_TOLERANCE[dtype]),
            ("gradients", gradients, self.gradient_agreement, GRADIENT_TOLERANCE[dtype]),
        ):
            scale = pair[1].abs().max().clamp_min(1e-3)
            table[key] = float((pair[0] - pair[1]).abs().max() / scale)
            if not table[key] <= tolerance:
                raise ConfigError(
                    f"compiled {what} differ from the eager ones by {table[key]:.2e} of the largest "
                    f"(tolerance {tolerance:.0e}); run with compile=false and report this"
                )


def _reattach(traced: torch.fx.GraphModule) -> None:
    """Take the detachments out of a traced derivative.

    Backward formulas that use an output of the forward pass (of exp, sqrt, sigmoid) get it detached; autograd
    knows all the same how to differentiate once more. Traced into plain operations the detachment would cut
    the gradient with respect to the weights, silently. No network of this package detaches anything itself.
    """
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()


class CompiledVectors:
    """Drop-in for ``head(backbone(graph))`` on batches of equal molecules, first derivatives only.

    Args:
        backbone: must be smooth at the cutoff.
        head: a vector head.

    Raises:
        ConfigError: as :class:`CompiledForces`.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        if not backbone.smooth:
            raise ConfigError(_NOT_SMOOTH)

        def vectors(z: Tensor, pos: Tensor, n_molecules: int) -> Tensor:
            return head(backbone.encode(z, DensePairs(pos, n_molecules, backbone.dtype)))

        self._dtype = backbone.dtype
        self._function = torch.compile(vectors, fullgraph=True, dynamic=False)

    def __call__(self, graph: Graph) -> Tensor:
        """Return vectors ``[N, 3]`` of a batch of equal molecules."""
        return self._function(graph.z, _centered(graph).to(self._dtype), graph.n_graphs)


def require_equal_molecules(graph: Graph) -> None:
    """Refuse a batch that the dense layout cannot hold.

    Raises:
        ConfigError: structures of different sizes, or a periodic one.
    """
    n_atoms = len(graph.z) // graph.n_graphs
    expected = torch.arange(len(graph.z), device=graph.batch.device) // max(n_atoms, 1)
    if n_atoms * graph.n_graphs != len(graph.z) or not torch.equal(graph.batch, expected):
        raise ConfigError("compile needs molecules of one size in every batch; set compile=false")
    if bool((graph.cell != 0).any()):
        raise ConfigError("compile needs molecules in vacuum; set compile=false for periodic structures")


def _centered(graph: Graph) -> Tensor:
    xyz = graph.pos.view(graph.n_graphs, -1, 3)
    return (xyz - xyz.mean(1, keepdim=True)).reshape(-1, 3)
