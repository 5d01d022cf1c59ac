"""Milliseconds per MD step of aspirin, ours against TorchMD-Net and SchNetPack with the same weights.

Every variant runs velocity Verlet through ASE, neighbour search and copies included. They take turns in
blocks in one process, so that a change of the machine hits all of them; the median over blocks counts.
One thread, float32. The peers stand beside ffpretrain in one environment (see benchmarks/README.md); one
that cannot run is listed with the reason.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ase.calculators.calculator import Calculator

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, parser, stop, write
from shared import (
    BLOCK,
    BLOCKS,
    aspirin,
    counted_flops,
    floor,
    measure,
    schnetpack_painn,
    torchmd_net_checkpoint,
)

from ffpretrain import FFCalculator


def et_variants(folder: Path) -> dict[str, Callable[[], Calculator]]:
    from ffpretrain.backbones.torchmd_et import from_torchmd_net

    try:
        content = torchmd_net_checkpoint(folder / "et.ckpt")
    except ImportError as error:
        stop(f"{error}; benchmarks/README.md says what to install")
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


def painn_variants() -> dict[str, Callable[[], Calculator]]:
    from ffpretrain.backbones.painn import PaiNN, from_schnetpack
    from ffpretrain.potential import Potential

    torch.manual_seed(0)
    try:
        model = schnetpack_painn()
        backbone = from_schnetpack(model.representation.state_dict())
    except ImportError:
        backbone = PaiNN()
    potential = Potential(backbone)

    def theirs() -> Calculator:
        import schnetpack
        from schnetpack.interfaces import SpkCalculator

        class Given(SpkCalculator):
            def _load_model(self, model_file: object) -> torch.nn.Module:
                return schnetpack_painn().eval()

        search = schnetpack.transform.MatScipyNeighborList(cutoff=5.0)
        return Given("", search, energy_unit="eV", position_unit="Ang")

    return {
        "ffpretrain": lambda: FFCalculator(potential, on_unfamiliar="ignore"),
        "ffpretrain eager": lambda: FFCalculator(potential, compile=False, on_unfamiliar="ignore"),
        "schnetpack": theirs,
    }


def eager_flops() -> float:
    """Return the operations in matrix products of one eager evaluation with forces of ndem-aspirin."""
    from ffpretrain import load_potential
    from ffpretrain.graphs import graph_from_atoms

    potential = load_potential("ndem-aspirin").requires_grad_(False)
    graph = graph_from_atoms(aspirin(), potential.cutoff)
    return counted_flops(lambda: potential(graph))


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variants in (
            ("torchmd-et 6x128", et_variants(Path(folder))),
            ("painn 3x128", painn_variants()),
        ):
            results[name] = measure(variants)
    flops = eager_flops()
    content: dict[str, Any] = {
        "machine": machine(),
        "what": "aspirin, float32, 1 thread, velocity Verlet through ASE",
        "timed_steps": BLOCK * BLOCKS,
        "results": results,
        "matrix_products_of_one_eager_step_gflop": round(flops / 1e9, 3),
        "floor_of_the_eager_step": floor(flops),
    }
    for network, steps in results.items():
        ours = steps["ffpretrain"]["ms"]
        for name, found in steps.items():
            line = found.get("failed")
            if line is None:
                found["times_ours"] = round(found["ms"] / ours, 2)
                line = f"{found['ms']:.2f} ms per step, {found['times_ours']:.2f} times ours"
            print(f"{network}, {name}: {line}")
    write("speed_md_step", content, started, options.out)


if __name__ == "__main__":
    main()
