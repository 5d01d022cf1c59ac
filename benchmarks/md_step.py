"""Milliseconds per MD step of the named models: Verlet through ASE, as it comes and eager, 1 and 2 threads.

The variants take turns in blocks of 50 steps in one process, so that a change of the machine's speed hits all
of them; the median over the blocks is reported.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from common import machine, parser, write

from ffpretrain import FFCalculator
from ffpretrain.artifacts import read_card
from ffpretrain.md.runtime import CompileOption
from ffpretrain.md.velocities import draw_momenta

BLOCK, BLOCKS = 50, 8


def molecule(name: str) -> Atoms:
    geometry = read_card(name).reference_geometry
    if geometry is None:
        raise SystemExit(f"{name} carries no reference geometry")
    return Atoms(geometry.numbers, geometry.positions)


def dynamics(name: str, compiled: CompileOption) -> VelocityVerlet:
    import numpy as np

    atoms = molecule(name)
    atoms.calc = FFCalculator(name, compile=compiled)
    atoms.set_momenta(draw_momenta(atoms, 300.0, np.random.default_rng(0)))
    return VelocityVerlet(atoms, 0.5 * units.fs)


def measure(name: str) -> dict[str, float]:
    variants = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for compiled in (False, "auto"):
            run = dynamics(name, compiled)
            run.run(20)
            path = run.atoms.calc.backend.split()[0] if compiled else "eager"
            variants[f"{path}, {threads} thread{'s' * (threads > 1)}"] = (threads, run)
    blocks: dict[str, list[float]] = {key: [] for key in variants}
    for _ in range(BLOCKS):
        for key, (threads, run) in variants.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            run.run(BLOCK)
            blocks[key].append((time.perf_counter() - started) / BLOCK * 1e3)
    return {key: round(statistics.median(values), 3) for key, values in blocks.items()}


def main() -> None:
    options = parser(__doc__).parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    started, content = time.perf_counter(), {"machine": machine(), "unit": "ms per step", "models": {}}
    for name in ("ndem-aspirin", "ndem-ethanol"):
        content["models"][name] = measure(name)
        for key, value in content["models"][name].items():
            print(f"{name}, {key}: {value:.2f} ms per step")
    write("md_step", content, started, options.out)


if __name__ == "__main__":
    main()
