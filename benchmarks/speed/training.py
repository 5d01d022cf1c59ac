"""Training steps with forces on a CPU, ours against TorchMD-Net's or SchNetPack's, same weights and loss.

The equivariant transformer 6x128 (``--network torchmd-et``) or PaiNN 3x128 (``painn``) on rMD17 aspirin,
squared errors of energies and forces, AdamW: from the frames in memory to the updated weights, collation
included. TorchMD-Net searches for neighbours in every step; SchNetPack, with lists as its cache keeps
them, and ours do it once. Ours runs plainly, with native messages, as ``ffpretrain train`` does, and with
``--compiled`` as a compiled graph too; theirs is the step of their Lightning module. They take turns in
blocks in one process; the median over blocks counts, and the first losses, at the same weights, must agree.
SchNetPack's energy head is smaller than ours: ours uses that one too, except in the row "own head", whose
loss is another. Freed memory is kept for the next step, as suits the peers; with ``--fresh-memory`` it is
given back to the system, as glibc does unless told otherwise. Each number of threads has a process of its
own, since compiled code keeps the number it was built with.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, need, parser, write
from shared import counted_flops, floor, keep_memory
from steppers import CPU, NETWORKS, PACKAGES, ours, samples

#: batch size to steps a block and blocks
SIZES = {8: (6, 5), 128: (1, 4)}


def measure(network: str, folder: Path, size: int, threads: int, options: Namespace) -> dict[str, Any]:
    kept = not options.fresh_memory and keep_memory()
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    compared, data = NETWORKS[network][0](), samples(folder)
    steps = {compared.peer: compared.make_step(data, size, CPU)}
    for kind in ("eager", "native", *["compiled"] * options.compiled):
        steps[kind] = ours(compared.potential(False), data, size, kind)
    if compared.own_head:
        steps["native, own head"] = ours(compared.potential(True), data, size, "native")
    rows: dict[str, Any] = {name: {} for name in steps}
    for name, step in steps.items():
        started = time.perf_counter()
        rows[name]["first_loss"] = float(step(0))
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
        row["times_peer"] = round(rows[compared.peer]["ms"] / row["ms"], 2)
    # native messages list each pair once, so that the products left to torch are fewer
    for name in ("eager", "native"):
        least = floor(counted_flops(lambda name=name: steps[name](0)))
        rows[name] |= {"floor": least, "fraction": round(least["floor_ms"] / rows[name]["ms"], 3)}
    return {"peer": compared.peer, "memory_kept": kept, "rows": rows}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--network", nargs="+", default=["torchmd-et"], choices=list(NETWORKS))
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    args.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    args.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args.add_argument("--one", action="store_true", help="one network, size and number of threads, in here")
    args.add_argument("--compiled", action="store_true", help="a compiled graph too: minutes to build")
    args.add_argument("--fresh-memory", action="store_true", help="give freed memory back to the system")
    options = args.parse_args()
    if options.one:
        first = options.network[0], options.data, options.sizes[0], options.threads[0]
        print(json.dumps(measure(*first, options)))
        return
    need(*(PACKAGES[network] for network in options.network))
    started, results = time.perf_counter(), {}
    for network, threads, size in product(options.network, options.threads, options.sizes):
        command = [sys.executable, __file__, "--one", "--network", network, "--data", str(options.data)]
        command += ["--sizes", str(size), "--threads", str(threads)]
        command += ["--compiled"] * options.compiled + ["--fresh-memory"] * options.fresh_memory
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        name = f"batch {size}, {threads} thread{'s' * (threads > 1)}"
        found = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(f"{network} {NETWORKS[network][1]}", {})[name] = found
        report(network, name, found)
    content = {"machine": machine(), "what": "aspirin, float32", "results": results}
    write("speed_training", content, started, options.out)


def report(network: str, name: str, found: dict[str, Any]) -> None:
    for kind, row in found["rows"].items():
        print(
            f"{network}, {name}, {kind}: {row['ms']:.1f} ms per step, {row['times_peer']:.2f} times as fast "
            f"as {found['peer']}; first loss {row['first_loss']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
