"""Training steps with forces on a CPU, ours against TorchMD-Net's or SchNetPack's, same weights and loss.

The equivariant transformer 6x128 (``--network torchmd-et``) or PaiNN 3x128 (``painn``) on rMD17 aspirin,
squared errors of energies and forces, AdamW: from the frames in memory to the updated weights, collation
included. TorchMD-Net searches for neighbours in every step; SchNetPack, with lists as its cache keeps
them, and ours do it once. Ours runs plainly, with native messages, as ``ffpretrain train`` does, and with
``--compiled`` as a compiled graph too; theirs is the step of their Lightning module. They take turns in
blocks in one process; the median over blocks counts, and the first losses, at the same weights, must agree.
SchNetPack's energy head is smaller than ours: ours uses that one too, except in the row "own head", whose
loss is another. Each number of threads has a process of its own, since compiled code keeps the number it
was built with.
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
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, parser, write
from shared import ET, counted_flops, floor, schnetpack_painn, torchmd_net_checkpoint

from ffpretrain.backbones.base import Features
from ffpretrain.graphs import Sample
from ffpretrain.heads import EnergyHead
from ffpretrain.potential import Potential

ENERGY_WEIGHT, FORCES_WEIGHT, RATE = 0.05, 1.0, 1e-5
#: batch size to steps a block and blocks
SIZES = {8: (6, 5), 128: (1, 4)}
FRAMES = 256
#: network to the peer it is compared with, and its size
NETWORKS = {"torchmd-et": ("torchmd-net", "6x128"), "painn": ("schnetpack", "3x128")}
Step = Callable[[int], float]


class ScalarHead(EnergyHead):
    """SchNetPack's head: a perceptron on the scalars, whatever vectors there are."""

    def forward(self, features: Features) -> torch.Tensor:
        return super().forward(features._replace(vectors=None))


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


def trained(potential: Potential, data: list[Sample], size: int, kind: str) -> Step:
    from ffpretrain.objectives.supervised import Supervised
    from ffpretrain.training.data import collate

    potential.train()
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


def torchmd_net(content: dict[str, Any], data: list[Sample], size: int) -> Step:
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


def schnetpack(model: torch.nn.Module, data: list[Sample], size: int) -> Step:
    from schnetpack.data.loader import _atoms_collate_fn
    from schnetpack.task import AtomisticTask, ModelOutput

    outputs = [
        ModelOutput("energy", torch.nn.MSELoss(), ENERGY_WEIGHT, metrics={}),
        # as above, the mean over components
        ModelOutput("forces", torch.nn.MSELoss(), 3 * FORCES_WEIGHT, metrics={}),
    ]
    task = AtomisticTask(model, outputs, torch.optim.AdamW, {"lr": RATE, "foreach": True}).train()
    optimizer = task.configure_optimizers()
    frames = [
        {
            "_atomic_numbers": s.graph.z,
            "_positions": s.graph.pos.float(),
            "_n_atoms": torch.tensor([len(s.graph.z)]),
            "_idx_i": s.graph.edge_index[1],
            "_idx_j": s.graph.edge_index[0],
            "_offsets": s.graph.edge_shift.float(),
            "energy": s.targets["energy"].float(),
            "forces": s.targets["forces"].float(),
        }
        for s in data
    ]

    def step(k: int) -> float:
        loss = task.training_step(_atoms_collate_fn(batch_of(frames, size, k)), k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def et_steps(data: list[Sample], size: int, kinds: list[str]) -> dict[str, Step]:
    from ffpretrain.backbones.torchmd_et import from_torchmd_net

    with tempfile.TemporaryDirectory() as temporary:
        content = torchmd_net_checkpoint(Path(temporary) / "et.ckpt")
    steps = {"torchmd-net": torchmd_net(content, data, size)}
    for kind in kinds:
        potential = from_torchmd_net(content["state_dict"], content["hyper_parameters"])
        steps[kind] = trained(potential, data, size, kind)
    return steps


def painn_steps(data: list[Sample], size: int, kinds: list[str]) -> dict[str, Step]:
    from ffpretrain.backbones.painn import from_schnetpack

    model = schnetpack_painn()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    steps = {"schnetpack": schnetpack(model, data, size)}
    representation = {key: value for key, value in state.items() if key.startswith("representation.")}
    for kind in [*kinds, "native, own head"]:
        torch.manual_seed(0)
        potential = Potential(from_schnetpack(representation))
        if "own head" not in kind:
            head = ScalarHead(potential.backbone.n_features, has_vectors=False)
            for layer, name in ((head.first, "outnet.0"), (head.second, "outnet.1")):
                layer.load_state_dict(
                    {part: state[f"output_modules.0.{name}.{part}"] for part in ("weight", "bias")}
                )
            potential.head = head
        steps[kind] = trained(potential, data, size, kind.split(",")[0])
    return steps


def measure(network: str, folder: Path, size: int, threads: int, compiled: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    make, (peer, _) = {"torchmd-et": et_steps, "painn": painn_steps}[network], NETWORKS[network]
    steps = make(samples(folder), size, ["eager", "native", *["compiled"] * compiled])
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
        row[f"times_{peer.replace('-', '_')}"] = round(rows[peer]["ms"] / row["ms"], 2)
    # native messages list each pair once, so that the products left to torch are fewer
    for name in ("eager", "native"):
        least = floor(counted_flops(lambda name=name: steps[name](0)))
        rows[name] |= {"floor": least, "fraction": round(least["floor_ms"] / rows[name]["ms"], 3)}
    return {"rows": rows}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--network", nargs="+", default=["torchmd-et"], choices=list(NETWORKS))
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    args.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    args.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args.add_argument("--one", action="store_true", help="one network, size and number of threads, in here")
    args.add_argument("--compiled", action="store_true", help="a compiled graph too: minutes to build")
    options = args.parse_args()
    if options.one:
        first = options.network[0], options.data, options.sizes[0], options.threads[0], options.compiled
        print(json.dumps(measure(*first)))
        return
    started, results = time.perf_counter(), {}
    for network, threads, size in product(options.network, options.threads, options.sizes):
        command = [sys.executable, __file__, "--one", "--network", network, "--data", str(options.data)]
        command += ["--sizes", str(size), "--threads", str(threads)]
        command += ["--compiled"] * options.compiled
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        name = f"batch {size}, {threads} thread{'s' * (threads > 1)}"
        found = json.loads(done.stdout.splitlines()[-1])
        results.setdefault(f"{network} {NETWORKS[network][1]}", {})[name] = found
        report(network, name, found["rows"])
    content = {"machine": machine(), "what": "aspirin, float32", "results": results}
    write("speed_training", content, started, options.out)


def report(network: str, name: str, rows: dict[str, Any]) -> None:
    peer = NETWORKS[network][0]
    for kind, row in rows.items():
        times = rows[peer]["ms"] / row["ms"]
        print(
            f"{network}, {name}, {kind}: {row['ms']:.1f} ms per step, {times:.2f} times as fast as {peer}; "
            f"first loss {row['first_loss']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
