"""Training steps per second of the ndem-aspirin recipe (forward, forces, backward, optimiser), one thread.

Plain steps, steps with native messages, and with ``--compiled`` those of a compiled graph, take turns in one
process on the same batches; the trainer around them is left out.
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


def stepper(run: Run, kind: str):
    objective = run.module.objective.train()
    if kind == "compiled":
        objective.accelerate()
    elif kind == "native":
        objective.network.backbone.use_native_messages()
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
    args.add_argument("--compiled", action="store_true", help="a compiled graph too: minutes to build")
    options = args.parse_args()
    kinds = ["eager", "native", *(["compiled"] if options.compiled else [])]
    torch.set_num_threads(1)
    started, content = time.perf_counter(), {"machine": machine(), "unit": "steps/s", "results": {}}
    changes = {"data.options.root": str(options.data), "data.options.split": 1}
    recipe = load_recipe("ndem-aspirin", changes)
    steps = {kind: stepper(prepare(recipe), kind) for kind in kinds}
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
    content["times_eager"] = {
        kind: round(content["results"][kind] / content["results"]["eager"], 2) for kind in kinds[1:]
    }
    write("training_steps", content, started, options.out)


if __name__ == "__main__":
    main()
