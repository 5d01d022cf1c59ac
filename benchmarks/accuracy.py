"""Errors of the named models on all 1,000 frames of rMD17 test_01 (revised labels)."""

from __future__ import annotations

import time
from pathlib import Path

from common import machine, parser, write

from ffpretrain import load_potential
from ffpretrain.datasets import open_dataset
from ffpretrain.evaluation import error_table, predict

MODELS = {"ndem-aspirin": "aspirin", "ndem-ethanol": "ethanol"}


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    options = args.parse_args()
    started, content = time.perf_counter(), {"machine": machine(), "models": {}}
    for name, molecule in MODELS.items():
        frames = open_dataset("rmd17", molecule, root=options.data, split=1, part="test")
        table = error_table(predict(load_potential(name), frames))
        content["models"][name] = {
            "data": f"rMD17 {molecule}, test_01, {len(frames)} frames, revised labels",
            "errors": {key: quantity.model_dump() for key, quantity in table.items()},
        }
        print(
            f"{name}: forces {table['forces_kcal_mae'].value:.4f} kcal/mol/Å, "
            f"energy {table['energy_kcal_mae'].value:.4f} kcal/mol (MAE, {len(frames)} frames)"
        )
    write("accuracy", content, started, options.out)


if __name__ == "__main__":
    main()
