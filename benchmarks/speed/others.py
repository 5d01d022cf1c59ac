"""Milliseconds per MD step of aspirin of MACE or NequIP, for the picture: other networks, random weights.

Their smallest comparable models, float32, one thread, velocity Verlet through ASE with their own calculator,
beside ours in the same process. Not the same function, so no ratio of quality: MACE 96x0e with two
interactions (as its small models) and NequIP with four layers of 32 features up to l=1 (its default). Each
needs an environment of its own (see benchmarks/README.md): give the one that is installed in this one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ase.calculators.calculator import Calculator

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine, need, parser, write
from shared import measure

from ffpretrain import FFCalculator
from ffpretrain.backbones import create_backbone
from ffpretrain.potential import Potential

CUTOFF, NEIGHBORS = 5.0, 14.5


def mace() -> Calculator:
    import numpy as np
    from mace import modules  # before e3nn 0.4.4, whose own tables newer versions of torch refuse to read
    from mace.calculators import MACECalculator

    from e3nn import o3  # isort: skip

    model = modules.ScaleShiftMACE(
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=3,
        hidden_irreps=o3.Irreps("96x0e"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(3),
        avg_num_neighbors=NEIGHBORS,
        atomic_numbers=[1, 6, 8],
        correlation=3,
        gate=torch.nn.functional.silu,
    )
    return MACECalculator(models=[model.float().eval()], device="cpu", default_dtype="float32")


def nequip() -> Calculator:
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    names = ["H", "C", "O"]
    model = NequIPGNNModel(
        seed=0,
        model_dtype="float32",
        r_max=CUTOFF,
        type_names=names,
        num_layers=4,
        l_max=1,
        num_features=32,
        avg_num_neighbors=NEIGHBORS,
    ).eval()
    transforms = [ChemicalSpeciesToAtomTypeMapper(names), NeighborListTransform(r_max=CUTOFF)]
    return NequIPCalculator(model, device="cpu", transforms=transforms)


PEERS: dict[str, tuple[str, Callable[[], Calculator]]] = {
    "mace": ("mace-torch", mace),
    "nequip": ("nequip", nequip),
}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("peer", choices=list(PEERS))
    options = args.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    package, make = PEERS[options.peer]
    need(options.peer)
    et = Potential(create_backbone("torchmd-et", hidden=128, layers=6, heads=8, rbf=32, cutoff=CUTOFF))
    painn = Potential(create_backbone("painn", hidden=128, layers=3, rbf=20, cutoff=CUTOFF))
    started = time.perf_counter()
    steps: dict[str, Any] = measure(
        {
            "ffpretrain": lambda: FFCalculator(et, on_unfamiliar="ignore"),
            "ffpretrain painn 3x128": lambda: FFCalculator(painn, on_unfamiliar="ignore"),
            options.peer: make,
        }
    )
    for name, found in steps.items():
        found.pop("force_difference", None)  # these are different functions
        line = found.get("failed") or f"{found['ms']:.2f} ms per step"
        print(f"{name}: {line}")
    content = {
        "machine": machine(),
        "what": "aspirin, float32, 1 thread, velocity Verlet through ASE",
        "version": f"{package} {version(package)}",
        "results": steps,
    }
    write(f"speed_{options.peer}", content, started, options.out)


if __name__ == "__main__":
    main()
