"""What a denoiser learned, read as a force field.

Noise of standard deviation sigma turns a distribution ``p`` into ``p_sigma``, and the best prediction of the
displacement is ``-sigma^2 grad log p_sigma`` (Tweedie; Vincent 2011). With ``p ~ exp(-E / kT)`` that is
``-(sigma^2 / kT) F_sigma``: the predicted displacement points against the force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ffpretrain import units
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph
from ffpretrain.heads import VectorHead
from ffpretrain.potential import Model

if TYPE_CHECKING:
    from ffpretrain.artifacts import ModelCard

#: temperature in K that sets the energy scale of a denoiser where none is given
DEFAULT_TEMPERATURE = 300.0


def force_scale(kT: float | None, sigma: float) -> float:
    """Return ``kT / sigma^2`` in eV/Å²: force per predicted displacement, up to the sign.

    Args:
        kT: eV; None takes :data:`DEFAULT_TEMPERATURE`.
        sigma: Å.

    Raises:
        ConfigError: one of them is not above zero.
    """
    energy = units.KB * DEFAULT_TEMPERATURE if kT is None else kT
    if not energy > 0:
        raise ConfigError(f"kT={kT} must be above zero; give it in eV (300 K is {units.KB * 300:.4f})")
    if not sigma > 0:
        raise ConfigError(f"sigma={sigma} must be above zero; give it in Å")
    return energy / sigma**2


class Learned(Model):
    """What the models of label-free objectives share: forces of a backbone and a head, times one number.

    Args:
        network: its backbone and its elements are used, its head is not.
        head: as :attr:`head_class`.
        factor: eV/Å per unit of the head's output, or eV where the head gives an energy.
        card: what is known of a trained model.
    """

    #: name of the head in a model file, and its class: called with F of the backbone, makes a fresh one
    head_name: ClassVar[str]
    head_class: ClassVar[type[nn.Module]]
    exact: ClassVar[tuple[str, ...]] = ("factor",)
    factor: Tensor

    def __init__(self, network: Model, head: nn.Module, factor: float, card: ModelCard | None = None) -> None:
        super().__init__(network.backbone, head, network.known.clone(), card)
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float64, device=self.known.device))

    def head_options(self) -> dict[str, Any]:
        """Return what, beside the number of features, builds the head again."""
        return {}


class DenoisingField(Learned):
    """A predicted displacement as a force field without an energy; called as a potential is.

    The field of a direct head is no gradient, so it has no energy and does not conserve one: use it to relax
    or to look at, not for dynamics.

    Args:
        network: its backbone and its elements are used, its energy head is not.
        head: from the backbone's :class:`~ffpretrain.backbones.base.Features` to displacements ``[N, 3]``.
        factor: eV/Å per unit of the head's output: its size in Å times :func:`force_scale`.
        card: what is known of a trained model.
    """

    conservative: ClassVar[bool] = False
    has_energy: ClassVar[bool] = False
    head_name: ClassVar[str] = "vector"
    head_class: ClassVar[type[nn.Module]] = VectorHead

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool | None = None) -> dict[str, Tensor]:
        """Evaluate a graph.

        Args:
            graph: as for a potential.
            forces: False leaves them out, which leaves nothing.
            stress: must not be asked for.

        Returns:
            ``forces [N, 3]`` eV/Å in the precision of ``graph.pos``; differentiable in training mode.

        Raises:
            UnsupportedInputError: an element the model never saw.
            ConfigError: a stress is asked for, which only a gradient has.
        """
        if stress:
            raise ConfigError("a denoising field has no stress; train with head='energy-gradient' for one")
        if not forces:
            return {}
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            displacement = self.head(self.features(graph)).to(graph.pos.dtype)
            return {"forces": -self.factor.to(graph.pos) * displacement}
