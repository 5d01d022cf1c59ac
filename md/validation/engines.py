"""Do all ways to evaluate the model give the same energies and forces?"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ffpretrain import units
from ffpretrain.md.agreement import Agreement, AgreementError, check_agreement
from ffpretrain.md.paths import DensePath, EdgePath, Path, dense_fits
from ffpretrain.md.runtime import Runtime
from ffpretrain.md.unfamiliar import UnfamiliarInputWarning
from ffpretrain.md.validation.result import Check, verdict
from ffpretrain.md.validation.subject import Subject, spread_of
from ffpretrain.md.validation.thresholds import ENGINE_ENERGY, ENGINE_FORCES

if TYPE_CHECKING:
    from ase import Atoms

FRAMES = 4
#: status of an engine that is there and does not load
UNUSABLE = "cannot be imported"
#: Å, standard deviation of the displacements between the frames
DISPLACEMENT = 0.05

Array = NDArray[np.float64]


class Values(NamedTuple):
    """What an engine says of some frames: ``energy [F]`` eV and ``forces [F, N, 3]`` eV/Å."""

    energy: Array
    forces: Array


class Engine(NamedTuple):
    """An engine and how to ask it.

    Attributes:
        name: for the report.
        module: what must be importable.
        package: its distribution.
        extra: of ``pip install "ffpretrain[extra]"``.
        evaluate: returns its float64 values, through this package's adapter.
    """

    name: str
    module: str
    package: str
    extra: str
    evaluate: Callable[[Subject, Sequence[Atoms]], Values]


def check_engines(subject: Subject) -> Check:
    """Compare every engine, and every path of the runtime, with ASE and plain evaluation in float64."""
    frames = [subject.atoms, *subject.displaced(FRAMES - 1, DISPLACEMENT)]
    want = _ase(subject, frames)
    with warnings.catch_warnings():  # the frames are displaced at random, and each engine would say so
        warnings.simplefilter("ignore", UnfamiliarInputWarning)
        engines = [_compare(engine, subject, frames, want) for engine in ENGINES]
    paths = _paths(subject)
    bad = [row["engine"] for row in engines if row["status"] in ("differs", "failed")]
    bad += [f"path {row['path']} {row['dtype']}" for row in paths if row["status"] != "agrees"]
    there = [row["engine"] for row in engines if row["status"] == "agrees"]
    absent = [row["engine"] for row in engines if row["status"] == "not installed"]
    unusable = [f"{row['engine']} ({row['error']})" for row in engines if row["status"] == UNUSABLE]
    if bad:
        summary = f"not as ASE in float64: {', '.join(bad)}"
    else:
        summary = f"ASE, {', '.join([*there, f'{len(paths)} paths of the runtime'])} agree"
    if absent:
        summary += f"; not installed: {', '.join(absent)}"
    if unusable:
        summary += f"; cannot be imported: {', '.join(unusable)}"
    return Check("engines", verdict(not bad), summary, {"frames": FRAMES, "engines": engines, "paths": paths})


def _ase(subject: Subject, frames: Sequence[Atoms]) -> Values:
    energies, forces = [], []
    for frame in frames:
        subject.exact.calculate(frame)
        energies.append(subject.exact.results["energy"])
        forces.append(subject.exact.results["forces"])
    return Values(np.array(energies), np.array(forces))


def _compare(engine: Engine, subject: Subject, frames: Sequence[Atoms], want: Values) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": engine.name, "version": None, "energy_error": None, "force_error": None}
    if importlib.util.find_spec(engine.module) is None:
        return {**row, "status": "not installed", "install": f'pip install "ffpretrain[{engine.extra}]"'}
    row["version"] = importlib.metadata.version(engine.package)
    try:
        importlib.import_module(engine.module)
        found = engine.evaluate(subject, frames)
    except ImportError as error:  # a system library it needs, say: no fault of ours
        return {**row, "status": UNUSABLE, "error": _reason(error)}
    except Exception as error:  # engines raise their own kinds; whatever it is, the engine does not work
        return {**row, "status": "failed", "error": _reason(error)}
    energy, forces = spread_of(found.energy - want.energy), spread_of(found.forces - want.forces)
    agrees = energy <= ENGINE_ENERGY and forces <= ENGINE_FORCES
    row.update(energy_error=_finite(energy), force_error=_finite(forces))
    return {**row, "status": "agrees" if agrees else "differs"}


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _finite(value: float) -> float | None:
    """Return a number JSON can hold."""
    return value if np.isfinite(value) else None


def _paths(subject: Subject) -> list[dict[str, Any]]:
    """Compare the runtime's eager paths in both precisions, and what the dynamics use, with the gate."""
    rows = []
    for name in ("float64", "float32"):
        runtime = Runtime(subject.potential, str(subject.runtime.device), name)
        for path in _eager_paths(runtime, subject.atoms):
            rows.append({**_gate(runtime, path, subject.atoms), "dynamics": False})
    subject.working.expect(0)
    try:
        subject.working.calculate(subject.atoms)
        rows += [{**found, "status": "agrees", "dynamics": True} for found in subject.working.agreement()]
    except AgreementError as error:
        rows.append({"path": "", "dtype": "", "status": "differs", "dynamics": True, "error": str(error)})
    return rows


