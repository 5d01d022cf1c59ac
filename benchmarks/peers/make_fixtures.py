"""Record what TorchMD-Net's equivariant transformer and SchNetPack's PaiNN compute, for tests/ffpretrain.

Run it in an environment made from requirements.txt beside it (that file says how); ffpretrain is not needed:

    python benchmarks/peers/make_fixtures.py tests/ffpretrain/data

Each .safetensors file holds ``weights.*``, the structures (``z``, ``pos``, ``batch``) and ``out.*``; its
metadata holds, as JSON, hyper-parameters and versions. Weights are drawn from fixed seeds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import typing
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CUTOFF = 4.0
ET_HPARAMS = {
    "model": "equivariant-transformer",
    "embedding_dimension": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_rbf": 8,
    "rbf_type": "expnorm",
    "trainable_rbf": True,
    "activation": "silu",
    "attn_activation": "silu",
    "distance_influence": "both",
    "neighbor_embedding": True,
    "cutoff_lower": 0.0,
    "cutoff_upper": CUTOFF,
    "max_z": 10,
    # TorchMD-Net fails when an atom has more neighbours than this
    "max_num_neighbors": 64,
    "atom_filter": -1,
    "prior_model": None,
    "output_model": "Scalar",
    "reduce_op": "add",
    "derivative": True,
    "precision": 64,
}

#: what TorchMD-Net's training script would add
TRAINING = {
    "vector_cutoff": True,
    "load_model": None,
    "remove_ref_energy": False,
    "dataset": "Custom",
    "lr": 1e-3,
    "lr_factor": 0.8,
    "lr_patience": 10,
    "lr_min": 1e-7,
    "lr_metric": "val",
    "lr_warmup_steps": 0,
    "weight_decay": 0.0,
    "ema_alpha_y": 1.0,
    "ema_alpha_neg_dy": 1.0,
    "y_weight": 1.0,
    "neg_dy_weight": 1.0,
    "test_interval": 10,
}


def structures() -> dict[str, Tensor]:
    """Return a batch of four: planar, with an atom just inside the cutoff, one outside it, and a diatomic.

    Coordinates are rough: what counts is the geometry that the networks see.
    """
    formaldehyde = [[0.0, 0.0, 0.0], [1.2, 0.0, 0.0], [-0.6, 0.94, 0.0], [-0.6, -0.94, 0.0]]
    water_near_fluorine = [
        [0.0, 0.0, 0.1],
        [0.76, 0.1, -0.48],
        [-0.75, 0.05, -0.47],
        [0.0, CUTOFF - 0.02, 0.1],
    ]
    ammonia_and_far_atom = [
        [0.0, 0.0, 0.12],
        [0.94, 0.0, -0.27],
        [-0.47, 0.81, -0.27],
        [-0.45, -0.83, -0.29],
        [0.3, 0.2, CUTOFF + 0.13],
    ]
    molecules = [
        ([6, 8, 1, 1], formaldehyde),
        ([8, 1, 1, 9], water_near_fluorine),
        ([7, 1, 1, 1, 8], ammonia_and_far_atom),
        ([6, 8], [[0.1, 0.2, 0.3], [0.9, 0.7, 0.8]]),
    ]
    return {
        "z": torch.tensor([z for numbers, _ in molecules for z in numbers]),
        "pos": torch.tensor([xyz for _, rows in molecules for xyz in rows], dtype=torch.float64),
        "batch": torch.tensor([i for i, (numbers, _) in enumerate(molecules) for _ in numbers]),
    }


def randomize(model: nn.Module, seed: int) -> None:
    """Move every parameter off its initial value: biases start at zero and would hide a wrong order.

    The values are rounded to float32, so that a fixture of half the size holds them exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (parameter.data + 0.1 * noise).float().to(parameter.dtype)


def record_et(path: Path, vector_cutoff: bool, mean: float | None, std: float | None) -> None:
    """Write energies, forces and features of an equivariant transformer."""
    from torchmdnet.models.model import create_model

    torch.manual_seed(0)
    hparams = {**ET_HPARAMS, "vector_cutoff": vector_cutoff}
    model = create_model(
        dict(hparams),
        mean=None if mean is None else torch.tensor(mean, dtype=torch.float64),
        std=None if std is None else torch.tensor(std, dtype=torch.float64),
    )
    randomize(model, seed=1)
    inputs = structures()
    scalars, vectors, *_ = model.representation_model(**{k: v.clone() for k, v in inputs.items()})
    energy, forces = model(**{k: v.clone() for k, v in inputs.items()})
    outputs = {"scalars": scalars, "vectors": vectors, "energy": energy.flatten(), "forces": forces}
    write(path, model.state_dict(), inputs, outputs, hparams, "torchmd-net")


