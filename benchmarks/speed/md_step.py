"""Milliseconds per MD step of aspirin, ours against TorchMD-Net with the same weights, one thread.

Every variant runs velocity Verlet through ASE, neighbour search and copies included. They take turns in
blocks in one process, so that a change of the machine hits all of them; the median over blocks counts.
TorchMD-Net is optional, beside ffpretrain in one environment (see benchmarks/README.md); a variant that
cannot run is listed with the reason.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, parser, write

from ffpretrain import FFCalculator
from ffpretrain.artifacts import read_card

BLOCK, BLOCKS = 30, 12
ET = {
    "model": "equivariant-transformer",
    "embedding_dimension": 128,
    "num_layers": 6,
    "num_heads": 8,
    "num_rbf": 32,
    "rbf_type": "expnorm",
    "trainable_rbf": True,
    "activation": "silu",
    "attn_activation": "silu",
    "distance_influence": "both",
    "neighbor_embedding": True,
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 100,
    "max_num_neighbors": 64,
    "vector_cutoff": True,
    "atom_filter": -1,
    "prior_model": None,
    "output_model": "Scalar",
    "reduce_op": "add",
    "derivative": True,
    "precision": 32,
}


def aspirin() -> Atoms:
    geometry = read_card("ndem-aspirin").reference_geometry
    if geometry is None:
        raise SystemExit("ndem-aspirin carries no reference geometry")
    atoms = Atoms(geometry.numbers, geometry.positions)
    atoms.info["charge"] = 0
    return atoms


def torchmd_net_checkpoint(path: Path) -> dict[str, Any]:
    from torchmdnet.models.model import create_model

    torch.manual_seed(0)
    model = create_model(dict(ET))
    content = {"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "hyper_parameters": ET}
    torch.save(content, path)
    return content


def et_variants(folder: Path) -> dict[str, Callable[[], Calculator]]:
    from ffpretrain.backbones.torchmd_et import from_torchmd_net

    content = torchmd_net_checkpoint(folder / "et.ckpt")
    potential = from_torchmd_net(content["state_dict"], content["hyper_parameters"])

    def theirs(compile: bool) -> Calculator:
        from torchmdnet.calculators import TMDNETCalculator

        return TMDNETCalculator(str(folder / "et.ckpt"), device="cpu", compile=compile)

    return {
        "ffpretrain": lambda: FFCalculator(potential, on_unfamiliar="ignore"),
        "ffpretrain eager": lambda: FFCalculator(potential, compile=False, on_unfamiliar="ignore"),
        "torchmd-net": lambda: theirs(False),
        "torchmd-net compile": lambda: theirs(True),
    }


def dynamics(make: Callable[[], Calculator]) -> VelocityVerlet:
    atoms = aspirin()
    atoms.calc = make()
    # random weights make a random landscape: a tiny step keeps the molecule together while positions change
    MaxwellBoltzmannDistribution(atoms, temperature_K=10, rng=np.random.default_rng(0))
    run = VelocityVerlet(atoms, 0.05 * units.fs)
    run.run(10)
    return run


def measure(variants: dict[str, Callable[[], Calculator]]) -> dict[str, Any]:
    runs, result = {}, {}
    for name, make in variants.items():
        try:
            runs[name] = dynamics(make)
        except Exception as error:  # a peer may fail in any way; the reason is the result then
            result[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    blocks: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(BLOCKS):
        for name, run in runs.items():
            started = time.perf_counter()
            run.run(BLOCK)
            blocks[name].append((time.perf_counter() - started) / BLOCK * 1e3)
    forces = {name: run.atoms.get_forces() for name, run in runs.items()}
    for name, values in blocks.items():
        difference = float(np.abs(forces[name] - forces["ffpretrain"]).max())
        result[name] = {"ms": round(statistics.median(values), 3), "force_difference": difference}
    return result


def floor(flops: float) -> dict[str, float]:
    """Return the rate of one thread's matrix products and the time that many operations take at it."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    best = min(_timed(lambda: torch.mm(a, b)) for _ in range(50))
    rate = 2 * 512**3 / best
    return {"gflop_per_s": round(rate / 1e9, 1), "floor_ms": round(flops / rate * 1e3, 3)}


def eager_flops() -> float:
    """Return the operations in matrix products of one eager evaluation with forces of ndem-aspirin."""
    from torch.profiler import ProfilerActivity, profile

    from ffpretrain import load_potential
    from ffpretrain.graphs import graph_from_atoms

    potential = load_potential("ndem-aspirin").requires_grad_(False)
    graph = graph_from_atoms(aspirin(), potential.cutoff)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        potential(graph)
    return float(
        sum(e.flops for e in profiler.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm"))
    )


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        steps = measure(et_variants(Path(folder)))
    flops = eager_flops()
    content: dict[str, Any] = {
        "machine": machine(),
        "what": "aspirin, torchmd-et 6x128, float32, 1 thread, velocity Verlet through ASE",
        "timed_steps": BLOCK * BLOCKS,
        "results": steps,
        "eager_matrix_products_gflop": round(flops / 1e9, 3),
        "floor_of_eager_operations": floor(flops),
    }
    ours = steps["ffpretrain"]["ms"]
    for name, found in steps.items():
        line = found.get("failed") or f"{found['ms']:.2f} ms per step, {found['ms'] / ours:.2f} times ours"
        print(f"{name}: {line}")
    content["ratios"] = {n: round(f["ms"] / ours, 2) for n, f in steps.items() if "ms" in f}
    write("speed_md_step", content, started, options.out)


if __name__ == "__main__":
    main()
