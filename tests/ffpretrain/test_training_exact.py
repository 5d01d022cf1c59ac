"""A resumed run equals one that never stopped, two processes equal one; averages and rates as defined."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from lightning.pytorch import Callback
from torch import Tensor

from ffpretrain import compiled
from ffpretrain.backbones.base import Backbone, Features
from ffpretrain.backbones.radial import ExpNormalBasis
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Sample
from ffpretrain.objectives import Objective
from ffpretrain.pairs import Pairs
from ffpretrain.recipes import load_recipe
from ffpretrain.training import logs
from ffpretrain.training import run as run_module
from ffpretrain.training.checkpoints import RECORD, AveragedWeights, read_checkpoint
from ffpretrain.training.config import Recipe, ScheduleConfig
from ffpretrain.training.data import SampleDataset, StreamSampler, collate
from ffpretrain.training.run import Run, fit, prepare
from ffpretrain.training.schedules import RateFactor, learning_rate_factor, make_schedule

SIZE = {"hidden": 8, "layers": 1, "heads": 2, "rbf": 4, "max_z": 9}
TINY = {
    "model.backbone": {"name": "torchmd-et", "options": SIZE},
    "data.train": 10,
    "data.val": 4,
    "data.test": 0,
    "trainer.max_steps": 12,
    "trainer.batch_size": 4,
    "trainer.val_every_steps": 3,
    "trainer.ema_decay": 0.8,
    "trainer.threads": 1,
    "schedule.warmup_steps": 2,
}


def recipe(**changes: Any) -> Recipe:
    """A run of seconds on the bundled data; ``__`` stands for a dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe("demo-finetune", {**TINY, **dotted})


class StopAt(Callback):
    """Plays a user who presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def same(a: Any, b: Any, where: str = "") -> None:
    """Assert that two checkpoints agree bit for bit; times, paths and loop counters of Lightning apart."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in {RECORD, "loops"} and not str(key).endswith(("path", "dirpath", "best_k_models")):
                same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


