"""openmm-ml: ``MLPotential("ffpretrain", model=...)`` and ``MLPotential("ffpretrain-NAME")``.

openmm-ml imports this module whenever it is imported itself, whichever potential is then used, so nothing
here may fail or take time: neither torch nor OpenMM nor openmm-ml is imported before a potential is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ffpretrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    import openmm
    from openmm.app import Topology

    from ffpretrain.md.calculator import Model

#: name of the entry point that takes any model, and the beginning of those of the named models
GENERAL = "ffpretrain"
_OPTIONS = ("model", "device", "dtype")


class PotentialFactory:
    """What the entry points of the group ``openmmml.potentials`` name; openmm-ml makes one of each.

    It is no subclass of ``MLPotentialImplFactory``: to have that, the module would import openmm-ml, which
    imports this module, and whoever imported this one first would get neither.
    """

    def createImpl(
        self,
        name: str,
        model: Model | None = None,
        device: str = "auto",
        dtype: str = "float32",
        **unknown: Any,
    ) -> Any:
        """Return the potential of ``MLPotential(name, model=..., device=..., dtype=...)``.

        Args:
            name: ``ffpretrain``, or ``ffpretrain-`` and the name of a model.
            model: a name of :func:`ffpretrain.list_models`, a model file or a
                :class:`~ffpretrain.potential.Potential`; only with the former.
            device: ``auto`` (a CUDA device where there is one, else the CPU) or a name torch knows.
            dtype: ``float32`` or ``float64``, of the network.
            **unknown: refused.

        Raises:
            ConfigError: an unknown option, no model, or two.
        """
        if unknown:
            key = next(iter(unknown))
            raise ConfigError(f"unknown option {key!r} of MLPotential({name!r}){nearest(key, _OPTIONS)}")
        if name == GENERAL and model is None:
            from ffpretrain.zoo import list_models

            raise ConfigError(f"give MLPotential({name!r}, model=...) a file or one of {list_models()}")
        if name != GENERAL and model is not None:
            raise ConfigError(f"{name!r} names its model; another is MLPotential({GENERAL!r}, model=...)")
        from openmmml.mlpotential import MLPotentialImpl

        # the methods above openmm-ml's own, which it may add to
        implementation = type("FFPretrainPotential", (_Implementation, MLPotentialImpl), {})
        return implementation(name.removeprefix(f"{GENERAL}-") if model is None else model, device, dtype)


class _Implementation:
    """The methods of ``MLPotentialImpl`` that openmm-ml calls."""

    def __init__(self, model: str | os.PathLike[str] | Model, device: str, dtype: str) -> None:
        self.model, self.device, self.dtype = model, device, dtype

    def addForces(
        self,
        topology: Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        device: str | None = None,
        dtype: str | None = None,
        **others: Any,
    ) -> None:
        """Add the potential to a system; periodic where the topology has box vectors.

        Args:
            topology: of the system.
            system: changed in place; for interpolation openmm-ml gives one without particles.
            atoms: indices of the atoms it is for; None for all.
            forceGroup: 0 to 31.
            device: instead of that of the potential.
            dtype: instead of that of the potential.
            **others: options of openmm-ml's embeddings; refused where there is none.

        Raises:
            ConfigError: an unknown option, a device that is absent, or a model without an energy.
            UnsupportedInputError: elements or a composition the model was not trained on, an atom without
                element, or a box without volume.
        """
        from ffpretrain.md.openmm import check_box, make_force, topology_numbers

        if atoms is None and others:
            key = next(iter(others))
            raise ConfigError(f"unknown option {key!r} of createSystem{nearest(key, _OPTIONS[1:])}")
        chosen = None if atoms is None else [int(index) for index in atoms]
        box = topology.getPeriodicBoxVectors()
        numbers = topology_numbers(topology, chosen)
        if box is not None:
            check_box(box, len(numbers))
        force = make_force(
            self.model,
            numbers,
            chosen,
            box is not None,
            forceGroup,
            device or self.device,
            dtype or self.dtype,
        )
        system.addForce(force)

    def getMLLongRange(self) -> bool:
        """Return that interactions end at the cutoff."""
        return False
