"""Every pretraining recipe, measured on molecules it never saw, beside what its loss is read against.

Trains one after the other on the recipe's own data, takes the best weights by validation and evaluates the
objective on the test split with fresh noise. Results of earlier recipes in the file are kept.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, parser, write

from ffpretrain.artifacts import read_card
from ffpretrain.objectives.floors import describe
from ffpretrain.recipes import list_recipes, load_recipe
from ffpretrain.training.checkpoints import read_checkpoint
from ffpretrain.training.data import SampleDataset
from ffpretrain.training.finish import load_weights
from ffpretrain.training.run import prepare, train
from ffpretrain.training.terms import mean_terms

#: seeds of the fresh noise; that of the recipes is 0
NOISE_SEEDS = (1001, 1002, 1003, 1004, 1005)


def measure(name: str, data: Path, folder: Path) -> dict[str, Any]:
    recipe = load_recipe(name)
    if recipe.data.source == "qm9":
        recipe = load_recipe(name, {"data.options.path": str(data / "qm9" / "qm9.npz")})
    begun, spent = time.perf_counter(), time.process_time()
    model = train(recipe, folder)
    wall, cpu = time.perf_counter() - begun, time.process_time() - spent
    run = prepare(recipe)
    load_weights(run, read_checkpoint(folder / "checkpoints" / "best.ckpt"), folder)
    objective = run.module.objective
    needs = ("energy", "forces") if objective.needs_labels else ()
    unseen = SampleDataset(run.dataset[run.splits.test], objective.network.cutoff, needs, run.splits.test)
    draws = [mean_terms(objective, unseen, seed) for seed in NOISE_SEEDS]
    terms = {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]}
    term = "loss" if "zero" in terms else recipe.objective.name
    zero = terms["zero" if term == "loss" else f"{term}_zero"]
    card = read_card(model)
    print(
        f"{name}: {describe(terms)}; {term} over zero predictor {terms[term] / zero:.3f}, {wall / 60:.1f} min"
    )
    return {
        "data": card.training_data[0].name,
        "split": run.splits.sizes(),
        "split_seed": recipe.data.split_seed,
        "seed": recipe.trainer.seed,
        "noise_seeds": NOISE_SEEDS,
        "steps": card.training.steps,
        "selected_step": card.training.selected_step,
        "test_terms": {key: round(value, 5) for key, value in terms.items()},
        "judged_term": term,
        "over_zero_predictor": round(terms[term] / zero, 4),
        "above_floor": terms["loss"] > terms.get("floor", 0.0),
        "minutes": {"wall": round(wall / 60, 2), "cpu": round(cpu / 60, 2)},
        "threads": recipe.trainer.threads,
        "load_average_after": os.getloadavg()[0],
        "machine": machine(),
    }


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--data", type=Path, required=True, help="folder with qm9/qm9.npz")
    args.add_argument("--only", nargs="*", help="recipes to run; default all")
    args.add_argument("--keep", type=Path, help="folder for the runs; default a temporary one")
    options = args.parse_args()
    torch.set_num_threads(1)
    names = options.only or [name for name in list_recipes() if name.startswith("pretrain-")]
    path = options.out or RESULTS / "pretraining.json"
    results = json.loads(path.read_text())["results"] if path.is_file() else {}
    for name in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            folder = (options.keep or Path(scratch)) / name
            results[name] = measure(name, options.data, folder)
        write("pretraining", {"results": dict(sorted(results.items()))}, started, options.out)


if __name__ == "__main__":
    main()
