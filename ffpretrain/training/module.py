"""The Lightning module: one objective, its optimiser and its validation metrics."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from ffpretrain.errors import ConfigError, NonFiniteError
from ffpretrain.graphs import Sample
from ffpretrain.objectives.base import Objective
from ffpretrain.training.checkpoints import RECORD, AveragedWeights, recount_steps
from ffpretrain.training.config import OptimizerConfig, ScheduleConfig
from ffpretrain.training.data import SampleDataset
from ffpretrain.training.native import Compile, compare, use_native_messages
from ffpretrain.training.recorded import RecordedSteps, set_form
from ffpretrain.training.schedules import RateFactor, make_schedule
from ffpretrain.training.terms import batch_terms, noise_generator


class Recording(NamedTuple):
    """What recorded steps need beside the module.

    Attributes:
        samples: training frames.
        block: steps in a block.
        clip: largest norm of the gradient, or None.
        decay: of averaged weights, or None.
    """

    samples: SampleDataset
    block: int
    clip: float | None
    decay: float | None


class ForceFieldModule(L.LightningModule):
    """Trains an objective.

    Args:
        objective: holds the network.
        optimizer: AdamW settings.
        schedule: learning-rate schedule.
        max_steps: length of the run, for the schedule.
        seed: of the noise; the draws of step k depend on the seed and k alone.
        compiled: ``trainer.compile``: native messages or compiled functions, made when training starts.
        threads: CPU threads of a process that was started for this run; None leaves torch's choice.

    Attributes:
        terms: loss and its terms by name, detached, of this process: of the last step, or means over the last
            block of recorded steps.
        term_counts: how many steps each mean is over.
        rate: learning rate of the last step.
        agreement: of native messages with plain ones at the first step, relative: ``loss`` and ``gradient``.
        errors: the last validation's means over all processes; forces in eV/Å, energies in eV.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        max_steps: int,
        seed: int,
        compiled: Compile = False,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self._optimizer, self._schedule = optimizer, schedule
        self._max_steps, self._seed = max_steps, seed
        self._compiled, self._threads = compiled, threads
        self._rate: RateFactor | None = None
        self._sums: dict[str, float] = {}
        self._frames = torch.zeros(0, dtype=torch.int64)
        self._seconds_before, self._begun = 0.0, 0.0
        self._recording: Recording | None = None
        self._recorded: RecordedSteps | None = None
        self._unchecked = False
        self.agreement: dict[str, float] = {}
        self.terms: dict[str, Tensor] = {}
        self.term_counts: dict[str, int] = {}
        self.rate = 0.0
        self.errors: dict[str, float] = {}

    @property
    def monitor(self) -> str:
        """The quantity that selects the best weights; smaller is better."""
        return f"val/{self.objective.monitor}"

    def record_steps(self, recording: Recording) -> None:
        """Take whole steps as recordings, in blocks; batches are then positions ``[steps, B]`` of frames."""
        self._recording = recording
        self.automatic_optimization = False

    def on_fit_start(self) -> None:
        """Start the clock; build compiled functions, in the process that will call them."""
        self._begun = time.monotonic()
        self._recorded = None
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        # recorded steps call functions of fixed shape
        recorded = self._recording is not None
        self._unchecked = not recorded and use_native_messages(
            self.objective, self._compiled, self._max_steps
        )
        if self._compiled is True and not self._unchecked:
            self.objective.accelerate()

    def on_fit_end(self) -> None:
        """Let recordings go, and the memory they hold: the weights they read are moved away now."""
        self._recorded = None

    @property
    def wall_seconds(self) -> float:
        """Training time so far in s, that of the run it was taken up from included."""
        elapsed = time.monotonic() - self._begun if self._begun else 0.0
        return self._seconds_before + elapsed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the training time so far, resumed parts included."""
        checkpoint[RECORD] = {"wall_seconds": self.wall_seconds, "block": self._block}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over training time and place in the run; another program's checkpoint has no record."""
        record = checkpoint.get(RECORD, {})
        self._seconds_before = float(record.get("wall_seconds", 0.0))
        if record.get("block", 1) != self._block:
            recount_steps(checkpoint, self._block)

    def on_train_start(self) -> None:
        """Put the optimiser into the form these steps need; a checkpoint brings that of the run before."""
        for optimizer in self.trainer.optimizers:
            set_form(optimizer, recorded=self._recording is not None)

    @property
    def _block(self) -> int:
        return 1 if self._recording is None else self._recording.block

    def training_step(self, batch: Sample | Tensor, batch_idx: int) -> Tensor | None:
        """Return the loss of one batch, or take a block of recorded steps."""
        if isinstance(batch, Tensor):
            self._take_recorded(batch)
            return None
        self._frames = batch.extras["index"]
        self.objective.at_step(self.global_step, self._max_steps)
        batch = self._with_global_counts(batch)
        if self._unchecked:
            step = self.global_step
            self.agreement = compare(self.objective, batch, lambda: noise_generator(self._seed, step))
            self._unchecked = False
        terms = self.objective(batch, noise_generator(self._seed, self.global_step))
        loss = terms["loss"]
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss is not finite at step {self.global_step}; frames of the batch: "
                f"{self._frames.tolist()}; lower the learning rate or check these frames "
                "(ffpretrain data check)"
            )
        self.terms = {name: value.detach() for name, value in terms.items()}
        self.term_counts = dict.fromkeys(self.terms, 1)
        return loss

    def _take_recorded(self, picks: Tensor) -> None:
        step = self.global_step
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        recording, average = self._recording, self._average()
        if recording is None:
            raise RuntimeError("blocks of steps without record_steps")
        if self._recorded is None:
            self._recorded = RecordedSteps(
                self.objective,
                optimizer,
                recording.samples,
                picks.shape[1],
                recording.block,
                recording.clip,
                None if average is None else average.tensors(),
                recording.decay,
            )

        with torch.enable_grad():
            done = self._recorded.run(
                picks,
                step,
                lambda k: noise_generator(self._seed, k),
                scheduler,
                fresh_average=average is not None and average.fresh,
            )
        if done.bad_step is not None:
            frames = self._recorded.frames_of(picks[done.bad_step - step])
            raise NonFiniteError(
                f"the loss or its gradient is not finite at step {done.bad_step}; frames of the batch: "
                f"{frames}; lower the learning rate or check these frames (ffpretrain data check)"
            )
        self.terms, self.term_counts, self.rate = done.terms, done.counts, done.rate
        # Lightning counts the steps that it takes itself; these were taken without it
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.ready += len(picks)
        progress.total.completed += len(picks)
        if average is not None:
            average.took(len(picks), self.global_step)

    def _average(self) -> AveragedWeights | None:
        found = [c for c in self.trainer.callbacks if isinstance(c, AveragedWeights)]  # type: ignore[attr-defined]
        return found[0] if found else None

    def _with_global_counts(self, batch: Sample) -> Sample:
        world = self.trainer.world_size
        if world == 1:
            return batch
        counts = torch.tensor(
            [len(batch.graph.z), batch.graph.n_graphs], dtype=torch.float64, device=self.device
        )
        share = self.trainer.strategy.reduce(counts, reduce_op="sum") / world
        return batch._replace(extras={**batch.extras, "n_atoms": share[0], "n_graphs": share[1]})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rate; stop where a gradient is not finite, before it reaches the weights."""
        self.rate = float(optimizer.param_groups[0]["lr"])
        grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(grads.values()))):
            return
        # gradients are means over the processes: any of them may hold the frame
        frames = sorted(torch.as_tensor(self.all_gather(self._frames)).flatten().tolist())
        broken = [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]
        what = f"the gradient of {broken[0]}" if broken else "the norm of the gradient"
        raise NonFiniteError(
            f"{what} is not finite at step {self.global_step}; frames of the batch: {frames}; "
            "lower the learning rate or check these frames (ffpretrain data check)"
        )

    def on_train_batch_end(self, outputs: Any, batch: Sample, batch_idx: int) -> None:
        """Ask for a validation after the last step, whatever the interval: its weights are the best yet."""
        if self.global_step >= self._max_steps:
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums = {}

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Add up errors of one batch; label-free objectives add up their loss."""
        if not self.objective.needs_labels:
            terms = self._label_free_terms(batch)
        else:
            terms = self.objective.validation_errors(batch)
        for key, (total, count) in terms.items():
            if not abs(total) < float("inf"):
                raise NonFiniteError(
                    f"the validation error {key} is not finite at step {self.global_step}; frames of the "
                    f"batch: {batch.extras['index'].tolist()}; lower the learning rate or check these frames"
                )
            self._sums[key] = self._sums.get(key, 0.0) + total
            self._sums[f"n_{key}"] = self._sums.get(f"n_{key}", 0.0) + count

    def _label_free_terms(self, batch: Sample) -> dict[str, tuple[float, int]]:
        # one noise for each frame, the same at every validation: streams are seeded by frame
        terms = batch_terms(self.objective, batch, noise_generator(self._seed, 0, validation=True))
        n = batch.graph.n_graphs
        return {key: (value * n, n) for key, value in terms.items()}

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...`` means over all processes and tell the schedule; forces in eV/Å, energies in eV."""
        keys = [key for key in self._sums if not key.startswith("n_")]
        packed = torch.tensor(
            [[self._sums[k], self._sums[f"n_{k}"]] for k in keys], dtype=torch.float64, device=self.device
        )
        if self.trainer.world_size > 1:
            packed = self.trainer.strategy.reduce(packed, reduce_op="sum")
        self.errors = {}
        for key, (total, count) in zip(keys, packed.tolist(), strict=True):
            value = total / count
            if key.endswith("_mse"):
                key, value = key.removesuffix("_mse") + "_rmse", value**0.5
            self.errors[f"val/{key}"] = value
        self.log_dict(self.errors)
        watched = self._schedule.monitor or self.monitor
        if watched not in self.errors:
            raise ConfigError(
                f"schedule.monitor: no quantity {watched!r} is measured; known: {', '.join(self.errors)}"
            )
        if self._rate is not None:
            self._rate.observe(self.errors[watched])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW without decay on biases, norms, embeddings and radial parameters."""
        decay: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                plain = parameter.dim() < 2 or "embedding" in name
                (rest if plain else decay).append(parameter)
        options = self._optimizer
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            amsgrad=options.amsgrad,
            foreach=True,
        )
        scheduler, self._rate = make_schedule(self._schedule, optimizer, self._max_steps)
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler=scheduler)
