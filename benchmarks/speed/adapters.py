"""What the adapters add to the model's own time: a step minus the model, in ms, on aspirin, one thread.

The time inside the model is measured within the step itself, by a clock around the native path's call, so the
difference is not that of two runs. Measured with the native network of ndem-aspirin, and once more with a
path that answers at once, where the whole step is overhead. Included is the engine's own work: ASE's velocity
Verlet, OpenMM's integrator on its Reference and CPU platforms. The floor is that work alone: the same engine,
the same atoms, and a calculator, Python function or module that returns the same arrays every time. Medians
over blocks count; beside them stand the first and last tenth, for a step of a busy machine takes longer. On
Linux the process keeps to one core.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, parser, write
from shared import aspirin

from ffpretrain import FFCalculator
from ffpretrain.md.native import NativeMany, NativePath
from ffpretrain.md.velocities import draw_momenta

MODEL = "ndem-aspirin"
TARGETS = {"ase": 0.35, "openmm Reference": 0.15, "openmm CPU": 0.15, "External": 0.1}
BLOCK, BLOCKS = 40, 60
#: runs that many steps or evaluations
Steps = Callable[[int], None]


class Clock:
    """Adds up the time inside the model; with `answer`, the model answers at once with its first result."""

    def __init__(self) -> None:
        self.seconds, self.answer = 0.0, False

    @contextmanager
    def around(self, owner: type) -> Iterator[None]:
        real, kept = owner.__call__, {}

        def timed(path: Any, *inputs: Any) -> Any:
            started = time.perf_counter()
            if not self.answer or id(path) not in kept:
                kept[id(path)] = real(path, *inputs)
            self.seconds += time.perf_counter() - started
            return kept[id(path)]

        owner.__call__ = timed
        try:
            yield
        finally:
            owner.__call__ = real


def ase_steps() -> Steps:
    atoms = aspirin()
    atoms.calc = FFCalculator(MODEL)
    atoms.set_momenta(draw_momenta(atoms, 300.0, np.random.default_rng(0)))
    return VelocityVerlet(atoms, 0.5 * units.fs).run


def openmm_steps(platform: str) -> Steps:
    from ffpretrain.md.openmm import add_force

    return openmm_run(platform, lambda system, atoms: add_force(system, MODEL, atoms.numbers.tolist()))


def openmm_run(platform: str, add: Callable[[Any, Atoms], Any]) -> Steps:
    import openmm
    from openmm import unit

    atoms, system = aspirin(), openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(float(mass))
    add(system, atoms)
    integrator = openmm.VerletIntegrator(0.5 * unit.femtoseconds)
    properties = {"Threads": "1"} if platform == "CPU" else {}
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)
    context.setPositions(atoms.positions * unit.angstrom)
    context.setVelocitiesToTemperature(300 * unit.kelvin, 0)

    def run(steps: int) -> None:
        integrator.step(steps)

    run.kept = context  # type: ignore[attr-defined]  # the integrator does not keep it alive
    return run


def external_steps() -> Steps:
    from ffpretrain.md.torchmd import External

    atoms = aspirin()
    external = External(MODEL, atoms.numbers[None])
    box, rest = torch.zeros(1, 3, 3, dtype=torch.float64), torch.tensor(atoms.positions).unsqueeze(0)
    moved = [rest + 0.01 * torch.randn_like(rest) for _ in range(BLOCK)]

    def run(steps: int) -> None:
        for k in range(steps):
            external.calculate(moved[k], box)

    return run


def ase_floor() -> Steps:
    atoms = aspirin()
    forces = np.zeros((len(atoms), 3))

    class Constant:
        """Not of ASE's class, whose search for changes would be the larger part."""

        def get_forces(self, atoms: Atoms) -> Any:
            return forces

    atoms.calc = Constant()
    atoms.set_momenta(draw_momenta(atoms, 300.0, np.random.default_rng(0)))
    return VelocityVerlet(atoms, 0.5 * units.fs).run


def openmm_floor(platform: str) -> Steps:
    import openmm

    forces = np.zeros((len(aspirin()), 3))

    def constant(state: Any) -> tuple[float, Any]:
        state.getPositions(asNumpy=True)
        return 0.0, forces

    return openmm_run(platform, lambda system, atoms: system.addForce(openmm.PythonForce(constant)))


def external_floor() -> Steps:
    """Return what takes the positions and gives back an energy and forces, as tensors."""
    rest = torch.tensor(aspirin().positions).unsqueeze(0)

    def run(steps: int) -> None:
        for _ in range(steps):
            torch.zeros(1, 1, dtype=torch.float64), rest.to(torch.float32).to(torch.float64)

    return run


def measure(steps: dict[str, Steps], clock: Clock) -> dict[str, dict[str, Any]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(BLOCKS):
        for name, run in steps.items():
            inside, started = clock.seconds, time.perf_counter()
            run(BLOCK)
            whole, inside = time.perf_counter() - started, clock.seconds - inside
            times[name].append((whole / BLOCK * 1e3, inside / BLOCK * 1e3))
    return {name: summary(*np.array(values).T) for name, values in times.items()}


def summary(whole: NDArray[np.float64], inside: NDArray[np.float64]) -> dict[str, Any]:
    outside = whole - inside
    return {
        "step_ms": round(float(np.median(whole)), 4),
        "model_ms": round(float(np.median(inside)), 4),
        "overhead_ms": round(float(np.median(outside)), 4),
        "overhead_ms_tenths": np.quantile(outside, [0.1, 0.9]).round(4).tolist(),
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # one core, so that tens of microseconds are the adapter's and not of moves between caches
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")
    started, clock = time.perf_counter(), Clock()
    results: dict[str, Any] = {}
    with clock.around(NativePath), clock.around(NativeMany):
        steps: dict[str, Steps] = {"ase": ase_steps(), "External": external_steps()}
        for platform in ("Reference", "CPU"):
            try:
                steps[f"openmm {platform}"] = openmm_steps(platform)
            except Exception as error:  # not installed, or without the platform: the reason is the result
                results[f"openmm {platform}"] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        for run in steps.values():
            run(10)
        if not clock.seconds:
            raise SystemExit("the native path is not taken on this machine; ffpretrain doctor says why")
        found = measure(steps, clock)
        clock.answer = True
        trivial = measure(steps, clock)
    floors = measure(
        {
            name: {"ase": ase_floor, "External": external_floor}.get(
                name, partial(openmm_floor, name.split()[-1])
            )()
            for name in steps
        },
        clock,
    )
    for name, failed in results.items():
        print(f"{name}: {failed['failed']}")
    for name, row in found.items():
        row["overhead_with_trivial_model_ms"] = trivial[name]["overhead_ms"]
        row["floor_ms"] = floors[name]["step_ms"]
        row["target_ms"] = TARGETS[name]
        results[name] = row
        print(
            f"{name}: step {row['step_ms']:.3f} ms, outside the model {row['overhead_ms']:.3f} ms "
            f"(tenths {row['overhead_ms_tenths']}), with a trivial model "
            f"{row['overhead_with_trivial_model_ms']:.3f} ms; the engine alone {row['floor_ms']:.3f} ms; "
            f"target {row['target_ms']} ms"
        )
    content = {"machine": machine(), "what": f"{MODEL}, native, 1 thread", "results": results}
    write("speed_adapters", content, started, options.out)


if __name__ == "__main__":
    main()