def record_denoiser(path: Path) -> None:
    """Write the noise that a head of gated blocks predicts, in the layout of "pre-training via denoising".

    That code adds to TorchMD-Net a second output model, which here is TorchMD-Net's own vector output, and
    running sums over the noise seen, here over one draw.
    """
    from torchmdnet.models.model import create_model
    from torchmdnet.models.output_modules import EquivariantVectorOutput

    torch.manual_seed(0)
    hparams: dict[str, object] = {**ET_HPARAMS, "vector_cutoff": False, "derivative": False}
    model = create_model(dict(hparams))
    head = EquivariantVectorOutput(16, activation="silu", dtype=torch.float64)
    randomize(model, seed=3)
    randomize(head, seed=4)
    noise = 0.04 * torch.randn(5000, 3, generator=torch.Generator().manual_seed(5)).double() + 1e-4
    sums = {
        "acc_sum": noise.sum(0),
        "acc_squared_sum": noise.square().sum(0),
        "acc_count": torch.tensor([float(len(noise))]),
        "num_accumulations": torch.tensor([1.0]),
    }
    inputs = structures()
    x, v, z, pos, batch = model.representation_model(**{k: value.clone() for k, value in inputs.items()})
    outputs = {"noise": head.pre_reduce(x, v, z, pos, batch).squeeze(-1)}
    weights = {
        **model.state_dict(),
        **{f"output_model_noise.{key}": value for key, value in head.state_dict().items()},
        **{f"pos_normalizer.{key}": value.float().double() for key, value in sums.items()},
    }
    pretraining = {
        "output_model_noise": "VectorOutput",
        "position_noise_scale": 0.04,
        "denoising_weight": 1.0,
    }
    labels = {"denoising_only": True, "energy_weight": 0.0, "force_weight": 1.0, "dataset": "PCQM4MV2"}
    write(path, weights, inputs, outputs, {**hparams, **pretraining, **labels}, "torchmd-net")


def record_checkpoint(path: Path) -> None:
    """Train TorchMD-Net's own Lightning module for two steps; write its checkpoint and what it computes."""
    import lightning.pytorch as pl
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torchmdnet.module import LNNP

    inputs, generator = structures(), torch.Generator().manual_seed(6)
    data = [
        Data(
            z=inputs["z"][inputs["batch"] == b],
            pos=inputs["pos"][inputs["batch"] == b].float(),
            y=torch.randn(1, 1, generator=generator),
            neg_dy=torch.randn(int((inputs["batch"] == b).sum()), 3, generator=generator),
        )
        for b in range(4)
    ]
    torch.manual_seed(0)
    module = LNNP({**ET_HPARAMS, **TRAINING, "embedding_dimension": 8, "num_layers": 2, "precision": 32})
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pl.callbacks.EarlyStopping("val_total_mse_loss", strict=False)],
    )
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    trainer.save_checkpoint(path)
    energy, forces = module.model.double()(**{k: v.clone() for k, v in inputs.items()})
    outputs = {"energy": energy.flatten(), "forces": forces}
    write(path.with_suffix(".safetensors"), {}, inputs, outputs, {}, "torchmd-net")


def record_painn(path: Path, shared_filters: bool) -> None:
    """Write the representation of a PaiNN and the gradient of a sum over it."""
    # SchNetPack 2.1 imports a private name that torch has renamed since; only its data loader uses it
    import torch.utils.data.dataloader as loader

    if not hasattr(loader, "T_co"):
        loader.T_co = typing.TypeVar("T_co", covariant=True)
    import schnetpack.nn
    import schnetpack.representation

    torch.manual_seed(0)
    hparams = {"n_atom_basis": 16, "n_interactions": 3, "n_rbf": 8, "cutoff": CUTOFF, "epsilon": 1e-8}
    model = schnetpack.representation.PaiNN(
        n_atom_basis=16,
        n_interactions=3,
        radial_basis=schnetpack.nn.GaussianRBF(n_rbf=8, cutoff=CUTOFF),
        cutoff_fn=schnetpack.nn.CosineCutoff(CUTOFF),
        shared_filters=shared_filters,
        nuclear_embedding=nn.Embedding(10, 16),
    ).double()
    randomize(model, seed=2)
    inputs = structures()
    pos = inputs["pos"].clone().requires_grad_(True)
    delta = pos[None] - pos[:, None]
    near = (delta.norm(dim=-1) < CUTOFF) & (inputs["batch"][None] == inputs["batch"][:, None])
    center, neighbor = (near & ~torch.eye(len(pos), dtype=torch.bool)).nonzero(as_tuple=True)
    batch = {
        "_atomic_numbers": inputs["z"],
        "_Rij": pos[neighbor] - pos[center],
        "_idx_i": center,
        "_idx_j": neighbor,
    }
    out = model(batch)
    scalars, vectors = out["scalar_representation"], out["vector_representation"]
    gradient = torch.autograd.grad(scalars.sum() + vectors.square().sum(), pos)[0]
    outputs = {"scalars": scalars, "vectors": vectors, "gradient": gradient}
    write(
        path,
        model.state_dict(),
        inputs,
        outputs,
        {**hparams, "shared_filters": shared_filters},
        "schnetpack",
    )


def write(
    path: Path,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    hparams: dict[str, object],
    package: str,
) -> None:
    """Write one fixture."""
    tensors = {f"weights.{key}": value.float() for key, value in weights.items()}
    if any(not torch.equal(value, tensors[f"weights.{key}"].to(value)) for key, value in weights.items()):
        raise ValueError(f"{path}: a weight is not exact in float32")
    tensors |= {f"out.{key}": value for key, value in outputs.items()}
    versions = {name: importlib.metadata.version(name) for name in (package, "torch")}
    # one entry only: safetensors writes several in random order, and the file should be the same every time
    metadata = {"fixture": json.dumps({"hparams": hparams, "versions": versions})}
    tensors = {key: value.detach().clone().contiguous() for key, value in {**tensors, **inputs}.items()}
    save_file(tensors, path, metadata=metadata)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


def main() -> None:
    """Write all fixtures into the folder given on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    record_et(folder / "et_vector_cutoff.safetensors", True, mean=None, std=None)
    record_et(folder / "et_published.safetensors", False, mean=-406757.625, std=12.375)
    record_denoiser(folder / "et_denoiser.safetensors")
    record_checkpoint(folder / "et_lightning.ckpt")
    record_painn(folder / "painn.safetensors", shared_filters=False)
    record_painn(folder / "painn_shared_filters.safetensors", shared_filters=True)


if __name__ == "__main__":
    main()
