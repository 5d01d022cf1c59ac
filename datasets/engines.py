"""Engines that label geometries: ASE calculators by name, and what their energies mean."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ffpretrain.errors import ConfigError, MissingDependencyError, nearest

if TYPE_CHECKING:
    from ase.calculators.calculator import BaseCalculator


@dataclass(frozen=True)
class Engine:
    """A calculator and what a dataset must say of its labels.

    Attributes:
        name: what the user asked for, such as ``gfn2``.
        calculator: the ASE calculator, in eV and Å.
        level_of_theory: such as ``GFN2-xTB``.
        energy_zero: what an energy of 0 eV means.
        options: what the calculator was made with, beyond its own defaults; JSON-able.
        package: the distribution that computes, with its version, such as ``tblite 0.8.0``.
    """

    name: str
    calculator: BaseCalculator
    level_of_theory: str
    energy_zero: str
    options: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""


# accuracy 0.01 makes forces the derivative of the energies to 1e-6 eV/Å (the default 1.0: 2e-4) for a quarter
# more time; without the cache no label depends on the geometry computed before it, so a run can be resumed
_TBLITE = {"accuracy": 0.01, "cache_api": False, "verbosity": 0}


def open_engine(name: str, *, charge: int = 0, spin: int = 1, **options: Any) -> Engine:
    """Return an engine by name.

    Args:
        name: ``gfn2`` or ``gfn1`` (GFN2-xTB, GFN1-xTB by tblite), ``emt``, ``lj``, ``mmff`` (MMFF94 by
            RDKit), any other name that ASE knows (``orca``, ``psi4``, …), or ``module:Class`` of an ASE
            calculator.
        charge: total charge in e.
        spin: multiplicity 2S + 1.
        **options: handed to the calculator.

    Raises:
        ConfigError: the name or an option is unknown, or the engine cannot be told a charge or spin.
        MissingDependencyError: the engine's package is not installed or cannot be loaded.
    """
    built_in = _ENGINES.get(name.lower())
    if built_in is not None:
        return built_in(charge, spin, options)
    if (charge, spin) != (0, 1):
        raise ConfigError(
            f"engine {name!r}: how to tell it charge {charge} and spin {spin} is not known here; use 'gfn2', "
            "or hand label_dataset an Engine whose calculator knows them"
        )
    kind = _calculator_class(name)
    calculator = _make(name, kind, options)
    return Engine(
        name=name,
        calculator=calculator,
        level_of_theory=_describe(name, options),
        energy_zero=f"as {kind.__module__}.{kind.__name__} reports it",
        options=dict(options),
        package=_version_of(kind.__module__),
    )


def built_in_engines() -> list[str]:
    """Return the names of the engines that need nothing but the name."""
    return sorted(_ENGINES)


def create_engine(name: str, **options: Any) -> BaseCalculator:
    """Return the ASE calculator of :func:`open_engine`; same arguments and errors."""
    return open_engine(name, **options).calculator


@contextmanager
def one_thread() -> Iterator[None]:
    """Let engines built on GNU OpenMP use one thread of the calling thread's team, unless the user said more.

    For a molecule a second thread gains nothing, and on a busy machine the threads' waiting for one another
    costs a factor of ten. ``OMP_NUM_THREADS`` in the environment is obeyed.
    """
    try:
        openmp = None if "OMP_NUM_THREADS" in os.environ else ctypes.CDLL("libgomp.so.1")
    except OSError:  # another platform or OpenMP runtime: leave it as it is
        openmp = None
    if openmp is None:
        yield
        return
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(before)


def _gfn(method: str) -> Callable[[int, int, Mapping[str, Any]], Engine]:
    def build(charge: int, spin: int, options: Mapping[str, Any]) -> Engine:
        try:
            from tblite.ase import TBLite
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f'{method} needs tblite, which is not installed: pip install "ffpretrain[label]"'
            ) from error
        except ImportError as error:
            raise MissingDependencyError(
                f"{method} needs tblite, which is there but cannot be loaded ({error}); install that library "
                "(libgomp.so.1 is in the system package libgomp1)"
            ) from error
        _refuse_unknown(method, options, TBLite)
        chosen = {**_TBLITE, "charge": charge, "multiplicity": spin, **options}
        return Engine(
            name={"GFN2-xTB": "gfn2", "GFN1-xTB": "gfn1"}[method],
            calculator=_make(method, TBLite, {"method": method, **chosen}),
            level_of_theory=_describe(method, options),
            energy_zero=f"{method} total energy (not relative to free atoms)",
            options=chosen,
            package=_version_of("tblite"),
        )

    return build


def _emt(charge: int, spin: int, options: Mapping[str, Any]) -> Engine:
    from ase.calculators.emt import EMT

    _refuse_charge("emt", charge, spin)
    _refuse_unknown("emt", options, EMT)
    calculator = _make("emt", EMT, options)
    zero = "bulk fcc metal at its equilibrium"
    return Engine("emt", calculator, _describe("EMT", options), zero, dict(options), _version_of("ase"))


def _lennard_jones(charge: int, spin: int, options: Mapping[str, Any]) -> Engine:
    from ase.calculators.lj import LennardJones

    _refuse_charge("lj", charge, spin)
    _refuse_unknown("lj", options, LennardJones)
    calculator = _make("lj", LennardJones, options)
    level = _describe("Lennard-Jones", options)
    return Engine("lj", calculator, level, "separated atoms", dict(options), _version_of("ase"))


def _mmff(charge: int, spin: int, options: Mapping[str, Any]) -> Engine:
    from ffpretrain.datasets.mmff import MMFF

    if spin != 1:
        raise ConfigError(f"engine 'mmff' knows closed shells only, not spin {spin}")
    _refuse_unknown("mmff", options, MMFF)
    calculator = _make("mmff", MMFF, {"charge": charge, **options})
    zero = "MMFF94: strain and charges, not energies of atoms"
    return Engine("mmff", calculator, _describe("MMFF94", options), zero, dict(options), _version_of("rdkit"))


_ENGINES: dict[str, Callable[[int, int, Mapping[str, Any]], Engine]] = {
    "gfn2": _gfn("GFN2-xTB"),
    "gfn1": _gfn("GFN1-xTB"),
    "emt": _emt,
    "lj": _lennard_jones,
    "mmff": _mmff,
}


def _refuse_charge(name: str, charge: int, spin: int) -> None:
    if (charge, spin) != (0, 1):
        raise ConfigError(f"engine {name!r} knows no charge or spin; leave them at 0 and 1 or use 'gfn2'")


def _refuse_unknown(name: str, options: Mapping[str, Any], kind: Any) -> None:
    for option in options:
        if option not in kind.default_parameters:
            hint = nearest(option, kind.default_parameters)
            raise ConfigError(f"engine {name!r}: unknown option {option!r}{hint}")


def _calculator_class(name: str) -> Any:
    module_name, colon, class_name = name.partition(":")
    try:
        if colon:
            return getattr(importlib.import_module(module_name), class_name)
        from ase.calculators.calculator import get_calculator_class

        return get_calculator_class(name)
    except (ImportError, AttributeError) as error:
        wanted = getattr(error, "name", None)
        if colon and isinstance(error, ImportError) and wanted and not module_name.startswith(wanted):
            raise MissingDependencyError(f"engine {name!r} needs {wanted}: pip install {wanted}") from error
        if _known_to_ase(name):
            raise MissingDependencyError(
                f"engine {name!r} cannot be imported ({error}): pip install the package that brings it"
            ) from error
        from ase.calculators.names import names

        hint = nearest(name, [*_ENGINES, *names])
        raise ConfigError(f"unknown engine {name!r}{hint} or give module:Class of a calculator") from error


def _known_to_ase(name: str) -> bool:
    from ase.calculators.names import names

    return name in names


def _make(name: str, kind: Any, options: Mapping[str, Any]) -> BaseCalculator:
    from ase.calculators.calculator import CalculatorError

    try:
        calculator: BaseCalculator = kind(**options)
    except MissingDependencyError:  # a ValueError, too, and no fault of the options
        raise
    except (TypeError, ValueError, KeyError, CalculatorError) as error:
        raise ConfigError(f"engine {name!r} refuses its options {dict(options)}: {error}") from error
    return calculator


def _describe(method: str, options: Mapping[str, Any]) -> str:
    """Name a level of theory; options can change it, so they belong to its name."""
    if not options:
        return method
    return f"{method} ({', '.join(f'{key}={options[key]}' for key in sorted(options))})"


def _version_of(module: str) -> str:
    """Return ``package version`` of the distribution behind a module, or the module alone if it has none."""
    root = module.partition(".")[0]
    try:
        return f"{root} {importlib.metadata.version(root)}"
    except importlib.metadata.PackageNotFoundError:
        return root
