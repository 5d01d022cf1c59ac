"""How far bonds, angles and torsions swing: a table of standard deviations, the stiffness of a force field.

A term of a classical force field, ``k (q - q0)^2 / 2``, swings at a temperature with a standard deviation of
``sqrt(kT / k)``; a torsion ``k (1 - cos(n (phi - phi0)))`` near its minimum with ``sqrt(kT / k) / n``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ffpretrain.errors import ConfigError, nearest
from ffpretrain.internal_coordinates import Terms
from ffpretrain.molecules import Integers, Molecule

#: SliDe's generic values, Å and radians: force constants of 300 kcal/mol/Å², 60, 1 and 30 kcal/mol at a kT
#: of 1 kcal/mol
GENERIC = {"bond": 0.058, "angle": 0.129, "rotatable_torsion": 1.0, "torsion": 0.18}
_ATOMS = {"bond": 2, "angle": 3, "rotatable_torsion": 4, "torsion": 4}
_DEFAULT = "default"


class Widths:
    """Standard deviation of each internal coordinate.

    Args:
        source: what differs from :data:`GENERIC`, or a YAML or JSON file with it. A value is a number for all
            terms of a kind, or a table of numbers by elements, such as ``C-H`` or ``H-C-C-O`` in either
            direction, with ``default`` for the others. Bonds in Å, the rest in radians.

    Raises:
        ConfigError: a file that cannot be read, an unknown kind, a wrong element pattern, or a width that is
            not above zero.
    """

    def __init__(self, source: Mapping[str, Any] | str | Path | None = None) -> None:
        table, where = (source or {}, "bat widths") if not isinstance(source, str | Path) else _read(source)
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: holds no table of widths; write lines such as 'bond: 0.05'")
        self.generic = dict(GENERIC)
        self._special: dict[str, dict[tuple[int, ...], float]] = {kind: {} for kind in GENERIC}
        for kind, value in table.items():
            if kind not in GENERIC:
                raise ConfigError(f"{where}: unknown kind {kind!r}{nearest(str(kind), GENERIC)}")
            entries = value if isinstance(value, Mapping) else {_DEFAULT: value}
            for pattern, number in entries.items():
                width = _width(number, f"{where}: {kind} {pattern}")
                if pattern == _DEFAULT:
                    self.generic[kind] = width
                else:
                    numbers = _elements(str(pattern), _ATOMS[kind], f"{where}: {kind}")
                    self._special[kind][numbers] = self._special[kind][numbers[::-1]] = width

    def of(self, molecule: Molecule, terms: Terms) -> NDArray[np.float64]:
        """Return the width of each coordinate in Å or radians ``[K]``; nearly straight angles are angles."""
        turned = {frozenset(axis) for axis in molecule.rotors.axes.tolist()}
        kinds = [
            "rotatable_torsion" if frozenset(t[1:3]) in turned else "torsion" for t in terms.torsions.tolist()
        ]
        parts = [
            self._look_up(["bond"] * len(terms.bonds), molecule.numbers[terms.bonds]),
            self._look_up(["angle"] * len(terms.angles), molecule.numbers[terms.angles]),
            self._look_up(["angle"] * len(terms.bends), molecule.numbers[terms.bends]),
            self._look_up(kinds, molecule.numbers[terms.torsions]),
        ]
        return np.concatenate(parts)

    def _look_up(self, kinds: list[str], numbers: Integers) -> NDArray[np.float64]:
        rows = zip(kinds, numbers.tolist(), strict=True)
        return np.array([self._special[kind].get(tuple(row), self.generic[kind]) for kind, row in rows])


def _read(path: str | Path) -> tuple[Any, str]:
    file = Path(path)
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")), str(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError(f"{file}: is no YAML or JSON table ({what}); repair it") from error


def _width(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{where} = {value!r} must be a number above zero, in Å or radians")
    return float(value)


def _elements(pattern: str, n: int, where: str) -> tuple[int, ...]:
    from ase.data import atomic_numbers

    symbols = [symbol.strip() for symbol in pattern.split("-")]
    if len(symbols) != n or any(s not in atomic_numbers or s == "X" for s in symbols):
        example = "-".join(["H", "C", "C", "H"][:n])
        raise ConfigError(f"{where} {pattern!r} does not name {n} elements; write it as {example}")
    return tuple(atomic_numbers[s] for s in symbols)
