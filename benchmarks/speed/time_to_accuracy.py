"""Time to accuracy: a recipe trained on rMD17, and when its validation error fell below thresholds.

One run with the recipe's own schedule, in as many calls as it takes: each goes on from the last validation
and stops at the first one after ``--minutes``. Time is training time on the path to the weights, validation
and the building of kernels included; what a call did after its last validation is not on that path and not
counted. Thresholds are compared with the validation frames, which also select the weights; when the run is at
its end, the selected weights are evaluated once on all of test_01.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightning as L
from common import machine, parser, stop, write

from ffpretrain import load_potential, units
from ffpretrain.datasets import open_dataset
from ffpretrain.errors import UserError
from ffpretrain.evaluation import error_table, predict
from ffpretrain.recipes import load_recipe
from ffpretrain.training.finish import finish
from ffpretrain.training.run import fit, prepare

#: kcal/mol/Å
THRESHOLDS = (0.5, 0.4, 0.3, 0.27, 0.24, 0.21, 0.18, 0.165, 0.13, 0.1, 0.087)
ROWS = "accuracy.jsonl"


class Watch(L.Callback):
    """Writes step, training time and error of each validation; stops at the first one after the deadline."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._path, self._deadline = path, deadline

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        row = {
            "step": trainer.global_step,
            "seconds": round(module.wall_seconds, 1),
            "forces_mae_kcal": round(module.errors[module.monitor] / units.KCAL_PER_MOL, 5),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"step {row['step']}: {row['seconds']} s, {row['forces_mae_kcal']:.4f} kcal/mol/Å", flush=True)
        if time.monotonic() > self._deadline:
            trainer.should_stop = True


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of the path to the last weights: a step done again counts as the last time says."""
    by_step: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(line)
        by_step = {step: kept for step, kept in by_step.items() if step < row["step"]}
        by_step[row["step"]] = row
    return list(by_step.values())


def first_below(rows: list[dict[str, float]]) -> dict[str, float | None]:
    found = {t: next((r["seconds"] for r in rows if r["forces_mae_kcal"] < t), None) for t in THRESHOLDS}
    return {f"{threshold} kcal/mol/Å": seconds for threshold, seconds in found.items()}


def test_error(model: Path, molecule: str, data: Path) -> float:
    frames = open_dataset("rmd17", molecule, root=data, split=1, part="test")
    return error_table(predict(load_potential(str(model)), frames))["forces_kcal_mae"].value


def main() -> None:
    args = parser(__doc__)
    args.add_argument("changes", nargs="*", metavar="key=value", help="as trainer.max_steps=200000")
    args.add_argument("--recipe", default="ndem-aspirin")
    args.add_argument("--data", type=Path, required=True, help="folder with the rMD17 split files")
    args.add_argument("--run", type=Path, required=True, help="folder of the run, taken up where it is there")
    args.add_argument("--minutes", type=float, default=float("inf"), help="of this call")
    options = args.parse_args()
    started = time.perf_counter()
    rmd17 = [f"data.options.root={options.data}", "data.options.split=1"]
    recipe = load_recipe(options.recipe, [*rmd17, "trainer.compile=true", *options.changes])
    run = prepare(recipe)
    resume = (options.run / "checkpoints" / "last.ckpt").is_file()
    watch = Watch(options.run / ROWS, time.monotonic() + 60 * options.minutes)
    trainer = fit(run, options.run, resume=resume, callbacks=[watch])
    rows = read_rows(options.run / ROWS)
    content: dict[str, Any] = {
        "machine": machine(),
        "what": f"{recipe.name}, rMD17 {recipe.data.molecule} train_01, {recipe.data.train} frames, one seed",
        "recorded": run.block is not None,
        "changes": options.changes,
        "steps": trainer.global_step,
        "of": recipe.trainer.max_steps,
        "seconds_to": first_below(rows),
        "rows": rows,
    }
    for threshold, seconds in content["seconds_to"].items():
        print(f"below {threshold}: {'not yet' if seconds is None else f'{seconds:.0f} s'}")
    if trainer.global_step >= recipe.trainer.max_steps:
        model = finish(run, options.run)
        content["test_01_forces_mae_kcal"] = test_error(model, str(recipe.data.molecule), options.data)
        print(f"test_01: {content['test_01_forces_mae_kcal']:.4f} kcal/mol/Å; {model}")
    else:
        print(f"{trainer.global_step} of {recipe.trainer.max_steps} steps; the same command goes on")
    write("speed_time_to_accuracy", content, started, options.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        stop(f"error: {error}")
