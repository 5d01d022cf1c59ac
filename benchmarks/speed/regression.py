"""Today's ratio of the fast path to the eager one in the same process, beside the recorded one.

A look, no test: a ratio in one process depends less than times do on how busy the machine is; on a shared one
it still moves by a tenth. One that has fallen by more says that something became slower. Aspirin, one thread,
random weights; the record is what benchmarks/speed/md_step.py wrote.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, machine, parser, write
from shared import measure

from ffpretrain import FFCalculator
from ffpretrain.backbones import create_backbone
from ffpretrain.potential import Potential

NETWORKS = {
    "torchmd-et 6x128": ("torchmd-et", {"hidden": 128, "layers": 6, "heads": 8, "rbf": 32}),
    "painn 3x128": ("painn", {"hidden": 128, "layers": 3, "rbf": 20}),
}
#: steps a block and blocks: enough for a ratio to two digits
BLOCK, BLOCKS = 20, 5


def ratio(network: str) -> float:
    backbone, sizes = NETWORKS[network]
    torch.manual_seed(0)
    potential = Potential(create_backbone(backbone, cutoff=5.0, **sizes)).eval()
    found = measure(
        {
            "ffpretrain": lambda: FFCalculator(potential, on_unfamiliar="ignore"),
            "ffpretrain eager": lambda: FFCalculator(potential, compile=False, on_unfamiliar="ignore"),
        },
        BLOCK,
        BLOCKS,
    )
    return found["ffpretrain eager"]["ms"] / found["ffpretrain"]["ms"]


def recorded(network: str) -> float | None:
    path = RESULTS / "speed_md_step.json"
    if not path.is_file():
        return None
    steps = json.loads(path.read_text())["results"].get(network, {})
    if not all("ms" in steps.get(name, {}) for name in ("ffpretrain", "ffpretrain eager")):
        return None
    return steps["ffpretrain eager"]["ms"] / steps["ffpretrain"]["ms"]


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started, results = time.perf_counter(), {}
    for network in NETWORKS:
        before, now = recorded(network), ratio(network)
        row: dict[str, Any] = {"now": round(now, 2), "recorded": None if before is None else round(before, 2)}
        results[network] = row
        print(f"{network}: the fast path is {row['now']} times as fast as eager; recorded {row['recorded']}")
    write("speed_regression", {"machine": machine(), "results": results}, started, options.out)


if __name__ == "__main__":
    main()
