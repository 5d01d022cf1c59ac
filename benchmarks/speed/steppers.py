"""Training steps to compare: ours, TorchMD-Net's and SchNetPack's, same weights and batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from shared import ET, schnetpack_painn, torchmd_net_checkpoint
from torch import Tensor

from ffpretrain.backbones.base import Features
from ffpretrain.graphs import Sample
from ffpretrain.heads import EnergyHead
from ffpretrain.objectives.supervised import Supervised
from ffpretrain.potential import Potential

ENERGY_WEIGHT, FORCES_WEIGHT, RATE = 0.05, 1.0, 1e-5
FRAMES = 256
CPU = torch.device("cpu")
#: takes the step of that number and returns its loss
Step = Callable[[int], Tensor]


class Compared(NamedTuple):
    """A network of ours and its peer's step.

    Attributes:
        peer: its name.
        make_step: makes the peer's step on batches of a size, on a device.
        potential: makes ours with the same weights; with the peer's head, or asked for it, our own.
        own_head: whether that is another.
    """

    peer: str
    make_step: Callable[[list[Sample], int, torch.device], Step]
    potential: Callable[[bool], Potential]
    own_head: bool


class ScalarHead(EnergyHead):
    """SchNetPack's head: a perceptron on the scalars, whatever vectors there are."""

    def forward(self, features: Features) -> Tensor:
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


def batch_of(data: list[Any], size: int, k: int) -> list[Any]:
    return [data[(k * size + i) % len(data)] for i in range(size)]


def supervised(potential: Potential) -> Supervised:
    potential.train()
    return Supervised(potential, ENERGY_WEIGHT, FORCES_WEIGHT, energy_loss="mse", forces_loss="mse")


def ours(potential: Potential, data: list[Sample], size: int, kind: str, device: torch.device = CPU) -> Step:
    """Return our step: ``eager``, with ``native`` messages, or with ``compiled`` functions."""
    from ffpretrain.training.data import collate

    objective = supervised(potential.to(device))
    if kind == "compiled":
        objective.train().accelerate()
    elif kind == "native":
        potential.backbone.use_native_messages()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=RATE, foreach=True)
    generator = torch.Generator()

    def step(k: int) -> Tensor:
        loss = objective(collate(batch_of(data, size, k)).to(device), generator)["loss"]
        return stepped(loss, optimizer)

    return step


def stepped(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def torchmd_net(content: dict[str, Any], data: list[Sample], size: int, device: torch.device) -> Step:
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
    module.to(device)
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

    def step(k: int) -> Tensor:
        batch = Batch.from_data_list(batch_of(frames, size, k)).to(device)
        return stepped(module.training_step(batch, k), optimizer)

    return step


def schnetpack(model: torch.nn.Module, data: list[Sample], size: int, device: torch.device) -> Step:
    from schnetpack.data.loader import _atoms_collate_fn
    from schnetpack.task import AtomisticTask, ModelOutput

    outputs = [
        ModelOutput("energy", torch.nn.MSELoss(), ENERGY_WEIGHT, metrics={}),
        # as above, the mean over components
        ModelOutput("forces", torch.nn.MSELoss(), 3 * FORCES_WEIGHT, metrics={}),
    ]
    task = AtomisticTask(model, outputs, torch.optim.AdamW, {"lr": RATE, "foreach": True}).train().to(device)
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

    def step(k: int) -> Tensor:
        batch = _atoms_collate_fn(batch_of(frames, size, k))
        batch = {name: value.to(device) for name, value in batch.items()}
        return stepped(task.training_step(batch, k), optimizer)

    return step


def compared_et() -> Compared:
    from ffpretrain.backbones.torchmd_et import from_torchmd_net

    with tempfile.TemporaryDirectory() as temporary:
        content = torchmd_net_checkpoint(Path(temporary) / "et.ckpt")
    return Compared(
        "torchmd-net",
        lambda data, size, device: torchmd_net(content, data, size, device),
        lambda own_head: from_torchmd_net(content["state_dict"], content["hyper_parameters"]),
        own_head=False,
    )


def compared_painn() -> Compared:
    from ffpretrain.backbones.painn import from_schnetpack

    model = schnetpack_painn()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    representation = {key: value for key, value in state.items() if key.startswith("representation.")}

    def potential(own_head: bool) -> Potential:
        torch.manual_seed(0)
        made = Potential(from_schnetpack(representation))
        if not own_head:
            head = ScalarHead(made.backbone.n_features, has_vectors=False)
            for layer, name in ((head.first, "outnet.0"), (head.second, "outnet.1")):
                layer.load_state_dict(
                    {part: state[f"output_modules.0.{name}.{part}"] for part in ("weight", "bias")}
                )
            made.head = head
        return made

    return Compared(
        "schnetpack",
        lambda data, size, device: schnetpack(model, data, size, device),
        potential,
        own_head=True,
    )


#: network to its comparison and its size
NETWORKS = {"torchmd-et": (compared_et, "6x128"), "painn": (compared_painn, "3x128")}
#: network to the peer's package
PACKAGES = {"torchmd-et": "torchmdnet", "painn": "schnetpack"}
