"""openmm-ml: ``MLPotential("ffpretrain", model=...)`` and ``MLPotential("ffpretrain-NAME")``.

openmm-ml imports this module whenever it is imported itself, whichever potential is then used, so nothing
here may fail or take time: neither torch nor OpenMM nor openmm-ml is imported before a potential is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ffpretrain.errors import ConfigError, UnsupportedInputError, nearest

if TYPE_CHECKING:
    import openmm
    from openmm.app import Topology

    from ffpretrain.md.calculator import Model
    from ffpretrain.md.openmm_function import Options
    from ffpretrain.md.runtime import CompileOption
    from ffpretrain.md.unfamiliar import Policy

#: name of the entry point that takes any model, and the beginning of those of the named models
GENERAL = "ffpretrain"
_OPTIONS = ("device", "dtype", "compile", "on_unfamiliar")
#: what openmm-ml's mechanical embedding reads and passes on, and what createMixedSystem keeps to itself
_EMBEDDING_OPTIONS = ("mlLongRange", "linkAtomDistances")
_MIXED_OPTIONS = ("removeConstraints", "forceGroup", "interpolate", "embedding", "returnInfo")


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
        compile: CompileOption = "auto",
        on_unfamiliar: Policy = "warn",
        **unknown: Any,
    ) -> Any:
        """Return the potential of ``MLPotential(name, model=..., device=..., ...)``.

        Args:
            name: ``ffpretrain``, or ``ffpretrain-`` and the name of a model.
            model: a name of :func:`ffpretrain.list_models`, a model file or a
                :class:`~ffpretrain.potential.Potential`; only with the former.
            device: ``auto`` (a CUDA device where there is one, else the CPU) or a name torch knows.
            dtype: ``float32`` or ``float64``, of the network.
            compile: False evaluates with torch alone; else natively where the machine and the model allow it.
            on_unfamiliar: for atoms closer than any in training: ``warn`` once, ``raise`` or ``ignore``.
            **unknown: refused.

        Raises:
            ConfigError: an unknown option, no model, or two.
        """
        if unknown:
            key = next(iter(unknown))
            known = ("model", *_OPTIONS)
            raise ConfigError(f"unknown option {key!r} of MLPotential({name!r}){nearest(key, known)}")
        if name == GENERAL and model is None:
            from ffpretrain.zoo import list_models

            raise ConfigError(f"give MLPotential({name!r}, model=...) a file or one of {list_models()}")
        if name != GENERAL and model is not None:
            raise ConfigError(f"{name!r} names its model; another is MLPotential({GENERAL!r}, model=...)")
        from openmmml.mlpotential import MLPotentialImpl

        from ffpretrain.md.openmm_function import Options

        # the methods above openmm-ml's own, which it may add to
        implementation = type("FFPretrainPotential", (_Implementation, MLPotentialImpl), {})
        options = Options(device, dtype, compile, on_unfamiliar)
        return implementation(name.removeprefix(f"{GENERAL}-") if model is None else model, options)


class _Implementation:
    """The methods of ``MLPotentialImpl`` that openmm-ml calls."""

    def __init__(self, model: str | os.PathLike[str] | Model, options: Options) -> None:
        self.model, self.options = model, options

    def addForces(
        self,
        topology: Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        **options: Any,
    ) -> None:
        """Add the potential to a system; periodic where the topology has box vectors.

        Args:
            topology: of the system.
            system: changed in place; for interpolation openmm-ml gives one without particles or forces.
            atoms: indices of the atoms it is for; None for all.
            forceGroup: 0 to 31.
            **options: ``device``, ``dtype``, ``compile`` and ``on_unfamiliar``, instead of those of the
                potential; openmm-ml adds those of its embeddings.

        Raises:
            ConfigError: an unknown option, a device that is absent, or a model without an energy.
            UnsupportedInputError: elements or a composition the model was not trained on, an atom without
                element, a box without volume or too small for the atoms, or none beside forces that are
                periodic.
        """
        from ffpretrain.md.openmm import check_box, make_force, topology_numbers

        _refuse_unknown(options, mixed=atoms is not None)
        chosen = None if atoms is None else [int(index) for index in atoms]
        box = topology.getPeriodicBoxVectors()
        numbers = topology_numbers(topology, chosen)
        if box is not None:
            check_box(box, len(numbers))
        elif system.usesPeriodicBoundaryConditions():
            raise UnsupportedInputError(
                "the force field is periodic and the topology has no box; give the topology box vectors "
                "(setPeriodicBoxVectors), or make the force field's System without periodicity"
            )
        given = {key: value for key, value in options.items() if key in _OPTIONS and value is not None}
        force = make_force(
            self.model, numbers, chosen, box is not None, forceGroup, self.options._replace(**given)
        )
        system.addForce(force)

    def getMLLongRange(self) -> bool:
        """Return that interactions end at the cutoff."""
        return False


def _refuse_unknown(options: Iterable[str], mixed: bool) -> None:
    """Refuse options of ``createSystem`` or, if ``mixed``, ``createMixedSystem`` that nobody reads."""
    from openmmml import MLPotential

    known = (*_OPTIONS, *(_EMBEDDING_OPTIONS if mixed else ()))
    unknown = [key for key in options if key not in known]
    # another package's embedding passes on its own options, which nobody here can tell from a slip
    others = set(getattr(MLPotential, "_embeddingFactories", ())) - {"mechanical"}
    if unknown and not (mixed and others):
        method = "createMixedSystem" if mixed else "createSystem"
        readable = (*known, *(_MIXED_OPTIONS if mixed else ("removeCMMotion",)))
        raise ConfigError(f"unknown option {unknown[0]!r} of {method}{nearest(unknown[0], readable)}")
