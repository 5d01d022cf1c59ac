"""Training steps per second of the ndem-aspirin recipe (forward, forces, backward, optimiser), one thread.

Eager and compiled steps take turns in one process on the same batches; the trainer around them is left out.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from common import machine, parser, write

from ffpretrain.recipes import load_recipe
from ffpretrain.training.data import SampleDataset, StreamSampler, collate
from ffpretrain.training.run import Run, prepare

BLOCK, BLOCKS = 10, 5


def stepper(run: Run, compiled: bool):
    objective = run.module.objective.train()
    if compiled:
        objective.accelerate()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-6, foreach=True)
    data = SampleDataset(run.dataset[run.splits.train], objective.network.cutoff, ("energy", "forces"))
    sampler = StreamSampler(len(data), run.recipe.trainer.batch_size, 0)

    def step(k: int) -> None:
        batch = collate([data[i] for i in sampler.batch(k)])
        terms = objective(batch, torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()

    return step


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    args.add_argument("--eager-only", action="store_true", help="leave out what a compiler must build first")
    options = args.parse_args()
    kinds = ("eager",) if options.eager_only else ("eager", "compiled")
    torch.set_num_threads(1)
    started, content = time.perf_counter(), {"machine": machine(), "unit": "steps/s", "results": {}}
    changes = {"data.options.root": str(options.data), "data.options.split": 1}
    recipe = load_recipe("ndem-aspirin", changes)
    steps = {kind: stepper(prepare(recipe), kind == "compiled") for kind in kinds}
    for step in steps.values():
        for k in range(4):
            step(k)
    blocks: dict[str, list[float]] = {kind: [] for kind in steps}
    for block in range(BLOCKS):
        for kind, step in steps.items():
            begun = time.perf_counter()
            for k in range(block * BLOCK, (block + 1) * BLOCK):
                step(k)
            blocks[kind].append(BLOCK / (time.perf_counter() - begun))
    for kind, values in blocks.items():
        content["results"][kind] = round(statistics.median(values), 2)
        print(f"{kind}: {content['results'][kind]:.2f} steps/s of {recipe.trainer.batch_size} aspirins")
    content["batch_size"] = recipe.trainer.batch_size
    if len(kinds) == 2:
        content["ratio"] = round(content["results"]["compiled"] / content["results"]["eager"], 2)
    write("training_steps", content, started, options.out)


if __name__ == "__main__":
    main()
