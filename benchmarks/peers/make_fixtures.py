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
    record_painn(folder / "painn.safetensors", shared_filters=False)
    record_painn(folder / "painn_shared_filters.safetensors", shared_filters=True)


if __name__ == "__main__":
    main()
