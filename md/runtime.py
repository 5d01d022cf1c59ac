"""The only place that evaluates a potential fast; every adapter stands on it."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffpretrain.artifacts import resolve_device
from ffpretrain.errors import ConfigError, UnsupportedInputError, nearest
from ffpretrain.md.agreement import Agreement, check_agreement
from ffpretrain.md.batches import BatchEvaluation, BatchPath, OneOfBatch, refuse_bad_positions
from ffpretrain.md.compiled import COMPILE_MIN_STEPS, CompileWarning, compile_dense
from ffpretrain.md.cuda import GraphPath, record_molecules
from ffpretrain.md.cuda_batch import graph_batch
from ffpretrain.md.native import NativeMany, NativePath, NativeUnavailable
from ffpretrain.md.native.batch import NativeBatch
from ffpretrain.md.native.ready import NATIVE_MIN_STEPS, prepare, say_failed
from ffpretrain.md.paths import (
    DENSE_ATOMS,
    Array,
    DensePath,
    EdgePath,
    Evaluation,
    Path,
    dense_fits,
    refuse_non_finite,
    refuse_shapes,
)
from ffpretrain.md.structures import Structure, evaluate_structures

CompileOption = Literal["auto"] | bool
_Native = TypeVar("_Native", NativePath, NativeMany)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: structures (elements and periodic directions) whose paths are kept ready
_KEPT = 8


@dataclass
class _Plan:
    path: Path
    checked: bool


class Runtime:
    """Evaluates one potential in one precision on one device.

    Args:
        model: a :class:`~ffpretrain.potential.Potential`, or any module that takes a graph, has a ``cutoff``
            in Å and returns a dictionary with ``energy``, ``forces``, … as a potential does. It is copied, so
            training it further does not change the runtime.
        device: ``auto`` (a CUDA device where there is one, else the CPU) or a name torch knows.
        dtype: ``float32`` or ``float64``, of the network; reference energies and sums are float64 in both.
        compile: ``auto`` and True evaluate the main backbones natively on a CPU (:mod:`ffpretrain.md.native`,
            built once per machine; ``auto`` waits for that in runs of :data:`NATIVE_MIN_STEPS` steps or more)
            and record small molecules on a GPU. Elsewhere True compiles small molecules with torch, ``auto``
            once ``expected_steps`` reach :data:`COMPILE_MIN_STEPS`. False runs eager.

    Attributes:
        agreement: what the gate measured, by path; see :mod:`ffpretrain.md.agreement`. An eager path is
            compared on the first structure that takes it, a compiled one on every structure it is built for.
        expected_steps: how many evaluations of one structure are to come.

    Raises:
        ConfigError: an unknown device, dtype or value of ``compile``.
    """

    def __init__(
        self, model: nn.Module, device: str = "auto", dtype: str = "float32", compile: CompileOption = False
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype)
        if compile not in ("auto", True, False):
            raise ConfigError(f"compile={compile!r} is not one of 'auto', True, False")
        self.model = copy.deepcopy(model).to(self.device, self.dtype).eval().requires_grad_(False)
        self.compile: CompileOption = compile
        self.expected_steps = 0
        self.agreement: dict[str, Agreement] = {}
        self._plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        self._batch: BatchPath | None = None
        self._known: object = None
        self._path_name = ""
        self._many: NativeMany | None = None
        self.not_native = ""  # why the native path was not taken; empty where it was, or was not asked for

    def __getstate__(self) -> dict[str, Any]:
        """Leave the paths out: compiled code cannot be copied, and all of them are made again when needed."""
        return {**self.__dict__, "_plans": OrderedDict(), "_batch": None, "_many": None}

    @property
    def cutoff(self) -> float:
        """Largest distance of two neighbours in Å."""
        return float(self.model.cutoff)  # type: ignore[arg-type]

    @property
    def backend(self) -> str:
        """How the last structure was evaluated, such as ``dense float32 cpu``; empty before the first."""
        return f"{self._path_name} {str(self.dtype)[6:]} {self.device}" if self._path_name else ""

    def fingerprint(self) -> str:
        """Return a SHA-256 of the weights as this runtime holds them, in hexadecimal."""
        value = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            value.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            value.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return value.hexdigest()

    def evaluate(
        self,
        numbers: NDArray[np.integer],
        positions: Array,
        cell: Array | None = None,
        pbc: Sequence[bool] = (False, False, False),
    ) -> Evaluation:
        """Evaluate one structure.

        Args:
            numbers: atomic numbers ``[N]``.
            positions: ``[N, 3]`` Å.
            cell: lattice vectors in rows ``[3, 3]`` Å; only read where ``pbc`` is set.
            pbc: which directions repeat.

        Raises:
            UnsupportedInputError: no atoms, arrays of other shapes, an element the model never saw, a
                position that is not finite, two atoms at the same place, a periodic direction without cell
                vector, a cell too small for atoms.
            AgreementError: the path about to be used gives other numbers than the plain evaluation.
            NonFiniteError: the model's energy or a force is not finite.
        """
        elements: NDArray[np.int64] = np.asarray(numbers, dtype=np.int64)
        positions = np.asarray(positions, dtype=np.float64)
        directions = (bool(pbc[0]), bool(pbc[1]), bool(pbc[2]))
        box = np.asarray(cell, dtype=np.float64) if cell is not None and any(directions) else None
        refuse_shapes(elements, positions, box)
        path = self.admit(elements, positions, box, directions)
        self._path_name = path.name
        result = path(positions, box)
        if result.shortest == 0:
            raise UnsupportedInputError("two atoms are at the same place; move or remove one")
        refuse_non_finite(result)
        return result

    def evaluate_tensors(
        self,
        numbers: Tensor,
        positions: Tensor,
        batch: Tensor,
        cell: Tensor,
        periodic: Tensor,
        known: object = None,
    ) -> BatchEvaluation:
        """Evaluate structures that an engine moves together; nothing leaves the device.

        Args:
            numbers: atomic numbers ``[N]`` of all structures.
            positions: ``[N, 3]`` Å.
            batch: structure of each atom ``[N]``, ascending from 0 without gaps.
            cell: lattice vectors in rows ``[B, 3, 3]`` Å; only read where ``periodic``.
            periodic: for each structure ``[B]``, whether it repeats in all three directions.
            known: stands for ``numbers``, ``batch`` and ``periodic``: while callers give the same object,
                they are not compared with those of the call before. None compares them.

        Raises:
            UnsupportedInputError: as :meth:`evaluate`; it names the structure by its place.
            ConfigError: the model has no energy.
            AgreementError: as :meth:`evaluate`.
            NonFiniteError: as :meth:`evaluate`.
        """
        positions, cell = (t.detach().to(self.device, torch.float64) for t in (positions, cell))
        path = self._batch
        if path is not None and path.checks_positions and known is not None and known is self._known:
            return path(positions, cell)
        numbers, batch = (t.to(self.device, torch.int64) for t in (numbers, batch))
        periodic = periodic.to(self.device)
        if path is None or not path.checks_positions or not path.serves(numbers, batch, periodic):
            refuse_bad_positions(positions, batch)
            if path is None or not path.serves(numbers, batch, periodic):
                path = self._batch = self._make_batch(numbers, batch, periodic, positions)
        if path.name not in self.agreement:
            one = OneOfBatch(path, positions, cell)
            box = cell[-1].cpu().numpy() if any(one.pbc) else None
            self.check(one, one.numbers, one.positions, box, one.pbc)
        self._path_name, self._known = path.name, known
        return path(positions, cell)

    def _make_batch(self, numbers: Tensor, batch: Tensor, periodic: Tensor, positions: Tensor) -> BatchPath:
        check = getattr(self.model, "check_elements", None)
        if check is not None:
            check(numbers)
        if (many := self.native_many()) is not None:
            return NativeBatch(many, self.model, numbers, batch, periodic)
        if self.records:
            compiled = self._wants_compiled()
            path = graph_batch(self.model, numbers, batch, periodic, positions, compiled)
            if path is not None:
                # its shapes are those of this batch, so it is compared anew
                self.agreement.pop(path.name, None)
                return path
        return BatchPath(self.model, numbers, batch, periodic)

    def evaluate_batch(self, structures: Iterable[Structure], forces: bool = True) -> list[Evaluation]:
        """Evaluate many structures, several at a time.

        Args:
            structures: ``ase.Atoms``, frames of a dataset, or what has the same attributes.
            forces: False computes energies alone, without a derivative: ``forces`` and ``stress`` are None.

        Raises:
            UnsupportedInputError, NonFiniteError: as :meth:`evaluate`; they name the structure by its place.
            AgreementError: as :meth:`evaluate`.
        """
        return evaluate_structures(self, structures, forces)

    def check(
        self,
        path: Path,
        numbers: NDArray[np.int64],
        positions: Array,
        cell: Array | None,
        pbc: tuple[bool, bool, bool],
    ) -> None:
        """Compare a way to evaluate a structure with the plain one, and keep what is measured.

        Args:
            path: about to be used.
            numbers: atomic numbers ``[N]``.
            positions: ``[N, 3]`` Å.
            cell: ``[3, 3]`` Å, or None where nothing repeats.
            pbc: which directions repeat.

        Raises:
            AgreementError, NonFiniteError: as :func:`~ffpretrain.md.agreement.check_agreement`.
        """
        self.agreement[path.name] = check_agreement(
            path, self.model, numbers, positions, cell, pbc, self.dtype, self.device
        )

    def admit(
        self,
        numbers: NDArray[np.int64],
        positions: Array,
        cell: Array | None,
        pbc: tuple[bool, bool, bool],
    ) -> Path:
        """Return the way to evaluate a structure, compared with the plain one where it was not yet.

        Args:
            numbers: atomic numbers ``[N]``.
            positions: ``[N, 3]`` Å.
            cell: ``[3, 3]`` Å, or None where nothing repeats.
            pbc: which directions repeat.

        Raises:
            UnsupportedInputError, AgreementError, NonFiniteError: as :meth:`evaluate`.
        """
        plan = self._plan(numbers, positions, pbc)
        if not plan.checked:
            self.check(plan.path, numbers, positions, cell, pbc)
            plan.checked = True
        return plan.path

    def _plan(self, numbers: NDArray[np.int64], positions: Array, pbc: tuple[bool, bool, bool]) -> _Plan:
        if len(numbers) == 0:
            raise UnsupportedInputError("the structure has no atoms; give at least one")
        if not np.isfinite(positions).all():
            bad = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
            raise UnsupportedInputError(f"the position of atom {bad} is not finite; check the structure")
        compiled = self._wants_compiled()
        key = (numbers.tobytes(), pbc, compiled, self.expected_steps >= NATIVE_MIN_STEPS)
        if key not in self._plans:
            check = getattr(self.model, "check_elements", None)
            if check is not None:
                check(torch.as_tensor(numbers, device=self.device))
            path = self._make_path(numbers, positions, pbc, compiled)
            # a path of fixed shape is compared anew for every structure, others are the same code for all
            fixed = isinstance(path, GraphPath) or "compiled" in path.name
            seen = path.name in self.agreement and not fixed
            self._plans[key] = _Plan(path, checked=seen)
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    @property
    def records(self) -> bool:
        """Whether molecules of fixed shape are recorded as CUDA graphs."""
        return self.compile is not False and self.device.type == "cuda"

    def _wants_compiled(self) -> bool:
        if self.compile == "auto":
            return self.expected_steps >= COMPILE_MIN_STEPS
        return self.compile

    def _make_path(
        self, numbers: NDArray[np.int64], positions: Array, pbc: tuple[bool, bool, bool], compiled: bool
    ) -> Path:
        model, n = self.model, len(numbers)
        if (native := self._native_path(numbers, pbc)) is not None:
            return native
        z = torch.as_tensor(numbers, device=self.device)
        if self.records and dense_fits(model, n, pbc, self.device, compiled=True):
            graph = record_molecules(model, z, positions, compiled=compiled)  # type: ignore[arg-type]
            if graph is not None:
                return GraphPath(graph, float(model.shift))  # type: ignore[arg-type]
        if compiled and dense_fits(model, n, pbc, self.device, compiled=True):
            pos = torch.tensor(positions, device=self.device)
            function = compile_dense(model, z, pos)  # type: ignore[arg-type]
            if function is not None:
                return DensePath(model, numbers, self.device, function)  # type: ignore[arg-type]
        elif compiled and self.compile is True:
            warnings.warn(
                f"only molecules in vacuum of at most {DENSE_ATOMS} atoms, with a backbone that is smooth at "
                "its cutoff, are compiled; running eager",
                CompileWarning,
                stacklevel=2,
            )
        if dense_fits(model, n, pbc, self.device, compiled=False):
            return DensePath(model, numbers, self.device)  # type: ignore[arg-type]
        return EdgePath(model, numbers, pbc, self.device)

    def native_many(self, expected: int = 0) -> NativeMany | None:
        """Return the native evaluation of many structures, or None as :meth:`_native_path`.

        Args:
            expected: how many evaluations are to come, where that is more than ``expected_steps``.
        """
        if self._many is None and self.compile is not False:
            self._many = self._native(lambda: NativeMany(self.model), expected)
        return self._many

    def _native_path(self, numbers: NDArray[np.int64], pbc: tuple[bool, bool, bool]) -> NativePath | None:
        """Return the native path, or None where it is not wanted or the machine, model or device has none."""
        return self._native(lambda: NativePath(self.model, numbers, pbc))

    def _native(self, make: Callable[[], _Native], expected: int = 0) -> _Native | None:
        if self.compile is False or self.device.type != "cpu":
            return None
        wait = self.compile is True or max(expected, self.expected_steps) >= NATIVE_MIN_STEPS
        try:
            prepare(self.model, wait)
            return make()
        except NativeUnavailable as reason:
            self.not_native = str(reason)
            if wait:
                say_failed(self.model, reason)
            return None


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch type of ``float32`` or ``float64``.

    Raises:
        ConfigError: another name.
    """
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}{nearest(str(name), DTYPES)}")
    return DTYPES[name]
