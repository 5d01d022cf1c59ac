"""Time and memory of one step of periodic water against its size, on a CPU, one thread, random weights.

A box of 64 molecules at 1 g/cm3 with random orientations is repeated along its vectors. Atoms move a little
between the timed steps, so that the list of neighbours is checked each time. Building it is timed apart and
counted once in 10 steps: at 300 K the fastest of many hydrogens covers half the skin in about 10 of 0.5 fs.
Each size runs in a process of its own, so that its peak memory is its own (Linux only). The floor is the
least time an atom's matrix products take as the eager path has them, which lists pairs twice.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, parser, write
from shared import eager_floor

from ffpretrain.backbones import create_backbone
from ffpretrain.potential import Potential

NETWORKS = {
    "painn": {"hidden": 128, "layers": 3, "rbf": 20, "cutoff": 5.0},
    "torchmd-et": {"hidden": 128, "layers": 6, "heads": 8, "rbf": 32, "cutoff": 5.0},
}
REPEATS = {192: (1, 1, 1), 384: (2, 1, 1), 768: (2, 2, 1), 1536: (2, 2, 2), 3072: (4, 2, 2), 12288: (4, 4, 4)}
LARGEST = {"painn": 12288, "torchmd-et": 3072}
STEPS_PER_LIST = 10


def water(n_atoms: int) -> Atoms:
    rng = np.random.default_rng(0)
    edge = (64 * 18.015 / 0.6022) ** (1 / 3)
    box = Atoms(cell=[edge] * 3, pbc=True)
    for place in np.ndindex(4, 4, 4):
        one = molecule("H2O")
        one.rotate(float(rng.uniform(0, 360)), rng.normal(size=3), center="COM")
        one.translate((np.array(place) + 0.5) * edge / 4 - one.get_center_of_mass())
        box += one
    return box.repeat(REPEATS[n_atoms])


def memory(which: str) -> int:
    """Return this process's memory in kB: VmRSS is now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])


def network_of(name: str) -> Potential:
    torch.manual_seed(0)
    return Potential(create_backbone(name, **NETWORKS[name]))


def measure(network: str, n_atoms: int) -> dict[str, Any]:
    from ffpretrain.md.runtime import Runtime
    from ffpretrain.md.verlet import VerletList

    atoms = water(n_atoms)
    runtime = Runtime(network_of(network), "cpu", "float32", "auto")
    small = molecule("H2O", cell=[20.0] * 3, pbc=True)
    # builds the library and passes the gate, which would otherwise be part of what is measured
    runtime.evaluate(small.numbers, small.positions, small.cell.array, small.pbc)
    before = memory("VmHWM")
    rng = np.random.default_rng(1)
    runtime.evaluate(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    times = []
    for _ in range(5 if n_atoms > 2000 else 15):
        atoms.positions += rng.normal(0.0, 0.005, atoms.positions.shape)
        started = time.perf_counter()
        runtime.evaluate(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
        times.append(time.perf_counter() - started)
    peak = memory("VmHWM")
    verlet, pos = VerletList(5.0), torch.tensor(atoms.positions)
    started = time.perf_counter()
    verlet.candidates(pos, torch.tensor(atoms.cell.array), (True, True, True))
    build = time.perf_counter() - started
    step = statistics.median(times)
    return {
        "atoms": n_atoms,
        "ms": round(step * 1e3, 2),
        "us_per_atom": round(step / n_atoms * 1e6, 2),
        "list_build_ms": round(build * 1e3, 2),
        "list_share": round(build / STEPS_PER_LIST / step, 4),
        "kB_per_atom": round((peak - before) / n_atoms, 1),
        "path": runtime.backend,
    }


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--one", nargs=2, metavar=("NETWORK", "ATOMS"), help="a single size, as JSON on stdout")
    options = args.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    started, results = time.perf_counter(), {}
    for network in NETWORKS:
        rows = []
        for n_atoms in (n for n in REPEATS if n <= LARGEST[network]):
            command = [sys.executable, __file__, "--one", network, str(n_atoms)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(network, rows[-1], flush=True)
        slope = np.polyfit(np.log([r["atoms"] for r in rows]), np.log([r["ms"] for r in rows]), 1)[0]
        least = eager_floor(network_of(network).eval(), water(192))
        results[network] = {
            "rows": rows,
            "exponent": round(float(slope), 3),
            "floor_of_the_eager_path": least,
        }
        print(
            f"{network}: time grows with the power {slope:.3f} of the number of atoms; the eager path's "
            f"matrix products take {least['us_per_atom']} µs an atom at least"
        )
    write("speed_scaling", {"machine": machine(), "results": results}, started, options.out)


if __name__ == "__main__":
    main()
