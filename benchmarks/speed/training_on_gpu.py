"""Training steps with forces on a CUDA device, ours against TorchMD-Net's or SchNetPack's, same weights.

As training.py, with our whole step recorded as a CUDA graph (forward, forces, backward, clipping, AdamW,
weight average) beside ours and theirs taken one by one, which neither clip nor average. Times are of blocks
of ten steps between two synchronisations, batches prepared on the host included; the median over blocks
counts. The floor is that of the recorded step: its matrix products at the device's measured rate, and its
kernels' launches within a replay. The kernels that take longest tell what the rest is spent on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import machine, need, parser, stop, write
from shared import counted_flops
from speed import peer_pairs
from speed.kernels import DEVICE, alternate, device_rates, kernels_of, replay_cost
from steppers import NETWORKS, PACKAGES, RATE, Compared, Step, batch_of, ours, samples, supervised

from ffpretrain.graphs import Sample
from ffpretrain.potential import Potential
from ffpretrain.training.recorded import RecordedSteps, set_form

SIZES, BLOCK, BLOCKS = (8, 128), 10, 8
CLIP, DECAY = 10.0, 0.999
TOP = 12
#: takes the steps of those numbers, from the first to before the second, and returns the mean or last loss
Steps = Callable[[int, int], float]


def one_by_one(step: Step) -> Steps:
    def run(first: int, end: int) -> float:
        losses = [step(k) for k in range(first, end)]
        return float(losses[-1])

    return run


def recorded(
    potential: Potential, data: list[Sample], size: int, device: torch.device, block: int = BLOCK
) -> Steps:
    objective = supervised(potential.to(device))
    objective.train().accelerate()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=RATE)
    set_form(optimizer, recorded=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = [p.detach().clone() for p in objective.parameters()]
    steps = RecordedSteps(objective, optimizer, data, size, block, CLIP, average, DECAY)  # type: ignore[arg-type]
    places = list(range(len(data)))

    def run(first: int, end: int) -> float:
        picks = torch.tensor([batch_of(places, size, k) for k in range(first, end)])
        done = steps.run(picks, first, lambda k: torch.Generator().manual_seed(k), rate, first == 0)
        return float(done.terms["loss"])

    return run


def makers(compared: Compared, data: list[Sample], size: int) -> dict[str, Callable[[], Steps]]:
    return {
        compared.peer: lambda: one_by_one(compared.make_step(data, size, DEVICE)),
        "step by step": lambda: one_by_one(ours(compared.potential(False), data, size, "eager", DEVICE)),
        "recorded": lambda: recorded(compared.potential(False), data, size, DEVICE),
    }


def measure(compared: Compared, data: list[Sample], size: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    runs: dict[str, Steps] = {}
    for name, make in makers(compared, data, size).items():
        started = time.perf_counter()
        try:
            run = make()
            rows[name] = {"first_loss": run(0, 1)}
            run(1, 1 + BLOCK)
        except Exception as error:  # a peer may fail in any way; the reason is the result then
            if name != compared.peer:
                raise
            rows[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        runs[name] = run
        rows[name]["ready_s"] = round(time.perf_counter() - started, 1)
    blocks = {name: (lambda run=run: run(1, 1 + BLOCK)) for name, run in runs.items()}
    times = alternate(blocks, 1, BLOCKS)  # type: ignore[arg-type]
    for name, ms in times.items():
        rows[name]["ms"] = round(ms / BLOCK, 4)
        if compared.peer in times:
            rows[name]["times_peer"] = round(times[compared.peer] / ms, 2)
    rows["recorded"] |= explained(compared, data, size, blocks["recorded"], rows["recorded"]["ms"])
    return rows


def explained(
    compared: Compared, data: list[Sample], size: int, block: Callable[[], object], ms: float
) -> dict[str, Any]:
    """Return the floor of a recorded step, the fraction of it that is reached, and its longest kernels."""
    step = ours(compared.potential(False), data, size, "eager", DEVICE)
    flops, (rate, _), one = counted_flops(lambda: step(0)), device_rates(), replay_cost(1)
    found = kernels_of(block)
    launch = (replay_cost(1001) - one) / 1000
    arithmetic, launches = flops / rate * 1e3, (one + len(found) / BLOCK * launch) * 1e3
    grouped: dict[str, float] = {}
    for name, us in found:
        grouped[name] = grouped.get(name, 0.0) + us / BLOCK
    top = sorted(grouped.items(), key=lambda item: -item[1])[:TOP]
    return {
        "gflop": round(flops / 1e9, 3),
        "arithmetic_ms": round(arithmetic, 4),
        "kernels": round(len(found) / BLOCK, 1),
        "launches_ms": round(launches, 4),
        "busy_ms": round(sum(grouped.values()) / 1e3, 4),
        "fraction": round((arithmetic + launches) / ms, 3),
        "longest_kernels_us": {name[:90]: round(us, 1) for name, us in top},
    }


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--network", nargs="+", default=["torchmd-et"], choices=list(NETWORKS))
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    args.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    options = args.parse_args()
    if not torch.cuda.is_available():
        stop("torch finds no CUDA device here; training.py measures a CPU")
    need(*(PACKAGES[network] for network in options.network))
    # without warp TorchMD-Net still gives the weights; its own step on a batch then fails, and says so
    peer_pairs.install()
    warnings.simplefilter("ignore")
    started, data, results = time.perf_counter(), samples(options.data), {}
    for network in options.network:
        make, shape = NETWORKS[network]
        for size in options.sizes:
            rows = measure(make(), data, size)
            results.setdefault(f"{network} {shape}", {})[f"batch {size}"] = rows
            for name, row in rows.items():
                shown = {k: v for k, v in row.items() if k != "longest_kernels_us"}
                print(f"{network}, batch {size}, {name}: {shown}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    content = {"machine": machine(), "what": "aspirin, float32, TF32 off", "results": results}
    write("speed_training_on_gpu", content, started, options.out)


if __name__ == "__main__":
    main()
