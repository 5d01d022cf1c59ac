"""Training steps with forces on a CPU, ours against TorchMD-Net's own, same weights, data and loss.

The equivariant transformer 6x128 on rMD17 aspirin, squared errors of energies and forces, AdamW: from the
frames in memory to the updated weights, collation and neighbour search included. Ours runs plainly, with
native messages, as ``ffpretrain train`` does, and with ``--compiled`` as a compiled graph too; TorchMD-Net's
is the step of its Lightning module. They take turns in blocks in one process; the median over blocks counts,
and the first losses, at the same weights, must agree. Each number of threads has a process of its own, since
compiled code keeps the number it was built with.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, parser, write
from shared import ET, counted_flops, floor, torchmd_net_checkpoint

from ffpretrain.graphs import Sample

ENERGY_WEIGHT, FORCES_WEIGHT, RATE = 0.05, 1.0, 1e-5
#: batch size to steps a block and blocks
SIZES = {8: (6, 5), 128: (1, 4)}
FRAMES = 256
Step = Callable[[int], float]


def samples(folder: Path) -> list[Sample]:
    """Return aspirins with energies relative to their mean, as any training sees them."""
    from ffpretrain.datasets import open_dataset
    from ffpretrain.training.data import SampleDataset

    frames = open_dataset("rmd17", "aspirin", root=folder, split=1)
    data = SampleDataset(frames[:FRAMES], ET["cutoff_upper"], ("energy", "forces"))
    mean = torch.cat([data[i].targets["energy"] for i in range(len(data))]).mean()
    return [
        s._replace(targets={**s.targets, "energy": s.targets["energy"] - mean})
        for s in (data[i] for i in range(len(data)))
    ]


def batch_of(data: list[Sample], size: int, k: int) -> list[Sample]:
    return [data[(k * size + i) % len(data)] for i in range(size)]


def ours(content: dict[str, Any], data: list[Sample], size: int, kind: str) -> Step:
    from ffpretrain.backbones.torchmd_et import from_torchmd_net
    from ffpretrain.objectives.supervised import Supervised
    from ffpretrain.training.data import collate

    potential = from_torchmd_net(content["state_dict"], content["hyper_parameters"]).train()
    objective = Supervised(potential, ENERGY_WEIGHT, FORCES_WEIGHT, energy_loss="mse", forces_loss="mse")
    if kind == "compiled":
        objective.train().accelerate()
    elif kind == "native":
        potential.backbone.use_native_messages()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=RATE, foreach=True)
    generator = torch.Generator()

    def step(k: int) -> float:
        loss = objective(collate(batch_of(data, size, k)), generator)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def theirs(content: dict[str, Any], data: list[Sample], size: int) -> Step:
    from torch_geometric.data import Batch, Data
    from torchmdnet.module import LNNP

    options = {
        **ET,
        "load_model": None,
        "remove_ref_energy": False,
        "lr": RATE,
        "weight_decay": 0.01,
        "lr_factor": 0.8,
        "lr_patience": 10,
        "lr_min": 0.0,
        "ema_alpha_y": 1.0,
        "ema_alpha_neg_dy": 1.0,
        "y_weight": ENERGY_WEIGHT,
        # the mean of their loss is over components, that of ours over atoms
        "neg_dy_weight": 3 * FORCES_WEIGHT,
    }
    module = LNNP(options).train()
    module.load_state_dict(content["state_dict"])
    (optimizer,), _ = module.configure_optimizers()
    frames = [
        Data(
            z=s.graph.z,
            pos=s.graph.pos.float(),
            y=s.targets["energy"].float().unsqueeze(1),
            neg_dy=s.targets["forces"].float(),
        )
        for s in data
    ]

    def step(k: int) -> float:
        loss = module.training_step(Batch.from_data_list(batch_of(frames, size, k)), k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(folder: Path, size: int, threads: int, compiled: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    data = samples(folder)
    with tempfile.TemporaryDirectory() as temporary:
        content = torchmd_net_checkpoint(Path(temporary) / "et.ckpt")
    steps = {
        "torchmd-net": theirs(content, data, size),
        "eager": ours(content, data, size, "eager"),
        "native": ours(content, data, size, "native"),
    }
    if compiled:
        steps["compiled"] = ours(content, data, size, "compiled")
    rows: dict[str, Any] = {name: {} for name in steps}
    for name, step in steps.items():
        started = time.perf_counter()
        rows[name]["first_loss"] = step(0)
        rows[name]["first_step_s"] = round(time.perf_counter() - started, 2)
        step(1)
    block, blocks = SIZES[size]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(blocks):
        for name, step in steps.items():
            started = time.perf_counter()
            for k in range(2 + turn * block, 2 + (turn + 1) * block):
                step(k)
            times[name].append((time.perf_counter() - started) / block * 1e3)
    for name, values in times.items():
        rows[name]["ms"] = round(statistics.median(values), 2)
    for row in rows.values():
        row["times_torchmd_net"] = round(rows["torchmd-net"]["ms"] / row["ms"], 2)
    # native messages list each pair once, so that the products left to torch are fewer
    for name in ("eager", "native"):
        least = floor(counted_flops(lambda name=name: steps[name](0)))
        rows[name] |= {"floor": least, "fraction": round(least["floor_ms"] / rows[name]["ms"], 3)}
    return {"rows": rows}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    args.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    args.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args.add_argument("--one", action="store_true", help="a single size and number of threads, in here")
    args.add_argument("--compiled", action="store_true", help="a compiled graph too: minutes to build")
    options = args.parse_args()
    if options.one:
        print(json.dumps(measure(options.data, options.sizes[0], options.threads[0], options.compiled)))
        return
    started, results = time.perf_counter(), {}
    for threads in options.threads:
        for size in options.sizes:
            command = [sys.executable, __file__, "--one", "--data", str(options.data)]
            command += ["--sizes", str(size), "--threads", str(threads)]
            command += ["--compiled"] * options.compiled
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            name = f"batch {size}, {threads} thread{'s' * (threads > 1)}"
            results[name] = found = json.loads(done.stdout.splitlines()[-1])
            for kind, row in found["rows"].items():
                print(
                    f"{name}, {kind}: {row['ms']:.1f} ms per step, {row['times_torchmd_net']:.2f} times as "
                    f"fast as torchmd-net; first loss {row['first_loss']:.6f}",
                    flush=True,
                )
    content = {"machine": machine(), "what": "aspirin, torchmd-et 6x128, float32", "results": results}
    write("speed_training", content, started, options.out)


if __name__ == "__main__":
    main()
