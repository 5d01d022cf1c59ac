"""The Lightning module: one objective, its optimiser and its validation metrics."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ffpretrain.errors import NonFiniteError
from ffpretrain.graphs import Sample, atoms_per_graph
from ffpretrain.objectives.base import Objective
from ffpretrain.training.config import OptimizerConfig, ScheduleConfig
from ffpretrain.training.schedules import make_schedule


class ForceFieldModule(L.LightningModule):
    """Trains an objective.

    Args:
        objective: holds the network.
        optimizer: AdamW settings.
        schedule: learning-rate schedule.
        max_steps: length of the run, for the schedule.
        seed: of the noise; the draws of step k depend on the seed and k alone.
    """

    def __init__(
        self, objective: Objective, optimizer: OptimizerConfig, schedule: ScheduleConfig, max_steps: int, seed: int
    ) -> None:
        super().__init__()
        self.objective = objective
        self._optimizer, self._schedule = optimizer, schedule
        self._max_steps, self._seed = max_steps, seed
        self._sums: dict[str, float] = {}
        self._frames: list[int] = []

    def _generator(self, step: int, stream: int) -> torch.Generator:
        # two streams: training noise and validation noise; both follow from (seed, step) on every process
        return torch.Generator().manual_seed(((self._seed * 2 + stream) * 1_000_003 + step) % 2**63)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        terms = self.objective(self._with_global_counts(batch), self._generator(self.global_step, 0))
        loss = terms["loss"]
        self._frames = batch.extras["index"].tolist()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the loss is not finite at step {self.global_step}; frames of the batch: "
                f"{self._frames}; lower the learning rate or check these frames"
            )
        self.log_dict({f"train/{k}": v.detach() for k, v in terms.items()}, batch_size=batch.graph.n_graphs)
        return loss

    def _with_global_counts(self, batch: Sample) -> Sample:
        world = self.trainer.world_size
        if world == 1:
            return batch
        counts = torch.tensor([len(batch.graph.z), batch.graph.n_graphs], dtype=torch.float64, device=self.device)
        share = self.trainer.strategy.reduce(counts, reduce_op="sum") / world
        return batch._replace(extras={**batch.extras, "n_atoms": share[0], "n_graphs": share[1]})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop where a gradient is not finite, before it reaches the weights."""
        grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(grads.values()))):
            return
        name = next(n for n, g in grads.items() if not bool(torch.isfinite(g).all()))
        raise NonFiniteError(
            f"the gradient of {name} is not finite at step {self.global_step}; frames of the batch: "
            f"{self._frames}; lower the learning rate or check these frames (ffpretrain data check)"
        )

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums = {}

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Add up errors of one batch; label-free objectives add up their loss."""
        if not self.objective.needs_labels:
            with torch.enable_grad():
                terms = self.objective(batch, self._generator(batch_idx, 1))
            n = batch.graph.n_graphs
            self._add({key: (float(value.detach()) * n, n) for key, value in terms.items()})
            return
        out = self.objective.network(batch.graph, stress=False)
        n_atoms = atoms_per_graph(batch.graph)
        force_error = out["forces"] - batch.targets["forces"]
        energy_error = out["energy"] - batch.targets["energy"]
        components, graphs = force_error.numel(), batch.graph.n_graphs
        self._add(
            {
                "forces_mae": (float(force_error.abs().sum()), components),
                "forces_mse": (float(force_error.square().sum()), components),
                "energy_mae": (float(energy_error.abs().sum()), graphs),
                "energy_per_atom_mae": (float((energy_error / n_atoms).abs().sum()), graphs),
            }
        )

    def _add(self, terms: dict[str, tuple[float, int]]) -> None:
        for key, (total, count) in terms.items():
            self._sums[key] = self._sums.get(key, 0.0) + total
            self._sums[f"n_{key}"] = self._sums.get(f"n_{key}", 0.0) + count

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...`` means over all processes; forces in eV/Å, energies in eV."""
        keys = [key for key in self._sums if not key.startswith("n_")]
        packed = torch.tensor(
            [[self._sums[k], self._sums[f"n_{k}"]] for k in keys], dtype=torch.float64, device=self.device
        )
        if self.trainer.world_size > 1:
            packed = self.trainer.strategy.reduce(packed, reduce_op="sum")
        for key, (total, count) in zip(keys, packed.tolist(), strict=True):
            name = "forces_rmse" if key == "forces_mse" else key
            value = total / count
            self.log(f"val/{name}", value**0.5 if name == "forces_rmse" else value, prog_bar=False)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW without decay on biases, norms, embeddings and radial parameters."""
        decay, rest = [], []
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
        scheduler = make_schedule(self._schedule, optimizer, self._max_steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