def _eager_paths(runtime: Runtime, atoms: Atoms) -> list[Path]:
    pbc = (bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2]))
    numbers = np.asarray(atoms.numbers, dtype=np.int64)
    paths: list[Path] = [EdgePath(runtime.model, numbers, pbc, runtime.device)]
    if dense_fits(runtime.model, len(atoms), pbc, runtime.device, compiled=True):
        paths.append(DensePath(runtime.model, numbers, runtime.device))  # type: ignore[arg-type]
    return paths


def _gate(runtime: Runtime, path: Path, atoms: Atoms) -> dict[str, Any]:
    pbc = (bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2]))
    cell = np.array(atoms.cell.array) if any(pbc) else None
    numbers = np.asarray(atoms.numbers, dtype=np.int64)
    try:
        found: Agreement = check_agreement(
            path, runtime.model, numbers, atoms.positions, cell, pbc, runtime.dtype, runtime.device
        )
    except AgreementError as error:
        dtype = str(runtime.dtype).removeprefix("torch.")
        return {"path": path.name, "dtype": dtype, "status": "differs", "error": str(error)}
    return {**found.as_dict(), "status": "agrees"}


def _openmm(subject: Subject, frames: Sequence[Atoms]) -> Values:
    import openmm
    from openmm import unit

    from ffpretrain.md.openmm import add_force

    atoms, per_nm = frames[0], units.LENGTH_UNITS["nm"]
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    turn = np.eye(3)
    if subject.periodic:
        box, turn = reduced_box(np.array(atoms.cell.array))
        system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in box / per_nm))
    device = str(subject.runtime.device)
    add_force(
        system,
        subject.source,
        atoms.numbers.tolist(),
        periodic=subject.periodic,
        device=device,
        dtype="float64",
    )
    # the Reference platform keeps positions and forces in float64
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    energies, forces = [], []
    for frame in frames:
        context.setPositions(frame.positions @ turn / per_nm)
        state = context.getState(getEnergy=True, getForces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        found = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        forces.append(found @ turn.T)
    return Values(np.array(energies) * units.KJ_PER_MOL, np.array(forces) * (units.KJ_PER_MOL / per_nm))


def reduced_box(cell: Array) -> tuple[Array, Array]:
    """Return vectors of the same lattice as OpenMM wants them, and the turn that brings atoms there.

    Args:
        cell: lattice vectors in rows ``[3, 3]`` Å.

    Returns:
        A lower triangular ``[3, 3]`` whose entries below the diagonal are at most half of the diagonal above
        them, and ``turn [3, 3]`` such that positions become ``positions @ turn``.
    """
    if np.linalg.det(cell) < 0:
        cell = cell * np.array([[1.0], [1.0], [-1.0]])  # c reversed spans the same lattice
    turn, upper = np.linalg.qr(cell.T)
    sign = np.sign(np.diag(upper))
    turn, box = turn * sign, (upper * sign[:, None]).T
    for row, column in ((2, 1), (2, 0), (1, 0)):
        box[row] -= np.round(box[row, column] / box[column, column]) * box[column]
    return box, turn


def _torchmd(subject: Subject, frames: Sequence[Atoms]) -> Values:
    from ffpretrain.md.torchmd import External

    numbers = np.array([frame.numbers for frame in frames])
    external = External(subject.source, numbers, str(subject.runtime.device), dtype="float64")
    box = np.array([frame.cell.array if subject.periodic else np.zeros((3, 3)) for frame in frames])
    pos = torch.tensor(np.array([frame.positions for frame in frames]))
    energy, forces = external.calculate(pos, torch.tensor(box))
    scale = units.KCAL_PER_MOL
    return Values(energy[:, 0].cpu().numpy() * scale, forces.cpu().numpy() * scale)


def _torch_sim(subject: Subject, frames: Sequence[Atoms]) -> Values:
    import torch_sim

    from ffpretrain.md.torchsim import FFModel

    model = FFModel(subject.source, subject.runtime.device, "float64")
    state = torch_sim.io.atoms_to_state(list(frames), subject.runtime.device, torch.float64)
    out = model(state)
    shape = (len(frames), len(frames[0]), 3)
    return Values(out["energy"].cpu().numpy(), out["forces"].detach().cpu().numpy().reshape(shape))


#: engines that take this package's potentials; a new one is one line
ENGINES: tuple[Engine, ...] = (
    Engine("OpenMM", "openmm", "openmm", "openmm", _openmm),
    Engine("TorchMD", "torchmd", "torchmd", "torchmd", _torchmd),
    Engine("torch-sim", "torch_sim", "torch-sim-atomistic", "torch-sim", _torch_sim),
)
