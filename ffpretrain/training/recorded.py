"""Whole optimiser steps recorded as CUDA graphs: forward, forces, backward, clipping, optimiser, averaging.

A step of a few small molecules is hundreds of kernels of microseconds each; launched one by one from Python
they take ten times as long. Recorded, a step is one launch. What changes from step to step (which frames,
their noise, the learning rate) is prepared by the host in pinned memory while the device computes the step
before, and everything it draws is what the step-by-step run draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset

from ffpretrain.cuda_graph import record
from ffpretrain.errors import ConfigError
from ffpretrain.graphs import Graph, Sample
from ffpretrain.noise import Noise
from ffpretrain.objectives.base import Drawn, Objective
from ffpretrain.objectives.strained import Strained
from ffpretrain.training.data import SampleDataset, StreamSampler, collate


class StepBlocks(IterableDataset[Tensor]):
    """The stream of batches in blocks of whole steps: positions of samples ``[steps, batch]``.

    Args:
        sampler: the stream; its ``start`` says where to begin.
        block: steps in a block.
        max_steps: the last block ends there.
    """

    def __init__(self, sampler: StreamSampler, block: int, max_steps: int) -> None:
        self._sampler, self._block, self._max_steps = sampler, block, max_steps

    def __iter__(self) -> Iterator[Tensor]:
        step = self._sampler.start()
        while True:
            # a run taken up at any step comes back to multiples of the block
            end = min((step // self._block + 1) * self._block, max(self._max_steps, step + 1))
            yield torch.tensor([self._sampler.batch(k) for k in range(step, end)])
            step = end


class EqualFrames:
    """Labelled molecules of one size, stacked on a device.

    Args:
        samples: one structure each.
        device: where they are kept.

    Attributes:
        index: number of each frame, on the CPU.

    Raises:
        ConfigError: molecules of different sizes, or a periodic structure.
    """

    def __init__(self, samples: SampleDataset, device: torch.device) -> None:
        all_samples = [samples[i] for i in range(len(samples))]
        sizes = {len(s.graph.z) for s in all_samples}
        if len(sizes) > 1:
            raise ConfigError("compile needs molecules of one size in every batch; set compile=false")
        if any(bool((s.graph.cell != 0).any()) for s in all_samples):
            raise ConfigError("compile needs molecules in vacuum; set compile=false for periodic structures")
        self.n_atoms = sizes.pop()
        self.index = torch.cat([s.extras["index"] for s in all_samples])
        self._z = torch.stack([s.graph.z for s in all_samples]).to(device)
        self._pos = torch.stack([s.graph.pos for s in all_samples]).to(device)
        self._targets = {
            name: torch.stack([s.targets[name] for s in all_samples]).to(device)
            for name in all_samples[0].targets
        }

    def batch(self, picks: Tensor) -> Sample:
        """Return the frames at positions ``picks [B]`` as one sample without edges."""
        targets = {name: values[picks].flatten(0, 1) for name, values in self._targets.items()}
        return Sample(self.graph(picks), targets, {})

    def graph(self, picks: Tensor) -> Graph:
        """Return the structures at positions ``picks [B]``, without edges."""
        n, device = len(picks), picks.device
        return Graph(
            z=self._z[picks].flatten(),
            pos=self._pos[picks].flatten(0, 1),
            edge_index=torch.empty(2, 0, dtype=torch.int64, device=device),
            edge_shift=self._pos.new_empty(0, 3),
            batch=batch_of(n, self.n_atoms, device),
            cell=self._pos.new_zeros(n, 3, 3),
            n_graphs=n,
        )


def batch_of(n_graphs: int, n_atoms: int, device: torch.device | None = None) -> Tensor:
    """Return the structure of each atom of equal molecules, int64 ``[n_graphs * n_atoms]``."""
    return torch.arange(n_graphs, device=device).unsqueeze(1).expand(n_graphs, n_atoms).reshape(-1)


class Variant(NamedTuple):
    """What a step has beside its frames: each combination is a recording of its own."""

    noisy: bool
    strained: bool


class _Inputs(NamedTuple):
    """What changes from step to step: tensors on the device that stay in place, or their pinned sources."""

    picks: Tensor
    rate: Tensor
    average_rate: Tensor
    displacement: Tensor
    sigma: Tensor
    mask: Tensor
    strained: Tensor
    back: Tensor
    valid: Tensor

    @classmethod
    def empty(cls, lead: Sequence[int], batch: int, n_atoms: int, device: torch.device, pin: bool) -> _Inputs:
        def make(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((*lead, *shape), dtype=dtype, device=device, pin_memory=pin)

        return cls(
            make(torch.int64, batch),
            make(torch.float32),
            make(torch.float32),
            make(torch.float64, batch * n_atoms, 3),
            make(torch.float64, batch),
            make(torch.bool, batch * n_atoms),
            make(torch.float64, batch * n_atoms, 3),
            make(torch.float64, batch * n_atoms, 3),
            make(torch.bool, batch),
        )

    def drawn(self, variant: Variant) -> Drawn:
        """Return the draws of a variant of a step, in these tensors."""
        return Drawn(
            Noise(self.displacement, self.sigma, self.mask) if variant.noisy else None,
            Strained(self.strained, self.back, self.valid) if variant.strained else None,
        )


class Progressed(NamedTuple):
    """What a block of steps did.

    Attributes:
        terms: mean of each term of the loss over the steps that have it.
        counts: how many those were.
        rate: learning rate of the last step.
        bad_step: the first step of the block whose loss or gradient is not finite; None where all are.
    """

    terms: dict[str, Tensor]
    counts: dict[str, int]
    rate: float
    bad_step: int | None


class RecordedSteps:
    """Takes optimiser steps by replaying them.

    Recordings share everything but what the objective draws: steps with noise or strained structures, or
    without.

    Args:
        objective: recordable and accelerated, in training mode, on its device.
        optimizer: AdamW of the objective's weights, in the form :func:`set_form` gives it.
        samples: training frames.
        batch_size: frames in a step.
        block: most steps in one call.
        clip: largest norm of the gradient, or None.
        average: tensors that follow the weights, in the order of ``objective.parameters()``, or None.
        decay: of the average.

    Raises:
        ConfigError: frames that do not fit one shape.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        samples: SampleDataset,
        batch_size: int,
        block: int,
        clip: float | None,
        average: list[Tensor] | None,
        decay: float | None,
    ) -> None:
        self._objective, self._optimizer, self._samples = objective, optimizer, samples
        self._clip, self._average, self._decay = clip, average, decay
        self.weights = [p for p in objective.parameters() if p.requires_grad]
        self._followed: list[Tensor] = list(objective.parameters())
        device = self._device = self.weights[0].device
        self._frames = EqualFrames(samples, device)
        self._batch_size = batch_size
        n, cpu = self._frames.n_atoms, torch.device("cpu")
        self._here = _Inputs.empty((), batch_size, n, device, pin=False)
        self._host = _Inputs.empty((block,), batch_size, n, cpu, pin=device.type == "cuda")
        # draws are made on the host
        self._host_frames = self._frames if device == cpu else EqualFrames(samples, cpu)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._bad = torch.zeros((), dtype=torch.int64, device=device)
        self._sums: dict[Variant, dict[str, Tensor]] = {}
        self._replays: dict[Variant, Callable[[], object]] = {}

    def run(
        self,
        picks: Tensor,
        first_step: int,
        generator: Callable[[int], torch.Generator],
        scheduler: LRScheduler,
        fresh_average: bool,
    ) -> Progressed:
        """Take the steps of a block.

        Args:
            picks: positions of the training frames ``[steps, B]``.
            first_step: number of the first of them.
            generator: source of all draws of a step.
            scheduler: of the learning rate; stepped after every step.
            fresh_average: the average starts as the weights after the first step.
        """
        self._count.zero_()
        self._bad.fill_(-1)
        for sums in self._sums.values():
            for total in sums.values():
                total.zero_()
        taken: Counter[Variant] = Counter()
        for k, frames in enumerate(picks):
            graph, index = self._host_frames.graph(frames), self._host_frames.index[frames]
            drawn = self._objective.draw_step(graph, index, generator(first_step + k))
            variant = Variant(drawn.noise is not None, drawn.strained is not None)
            start = fresh_average and k == 0
            rate = float(self._optimizer.param_groups[0]["lr"])
            self._send(k, frames, rate, 1.0 if start else 1.0 - (self._decay or 0.0), drawn)
            self._replay(variant)()
            scheduler.step()
            taken[variant] += 1
        bad = int(self._bad)
        return Progressed(*self._means(taken), rate, None if bad < 0 else first_step + bad)

    def frames_of(self, picks: Tensor) -> list[int]:
        """Return the numbers of the frames at positions ``picks [B]``."""
        return self._frames.index[picks].tolist()

    def _send(self, k: int, frames: Tensor, rate: float, average_rate: float, drawn: Drawn) -> None:
        host, here = self._host, self._here
        host.picks[k], host.rate[k], host.average_rate[k] = frames, rate, average_rate
        names = ["picks", "rate", "average_rate"]
        if drawn.noise is not None:
            host.displacement[k], host.sigma[k], host.mask[k] = drawn.noise
            names += ["displacement", "sigma", "mask"]
        if drawn.strained is not None:
            host.strained[k], host.back[k], host.valid[k] = drawn.strained
            names += ["strained", "back", "valid"]
        for name in names:
            getattr(here, name).copy_(getattr(host, name)[k], non_blocking=True)

    def _replay(self, variant: Variant) -> Callable[[], object]:
        if variant not in self._replays:
            self._replays[variant] = self._record(variant)
        return self._replays[variant]

    def _record(self, variant: Variant) -> Callable[[], object]:
        """Record a step; weights, moments, averages and counts are then as before."""
        objective, optimizer = self._objective, self._optimizer
        if not self._replays:
            # with real edges: the compiled functions compare themselves with the eager ones
            some = collate([self._samples[i] for i in self._host.picks[0].tolist()]).to(self._device)
            objective(some, torch.Generator().manual_seed(0))
        names = list(self._step_terms(variant))
        self._sums[variant] = {name: torch.zeros_like(self._count, dtype=torch.float64) for name in names}
        kept = [*self.weights, *(self._average or []), self._count, self._bad]
        kept += [value for sums in self._sums.values() for value in sums.values()]
        kept += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        before = [tensor.detach().clone() for tensor in kept]
        known = {p for p, state in optimizer.state.items() if state}
        replay = record(lambda: self._step(variant), self._device)
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
            for parameter, state in optimizer.state.items():
                if parameter not in known:  # its moments were made here; they begin at zero
                    for value in state.values():
                        if isinstance(value, Tensor):
                            value.zero_()
        return replay

    def _step_terms(self, variant: Variant) -> dict[str, Tensor]:
        here = self._here
        return self._objective.terms_given(self._frames.batch(here.picks), here.drawn(variant))

    def _step(self, variant: Variant) -> None:
        terms = self._step_terms(variant)
        gradients = torch.autograd.grad(terms["loss"], self.weights, allow_unused=True)
        for parameter, gradient in zip(self.weights, gradients, strict=True):
            parameter.grad = gradient
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self.weights, self._clip, norm)
        self._move_weights()
        self._follow()
        with torch.no_grad():
            broken = ~(torch.isfinite(terms["loss"].detach()) & torch.isfinite(norm))
            self._bad.copy_(torch.where(broken & (self._bad < 0), self._count, self._bad))
            self._count.add_(1)
            for name, total in self._sums[variant].items():
                total.add_(terms[name].detach())

    def _move_weights(self) -> None:
        """Call the optimiser with the learning rate in a tensor, which a recording reads anew each time."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = self._here.rate
        self._optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights."""
        if self._average is None:
            return
        distance = list(torch._foreach_sub(self._followed, self._average))
        torch._foreach_mul_(distance, self._here.average_rate.to(distance[0].dtype))
        torch._foreach_add_(self._average, distance)

    def _means(self, taken: Counter[Variant]) -> tuple[dict[str, Tensor], dict[str, int]]:
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for variant, sums in self._sums.items():
            for name, total in sums.items():
                if taken[variant]:
                    totals[name] = totals[name] + total if name in totals else total.clone()
                    counts[name] = counts.get(name, 0) + taken[variant]
        return {name: total / counts[name] for name, total in totals.items()}, counts


def set_form(optimizer: torch.optim.Optimizer, recorded: bool) -> None:
    """Choose how AdamW computes its step, the same in every form; the choice is no part of a run.

    Args:
        optimizer: its moments move along.
        recorded: for steps that are recorded, with a learning rate held in a tensor.
    """
    for group in optimizer.param_groups:
        on_gpu = recorded and group["params"][0].is_cuda
        # the many-tensor form takes no rate in a tensor on a CPU
        group.update(fused=on_gpu or None, capturable=on_gpu, foreach=not recorded)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            where = parameter.device if recorded else torch.device("cpu")
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(where)
