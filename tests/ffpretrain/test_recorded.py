"""Recorded steps do what training step by step does. On a CPU a recording is the function itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ffpretrain.errors import ConfigError, NonFiniteError
from ffpretrain.recipes import load_recipe
from ffpretrain.training.checkpoints import read_checkpoint
from ffpretrain.training.config import Recipe, TrainerConfig
from ffpretrain.training.data import SampleDataset, StreamSampler
from ffpretrain.training.recorded import EqualFrames, StepBlocks, Variant
from ffpretrain.training.run import Run, fit, prepare, step_block

SIZE = {"hidden": 8, "layers": 1, "heads": 2, "rbf": 4, "max_z": 9}
NOISY = {"ndem_weight": 0.1, "structure_ratio": 0.5, "batch_probability": 0.5}
STRAINED = {"strain_weight": 0.5, "strain_probability": 0.5}
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def recipe(**changes: Any) -> Recipe:
    fields = {
        "model.backbone": {"name": "torchmd-et", "options": SIZE},
        "data.train": 10,
        "data.val": 4,
        "data.test": 0,
        "objective.name": "ndem",
        "objective.options": NOISY,
        "trainer.max_steps": 13,
        "trainer.batch_size": 4,
        "trainer.val_every_steps": 6,
        "trainer.ema_decay": 0.8,
        "trainer.gradient_clip": 0.5,
        "trainer.threads": 1,
        "trainer.compile": True,
        "trainer.precision": "float64",
        "trainer.accelerator": "cpu",
        "schedule.warmup_steps": 2,
    }
    return load_recipe("demo-finetune", fields | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the C++ compiler out: what it would compile is run as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def weights(out: Path, key: str) -> dict[str, Tensor]:
    return read_checkpoint(out / "checkpoints" / "last.ckpt")[key]


def assert_same(one: Path, other: Path, tolerance: float) -> None:
    for key in ("state_dict", "current_model_state"):
        a, b = weights(one, key), weights(other, key)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name].cpu(), b[name].cpu(), rtol=tolerance, atol=tolerance)
    rows, expected = ((out / "logs" / "metrics.csv").read_text().splitlines() for out in (one, other))
    assert [row.split(",")[0] for row in rows] == [row.split(",")[0] for row in expected]
    for row, wanted in zip(rows[1:], expected[1:], strict=True):
        numbers, goal = ([float(x) for x in text.split(",") if x] for text in (row, wanted))
        assert numbers == pytest.approx(goal, rel=100 * tolerance, abs=100 * tolerance)


def recorded(made: Run) -> Run:
    return replace(made, block=step_block(made.recipe.trainer))


@pytest.mark.parametrize("options", [NOISY, STRAINED | {"ndem_weight": 0.0}, NOISY | STRAINED])
def test_recorded_training_equals_training_step_by_step(
    options: dict[str, Any], tmp_path: Path, traced: None
) -> None:
    made = recipe(objective__options=options)
    fit(prepare(made), tmp_path / "plain")
    trainer = fit(recorded(prepare(made)), tmp_path / "recorded")
    assert trainer.global_step == 13
    moved = weights(tmp_path / "plain", "current_model_state")
    assert not all(torch.equal(moved[k], v) for k, v in prepare(made).module.state_dict().items())
    assert_same(tmp_path / "recorded", tmp_path / "plain", 1e-9)
    head = (tmp_path / "recorded" / "logs" / "metrics.csv").read_text().splitlines()[0]
    wanted = [bool(options.get(f"{term}_weight")) for term in ("ndem", "strain")]
    assert [term in head for term in ("ndem", "strain")] == wanted


def test_every_kind_of_step_is_a_recording_of_its_own(tmp_path: Path, traced: None) -> None:
    made = recorded(prepare(recipe(objective__options=NOISY | STRAINED, trainer__max_steps=24)))
    found: set[Variant] = set()

    class Look(Callback):
        def on_validation_end(self, trainer: Trainer, module: Any) -> None:
            found.update(module._recorded._replays)

    fit(made, tmp_path, callbacks=[Look()])
    assert len(found) == 4


def test_a_recorded_run_is_taken_up_where_it_stopped(tmp_path: Path, traced: None) -> None:
    constant = {"schedule__name": "constant"}
    fit(recorded(prepare(recipe(**constant))), tmp_path / "straight")
    fit(recorded(prepare(recipe(trainer__max_steps=6, **constant))), tmp_path / "parts")
    fit(recorded(prepare(recipe(**constant))), tmp_path / "parts", resume=True)
    assert_same(tmp_path / "parts", tmp_path / "straight", 1e-12)


def test_a_second_fit_records_anew(tmp_path: Path, traced: None) -> None:
    made = recorded(prepare(recipe()))
    recordings = []

    class Look(Callback):
        def on_validation_end(self, trainer: Trainer, module: Any) -> None:
            recordings.append(module._recorded)

    for out in ("one", "two"):
        fit(made, tmp_path / out, callbacks=[Look()])
        assert made.module._recorded is None  # its memory is free again
    assert len({id(one) for one in recordings}) == 2


@pytest.mark.parametrize("recorded_first", [True, False])
def test_a_run_can_change_between_recorded_and_step_by_step(
    recorded_first: bool, tmp_path: Path, traced: None
) -> None:
    first, then = (recorded, lambda made: made) if recorded_first else (lambda made: made, recorded)
    constant = {"schedule__name": "constant"}
    fit(prepare(recipe(**constant)), tmp_path / "straight")
    fit(first(prepare(recipe(trainer__max_steps=6, **constant))), tmp_path / "parts")
    trainer = fit(then(prepare(recipe(**constant))), tmp_path / "parts", resume=True)
    assert trainer.global_step == 13
    assert_same(tmp_path / "parts", tmp_path / "straight", 1e-9)


def test_a_recorded_step_that_is_not_finite_names_its_frames(tmp_path: Path, traced: None) -> None:
    made = recorded(prepare(recipe(optimizer__lr=1e30)))
    with pytest.raises(NonFiniteError, match=r"not finite at step [12]; frames of the batch: \[\d+, "):
        fit(made, tmp_path)


def test_blocks_cover_the_stream_and_come_back_to_multiples() -> None:
    def blocks(start: int) -> list[list[list[int]]]:
        sampler = StreamSampler(10, 4, 3, lambda: start)
        stream = iter(StepBlocks(sampler, 5, 13))
        found, step = [], start
        while step < 13:
            found.append(next(stream).tolist())
            step += len(found[-1])
        return found

    whole = [batch for block in blocks(0) for batch in block]
    assert [len(block) for block in blocks(0)] == [5, 5, 3]
    assert [len(block) for block in blocks(7)] == [3, 3]
    assert whole == [StreamSampler(10, 4, 3).batch(k) for k in range(13)]
    assert [batch for block in blocks(7) for batch in block] == whole[7:]


@pytest.mark.parametrize(
    ("val_every", "max_steps", "block"), [(1000, 48000, 50), (120, 5000, 10), (500, 30, 30), (7, 100, 7)]
)
def test_a_block_ends_at_every_row_of_the_logs(val_every: int, max_steps: int, block: int) -> None:
    config = TrainerConfig(val_every_steps=val_every, max_steps=max_steps)
    assert step_block(config) == block
    period = min(val_every, max_steps)
    assert period % block == 0
    assert min(50, period) % block == 0


def test_molecules_of_different_sizes_are_refused(tmp_path: Path) -> None:
    made = prepare(recipe())
    frames = SampleDataset(made.dataset[made.splits.train], 5.0, ("energy", "forces"))
    frames._samples[1] = frames._samples[1]._replace(
        graph=frames._samples[1].graph._replace(z=frames._samples[1].graph.z[:4])
    )
    with pytest.raises(ConfigError, match="one size"):
        EqualFrames(frames, torch.device("cpu"))


@CUDA
def test_recorded_training_on_a_gpu_equals_training_on_the_cpu(tmp_path: Path) -> None:
    fit(prepare(recipe(trainer__compile=False)), tmp_path / "plain")
    on_gpu = prepare(recipe(trainer__accelerator="cuda"))
    assert on_gpu.block == 6
    fit(on_gpu, tmp_path / "recorded")
    assert_same(tmp_path / "recorded", tmp_path / "plain", 1e-8)