CASES = {
    "cosine with EMA": {},
    "plateau without EMA": {
        "schedule__name": "plateau",
        "schedule__patience": 0,
        "schedule__factor": 0.5,
        "trainer__ema_decay": None,
    },
    "plateau with EMA, early stopping": {
        "schedule__name": "plateau",
        "schedule__patience": 1,
        "trainer__early_stopping": 50,
        "trainer__precision": "float64",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_one_that_never_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "INTERVAL", 1)
    chosen = recipe(**CASES[name])
    fit(prepare(chosen), tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        fit(prepare(chosen), tmp_path / "resumed", callbacks=[StopAt(8)])
    assert read_checkpoint(tmp_path / "resumed" / "checkpoints" / "last.ckpt")["global_step"] == 6
    fit(prepare(chosen), tmp_path / "resumed", resume=True)
    for file in ("last.ckpt", "best.ckpt"):
        one, other = (
            read_checkpoint(tmp_path / run / "checkpoints" / file) for run in ("straight", "resumed")
        )
        same(one, other, file)
    logged = [(tmp_path / run / "logs" / "metrics.csv").read_text() for run in ("straight", "resumed")]
    assert logged[0] == logged[1]
    steps = [row.split(",")[0] for row in logged[0].splitlines()[1:]]
    assert steps == ["1", "2", "3", "3", "4", "5", "6", "6", "7", "8", "9", "9", "10", "11", "12", "12"]
    if chosen.trainer.ema_decay is not None:
        last = read_checkpoint(tmp_path / "straight" / "checkpoints" / "last.ckpt")
        weights, means = last["current_model_state"], last["state_dict"]
        assert any(not torch.equal(weights[key], means[key]) for key in weights)


class Record(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.weights.append(torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone())


def test_the_average_of_weights_is_the_exponential_one(tmp_path: Path) -> None:
    seen = Record()
    run = prepare(recipe(trainer__max_steps=7, trainer__precision="float64"))
    fit(run, tmp_path, callbacks=[seen])
    mean = seen.weights[0]
    for weights in seen.weights[1:]:
        mean = 0.8 * mean + 0.2 * weights
    last = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    names = [name for name, _ in run.module.named_parameters()]
    stored = torch.cat([last["state_dict"][name].flatten() for name in names])
    current = torch.cat([last["current_model_state"][name].flatten() for name in names])
    torch.testing.assert_close(stored, mean, rtol=0, atol=1e-12)
    assert torch.equal(current, seen.weights[-1])
    assert not torch.allclose(stored, current, rtol=0, atol=1e-9)
    # the last step is validated and kept although the interval of 3 does not divide 7
    assert last["global_step"] == 7


def test_cosine_rates_of_a_run_are_the_closed_form(tmp_path: Path) -> None:
    seen = Record()
    chosen = recipe(
        trainer__max_steps=6, schedule__warmup_steps=2, schedule__final_fraction=0.1, optimizer__lr=0.01
    )
    fit(prepare(chosen), tmp_path, callbacks=[seen])
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert seen.rates == pytest.approx([0.005, 0.01, *(0.01 * c for c in cosine)])
    assert learning_rate_factor(6, 2, 6, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(99, 2, 6, 0.1) == pytest.approx(0.1)


def test_plateau_rates_warm_up_and_drop_after_validations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that never falls: with a patience of 1 every second validation drops the rate."""
    seen = Record()
    chosen = recipe(
        schedule__name="plateau", schedule__patience=1, schedule__factor=0.5, trainer__max_steps=10,
        trainer__val_every_steps=2, schedule__warmup_steps=3, optimizer__lr=0.012, schedule__min_lr=0.0031,
    )  # fmt: skip
    run = prepare(chosen)
    observe = RateFactor.observe
    monkeypatch.setattr(RateFactor, "observe", lambda self, value: observe(self, 1.0))
    fit(run, tmp_path, callbacks=[seen])
    # validations after steps 2, 4, 6, 8; the second without gain is that after 6; the rate of step 7 was set
    assert seen.rates == pytest.approx([0.004, 0.008, 0.012, 0.012, 0.012, 0.012, 0.012, 0.006, 0.006, 0.006])
    factor = RateFactor(chosen.schedule, 10, 0.012)
    for _ in range(9):
        observe(factor, 1.0)
    assert factor(50) == pytest.approx(0.0031 / 0.012)
    observe(factor, 0.5)
    assert (factor.best, factor.waited) == (0.5, 0)


def test_constant_rates() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    entry, factor = make_schedule(ScheduleConfig(name="constant", warmup_steps=4), optimizer, 10)
    assert [factor(k) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert entry["interval"] == "step"
    factor.observe(1.0)
    factor.observe(1.0)
    assert factor(9) == 1.0
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_weight_average_moves_by_one_minus_decay() -> None:
    average = AveragedWeights(0.75)._kwargs["multi_avg_fn"]
    mean, current = torch.tensor([4.0]), torch.tensor([8.0])
    average([mean], [current], torch.tensor(1))
    assert mean.item() == pytest.approx(0.75 * 4 + 0.25 * 8)


def test_the_average_is_made_where_the_weights_will_be() -> None:
    average = AveragedWeights(0.75)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    module = L.LightningModule()
    module.layer = torch.nn.Linear(2, 2)
    average.setup(trainer, module, "fit")  # type: ignore[arg-type]
    assert {tensor.device.type for tensor in average.tensors()} == {"meta"}
    assert module.layer.weight.device.type == "cpu"


def test_the_stream_of_batches_is_one_seeded_permutation_after_another() -> None:
    whole = StreamSampler(10, 4, seed=3)
    order = [i for k in range(5) for i in whole.batch(k)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    shares = [StreamSampler(10, 4, 3, rank=rank, world_size=2) for rank in (0, 1)]
    for k in range(5):
        assert shares[0].batch(k) + shares[1].batch(k) == whole.batch(k)
    late = iter(StreamSampler(10, 4, 3, start=lambda: 2))
    assert next(late) == whole.batch(2)
    assert StreamSampler(10, 4, seed=4).batch(0) != whole.batch(0)


def weights_of(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.module.named_parameters()}


@pytest.fixture
def mixed_sizes(tmp_path: Path) -> Path:
    """Molecules of different sizes with made-up labels: shares of a batch then differ in atoms."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(14):
        atoms = molecule(("H2O", "CH3CH2OH", "NH3")[k % 3])
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        labels = {"energy": float(rng.normal()), "forces": rng.normal(size=atoms.positions.shape)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    write(tmp_path / "mixed.extxyz", frames)
    return tmp_path / "mixed.extxyz"


def test_two_processes_equal_one(tmp_path: Path, mixed_sizes: Path) -> None:
    """Steps with and without the auxiliary task, so that DDP meets unused parameters."""
    shared = {
        "data__source": str(mixed_sizes),
        "trainer__precision": "float64",
        "trainer__max_steps": 5,
        "trainer__val_every_steps": 5,
        "trainer__ema_decay": None,
        "objective__options": {"structure_ratio": 1.0, "batch_probability": 0.6, "ndem_weight": 0.5},
    }
    runs = []
    for devices in (1, 2):
        run = prepare(recipe(**shared, trainer__devices=devices))
        start = weights_of(run)
        fit(run, tmp_path / str(devices))
        runs.append(run)
    logged = [(tmp_path / str(n) / "logs" / "metrics.csv").read_text().splitlines() for n in (1, 2)]
    assert logged[0][0] == logged[1][0]
    for one, other in zip(logged[0][1:], logged[1][1:], strict=True):
        a, b = ([float(x) for x in row.split(",") if x] for row in (one, other))
        assert a == pytest.approx(b, rel=1e-7)
    one, two = weights_of(runs[0]), weights_of(runs[1])
    moved = max(float((one[key] - start[key]).abs().max()) for key in one)
    difference = max(float((one[key] - two[key]).abs().max()) for key in one)
    assert moved > 1e-4
    assert difference <= 1e-8


def test_what_two_processes_cannot_share_exactly_is_refused() -> None:
    with pytest.raises(ConfigError, match="structure_ratio: 1"):
        prepare(recipe(trainer__devices=2, objective__options={"structure_ratio": 0.5}))
    with pytest.raises(ConfigError, match=r"batch_size=3 does not divide"):
        prepare(recipe(trainer__devices=2, trainer__batch_size=3, objective__options={}))


def compiled_objective() -> tuple[Objective, Sample]:
    """A supervised objective in float64, about to call its compiled functions, and a batch of two."""
    chosen = {"objective__name": "supervised", "objective__options": {}, "trainer__precision": "float64"}
    run = prepare(recipe(**chosen))
    samples = SampleDataset(run.dataset[run.splits.train[:2]], run.module.objective.network.cutoff)
    return run.module.objective.train(), collate([samples[0], samples[1]])


def gradients(objective: Objective, batch: Sample) -> dict[str, Tensor]:
    objective.zero_grad()
    objective(batch, torch.Generator())["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that torch.compile does with a graph, but for the machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("without_compiler")
def test_the_compiled_step_has_the_gradients_of_the_eager_one() -> None:
    """Training differentiates forces: what a trace loses of the second derivative shows in no loss."""
    objective, batch = compiled_objective()
    eager = gradients(objective, batch)
    objective.accelerate()
    traced = gradients(objective, batch)
    assert eager.keys() == traced.keys()
    largest = max(float(g.abs().max()) for g in eager.values())
    for name, gradient in eager.items():
        assert float((gradient - traced[name]).abs().max()) < 1e-12 * largest, name
    assert objective._evaluate.gradient_agreement[2, 9] < 1e-12  # type: ignore[union-attr]


class FewOperations(Backbone):
    """As little as has an exp and a root to differentiate twice: the compiler is done in seconds."""

    name = "few-operations"
    has_vectors = False

    def __init__(self) -> None:
        super().__init__(5.0, 4, 10, {})
        self.basis = ExpNormalBasis(4, 5.0)
        self.embedding = torch.nn.Embedding(10, 4)

    def encode(self, z: Tensor, pairs: Pairs) -> Features:
        """Return a smooth density of each element."""
        bumps = self.basis(pairs.distance) * pairs.neighbor(self.embedding(z))
        return Features(pairs.sum(bumps if pairs.other is None else bumps * pairs.other.unsqueeze(-1)), None)


@pytest.mark.usefixtures("without_compiler")
def test_a_compiled_step_that_loses_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "make_backbone", lambda *args: FewOperations())
    objective, batch = compiled_objective()
    monkeypatch.setattr(compiled, "_reattach", lambda traced: None)
    objective.accelerate()
    with pytest.raises(ConfigError, match="compiled gradients differ from the eager ones"):
        objective(batch, torch.Generator())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: install g++")
def test_a_compiled_run_equals_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test here that runs the C++ compiler."""
    monkeypatch.setattr(run_module, "make_backbone", lambda *args: FewOperations())
    small = {
        "objective__name": "supervised",
        "objective__options": {},
        "trainer__max_steps": 2,
        "trainer__batch_size": 2,
        "trainer__ema_decay": None,
        "trainer__precision": "float64",
    }
    runs = []
    for compile_it in (False, True):
        run = prepare(recipe(**small, trainer__compile=compile_it))
        start = weights_of(run)
        fit(run, tmp_path / str(compile_it))
        runs.append(run)
    evaluate = runs[1].module.objective._evaluate
    assert list(evaluate.agreement) == [(2, 9)], "the compiled function was not used"
    eager, fast = weights_of(runs[0]), weights_of(runs[1])
    assert max(float((eager[key] - start[key]).abs().max()) for key in eager) > 1e-4
    assert max(float((eager[key] - fast[key]).abs().max()) for key in eager) < 1e-5
