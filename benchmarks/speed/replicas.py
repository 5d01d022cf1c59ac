"""Atoms per second of many aspirins in one batch on a CPU, ours against TorchMD-Net and SchNetPack.

One thread unless OMP_NUM_THREADS says otherwise, float32, positions that change between calls, search for
neighbours included. Ours is what TorchMD calls, `External.calculate`, and what our own dynamics of replicas
calls; TorchMD-Net's is its `External`, SchNetPack's its network on a batch from its own converter, which
searches with matscipy. Freed memory is kept for the next call, as suits the peers; with ``--fresh-memory`` it
is given back to the system, as glibc does unless told otherwise. The variants take turns in one process; the
median counts.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, need, parser, write
from shared import aspirin, eager_floor, keep_memory, schnetpack_painn, torchmd_net_checkpoint

from ffpretrain.potential import Potential

SIZES, BLOCKS = (1, 8, 64, 256), 5
#: above this a peer's one batch takes gigabytes
PEERS_UP_TO = 256
#: calls a block: enough of them that a block of one replica is not one tick of the clock
CALLS = 16
#: positions [replicas, atoms, 3] in Å to forces of the same shape in the network's unit
Forces = Callable[[torch.Tensor], torch.Tensor]


def ours(potential: Potential, count: int) -> dict[str, Callable[[], Forces]]:
    from ffpretrain import units
    from ffpretrain.md.replicas import Replicas
    from ffpretrain.md.runtime import Runtime
    from ffpretrain.md.torchmd import External

    numbers = torch.tensor(aspirin().numbers).repeat(count, 1)
    box = torch.zeros(count, 3, 3, dtype=torch.float64)

    def external(compiled: bool) -> Forces:
        made = External(
            potential, numbers, "cpu", compile="auto" if compiled else False, on_unfamiliar="ignore"
        )
        return lambda pos: made.calculate(pos, box)[1] * units.KCAL_PER_MOL

    def replicas() -> Forces:
        runtime = Runtime(potential, "cpu", "float32", "auto")
        made = Replicas(runtime, aspirin().numbers, aspirin().positions, count)
        return lambda pos: made(pos)[1]

    return {
        "ffpretrain External": lambda: external(True),
        "ffpretrain Replicas": replicas,
        "ffpretrain External eager": lambda: external(False),
    }


def torchmd_net(path: Path, count: int) -> Forces:
    from torchmdnet.calculators import External

    embeddings = torch.tensor(aspirin().numbers).repeat(count, 1)
    made = External(str(path), embeddings, "cpu")
    return lambda pos: made.calculate(pos)[1]


def schnetpack(count: int) -> Forces:
    model = schnetpack_painn().eval()
    import schnetpack as spk
    from schnetpack.interfaces import AtomsConverter

    convert = AtomsConverter(spk.transform.MatScipyNeighborList(cutoff=5.0), device="cpu")
    structures = [aspirin() for _ in range(count)]

    def forces(pos: torch.Tensor) -> torch.Tensor:
        for one, positions in zip(structures, pos.numpy(), strict=True):
            one.positions[:] = positions
        return model(convert(structures))["forces"].detach().view(pos.shape)

    return forces


def measure(makers: dict[str, Callable[[], Forces]], count: int) -> dict[str, Any]:
    made, result = {}, {}
    rest, rng = torch.tensor(aspirin().positions), torch.Generator().manual_seed(0)

    def positions() -> torch.Tensor:
        return rest + 0.02 * torch.randn(count, *rest.shape, generator=rng, dtype=torch.float64)

    first, forces = positions(), {}
    for name, make in makers.items():
        try:
            made[name] = make()
            forces[name] = made[name](first).double().numpy()
        except Exception as error:  # a peer may fail in any way; the reason is the result then
            result[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    times: dict[str, list[float]] = {name: [] for name in made}
    calls = max(1, CALLS // count)
    for _ in range(BLOCKS if count < 100 else 3):
        moved = [positions() for _ in range(calls)]
        for name, function in made.items():
            started = time.perf_counter()
            for pos in moved:
                function(pos)
            times[name].append((time.perf_counter() - started) / calls)
    reference = forces["ffpretrain External"]
    for name, values in times.items():
        seconds = statistics.median(values)
        result[name] = {
            "atoms_per_s": round(count * len(rest) / seconds),
            "us_per_atom": round(seconds / count / len(rest) * 1e6, 2),
            "force_difference": float(np.abs(forces[name] - reference).max()),
        }
    gc.collect()
    return result


def report(network: str, count: int, rows: dict[str, Any]) -> None:
    best = rows["ffpretrain External"]["atoms_per_s"]
    for name, row in rows.items():
        line = row.get("failed")
        if line is None:
            row["ours_times"] = round(best / row["atoms_per_s"], 2)
            line = f"{row['atoms_per_s']} atoms/s, ours is {row['ours_times']:.2f} times as fast"
        print(f"{network}, {count} replicas, {name}: {line}", flush=True)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    args.add_argument("--fresh-memory", action="store_true", help="give freed memory back to the system")
    options = args.parse_args()
    need("torchmdnet", "schnetpack")
    kept = not options.fresh_memory and keep_memory()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.simplefilter("ignore")
    from ffpretrain.backbones.painn import from_schnetpack
    from ffpretrain.backbones.torchmd_et import from_torchmd_net

    started, results, least = time.perf_counter(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "et.ckpt"
        content = torchmd_net_checkpoint(path)
        et = from_torchmd_net(content["state_dict"], content["hyper_parameters"])
        painn = Potential(from_schnetpack(schnetpack_painn().representation.state_dict())).eval()
        for network, potential in (("torchmd-et 6x128", et), ("painn 3x128", painn)):
            least[network] = eager_floor(potential, aspirin())
            results[network] = {}
            for count in options.sizes:
                makers = ours(potential, count)
                if count <= PEERS_UP_TO and potential is et:
                    makers["torchmd-net External"] = lambda count=count: torchmd_net(path, count)
                elif count <= PEERS_UP_TO:
                    makers["schnetpack"] = lambda count=count: schnetpack(count)
                if count > PEERS_UP_TO:
                    del makers["ffpretrain External eager"]
                results[network][str(count)] = rows = measure(makers, count)
                report(network, count, rows)
    content = {
        "machine": machine(),
        "what": "aspirin, float32",
        "threads": torch.get_num_threads(),
        "memory_kept": kept,
        "results": results,
        "floor_of_one_eager_replica": least,
    }
    write("speed_replicas", content, started, options.out)


if __name__ == "__main__":
    main()
