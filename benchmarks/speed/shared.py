"""What the benchmarks here share: the peers' networks, the molecule, timed dynamics, the machine's floor."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.verlet import VelocityVerlet

from ffpretrain.artifacts import read_card
from ffpretrain.md.velocities import draw_momenta
from ffpretrain.potential import Potential

#: steps a block and blocks of :func:`measure`
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


def schnetpack_painn() -> torch.nn.Module:
    """Return SchNetPack's PaiNN 3x128 with its own energy head, which is smaller: it reads scalars only."""
    import typing

    import torch.utils.data.dataloader as dataloader

    # SchNetPack 2.1 imports this name, which newer versions of torch no longer have
    dataloader.T_co = typing.TypeVar("T_co", covariant=True)
    import schnetpack

    torch.manual_seed(0)
    representation = schnetpack.representation.PaiNN(
        n_atom_basis=128,
        n_interactions=3,
        radial_basis=schnetpack.nn.GaussianRBF(n_rbf=20, cutoff=5.0),
        cutoff_fn=schnetpack.nn.CosineCutoff(5.0),
    )
    return schnetpack.model.NeuralNetworkPotential(
        representation=representation,
        input_modules=[schnetpack.atomistic.PairwiseDistances()],
        output_modules=[
            schnetpack.atomistic.Atomwise(128, output_key="energy"),
            schnetpack.atomistic.Forces(energy_key="energy", force_key="forces"),
        ],
    )


def dynamics(make: Callable[[], Calculator]) -> VelocityVerlet:
    atoms = aspirin()
    atoms.calc = make()
    # random weights make a random landscape: a tiny step keeps the molecule together while positions change
    atoms.set_momenta(draw_momenta(atoms, 10.0, np.random.default_rng(0)))
    run = VelocityVerlet(atoms, 0.05 * units.fs)
    run.run(10)
    return run


def measure(
    variants: dict[str, Callable[[], Calculator]], block: int = BLOCK, turns: int = BLOCKS
) -> dict[str, Any]:
    runs, result = {}, {}
    for name, make in variants.items():
        try:
            runs[name] = dynamics(make)
        except Exception as error:  # a peer may fail in any way; the reason is the result then
            result[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    blocks: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            started = time.perf_counter()
            run.run(block)
            blocks[name].append((time.perf_counter() - started) / block * 1e3)
    forces = {name: run.atoms.get_forces() for name, run in runs.items()}
    for name, values in blocks.items():
        difference = float(np.abs(forces[name] - forces["ffpretrain"]).max())
        result[name] = {"ms": round(statistics.median(values), 3), "force_difference": difference}
    return result


def keep_memory() -> bool:
    """Let this process keep the memory it frees; return whether that can be asked for here.

    glibc gives blocks of many megabytes back to the system at once, and fetching fresh ones takes most of the
    time of a step that makes such tensors: of a peer's, or of our plain path.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4
    never = -1
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_max, 0))


def matrix_rate() -> float:
    """Return the operations per second of torch's matrix products, float32, on the threads that it has."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    return 2 * 512**3 / min(_timed(lambda: torch.mm(a, b)) for _ in range(50))


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy from memory to memory reads and writes."""
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    return 2 * 4 * (1 << 24) / min(_timed(lambda: target.copy_(source)) for _ in range(10))


def floor(flops: float, bytes_moved: float = 0.0) -> dict[str, float]:
    """Return the machine's rates and the least time that so many operations and bytes take at them, in ms."""
    rate, bandwidth = matrix_rate(), copy_bandwidth()
    return {
        "gflop": round(flops / 1e9, 4),
        "gflop_per_s": round(rate / 1e9, 1),
        "gbyte_per_s": round(bandwidth / 1e9, 1),
        "floor_ms": round(max(flops / rate, bytes_moved / bandwidth) * 1e3, 4),
    }


def counted_flops(function: Callable[[], object]) -> float:
    """Return the operations in matrix products of one call, forward and backward, as torch counts them."""
    from torch.profiler import ProfilerActivity, profile

    # not torch's FlopCounterMode, whose hooks forbid a derivative with respect to an input
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        function()
    return float(
        sum(e.flops for e in profiler.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm"))
    )


def eager_floor(potential: Potential, atoms: Atoms) -> dict[str, float]:
    """Return the least time of a structure's matrix products with forces, as the eager path has them."""
    from ffpretrain.graphs import graph_from_atoms

    graph = graph_from_atoms(atoms, potential.cutoff)
    found = floor(counted_flops(lambda: potential.requires_grad_(False)(graph)))
    return {**found, "us_per_atom": round(found["floor_ms"] * 1e3 / len(graph.z), 2)}


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
