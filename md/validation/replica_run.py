"""Replicas in motion: one batch, its counts, the frames it keeps, and its state between two steps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffpretrain.datasets._io import existing_file, read_npz
from ffpretrain.md.replica_langevin import ReplicaLangevin, maxwell_boltzmann
from ffpretrain.md.replicas import Replicas
from ffpretrain.md.validation.bonds import Limits
from ffpretrain.md.validation.distances import Distances
from ffpretrain.md.validation.plan import Plan
from ffpretrain.md.validation.state import write_arrays

if TYPE_CHECKING:
    from ase import Atoms

#: part of each run that is left out of averages, for the start to be forgotten
EQUILIBRATION = 0.2
#: steps between two structures whose distances are counted
COUNTED = 20
#: seconds between two states written
SAVED = 20.0

Array = NDArray[np.float64]


class Kept(NamedTuple):
    """A frame of the trajectory: which replica, when (step) and where (``[N, 3]`` Å)."""

    replica: int
    step: int
    positions: Array


class ReplicaRun:
    """Langevin dynamics of all replicas, from the first step or from a state on disk.

    Args:
        replicas: evaluates them.
        atoms: the structure.
        starts: ``[R, N, 3]`` Å.
        temperatures: ``[R]`` K.
        limits: on bonds and distances.
        plan: length, timestep and friction.
        seed: of velocities and thermostat.
        path: of the state; read if it is there.
        counting: whether interatomic distances are counted.

    Attributes:
        step: steps done.
        failures: what ended each replica that stopped, in order.
        kept: frames, evenly over time, replicas in turn.
        kelvin: sum of the kinetic temperatures after the equilibration ``[R]``.
    """

    def __init__(
        self,
        replicas: Replicas,
        atoms: Atoms,
        starts: Array,
        temperatures: Array,
        limits: Limits,
        plan: Plan,
        seed: int,
        path: Path,
        counting: bool = True,
    ) -> None:
        device = replicas.device
        self.plan, self.path, self.limits, self.seed = plan, path, limits, seed
        self.temperatures, self.counting = temperatures, counting
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        self.failures: list[dict[str, Any]] = []
        self.kept: list[Kept] = []
        self.distances = Distances(len(atoms), len(starts), device)
        self.kelvin = torch.zeros(len(starts), dtype=torch.float64, device=device)
        self.averaged = torch.zeros(len(starts), dtype=torch.int64, device=device)
        masses = torch.tensor(atoms.get_masses(), device=device)
        kelvin = torch.tensor(temperatures, dtype=torch.float64, device=device)
        positions = torch.tensor(starts, dtype=torch.float64, device=device)
        velocities = maxwell_boltzmann(masses, kelvin, self.generator)
        alive = None
        if path.exists():
            positions, velocities, alive = self._load(device)
        self.motion = ReplicaLangevin(
            replicas, masses, positions, velocities, kelvin, plan.timestep, plan.friction,
            self.generator, limits.allow, alive,
        )  # fmt: skip
        if self.step == 0:
            self._note(~self.motion.alive)

    def run(self, report: Callable[[int, str], None]) -> None:
        """Do the steps that are left; the state is written now and then, and at the end."""
        steps, saved = self.plan.stability_steps, time.monotonic()
        every = max(1, steps // self.plan.relabelled)
        while self.step < steps and bool(self.motion.alive.any()):
            stopped = self.motion.step()
            self.step += 1
            self._note(stopped)
            self._count(steps)
            if self.step % every == 0:
                self._keep(self.step // every - 1)
            now = time.monotonic()
            if now - saved > SAVED:
                self._save()
                saved = now
            if self.step % 10 == 0:
                report(self.step, f"{int(self.motion.alive.sum())} of {len(self.temperatures)} alive")
        self._save()

    def mean_temperatures(self) -> Array:
        """Return the mean kinetic temperature of each replica in K, NaN where nothing was averaged."""
        return np.asarray((self.kelvin / self.averaged).cpu().numpy())

    def _note(self, stopped: Tensor) -> None:
        """Write down why replicas stopped."""
        for replica in stopped.nonzero().flatten().tolist():
            attempted = self.motion.attempted[replica]
            cause = self.limits.explain(attempted) or "energy or forces are not finite"
            finite = bool(torch.isfinite(attempted).all())
            frame = attempted if finite else self.motion.positions[replica]
            self.failures.append(
                {
                    "replica": replica,
                    "temperature": float(self.temperatures[replica]),
                    "step": self.step,
                    "time": self.step * 1e-3 * self.plan.timestep,
                    "cause": cause,
                    "positions": frame.cpu().tolist(),
                }
            )

    def _count(self, steps: int) -> None:
        if self.step <= EQUILIBRATION * steps:
            return
        alive = self.motion.alive
        self.kelvin += torch.where(alive, self.motion.temperature(), 0.0)
        self.averaged += alive
        if self.counting and self.step % COUNTED == 0:
            self.distances.add(self.motion.positions, alive)

    def _keep(self, number: int) -> None:
        """Keep a frame of the replica whose turn it is, while it lives."""
        replica = number % len(self.temperatures)
        if bool(self.motion.alive[replica]):
            self.kept.append(Kept(replica, self.step, self.motion.positions[replica].cpu().numpy().copy()))

    def _save(self) -> None:
        arrays = {
            "positions": self.motion.positions.cpu().numpy(),
            "velocities": self.motion.velocities.cpu().numpy(),
            "alive": self.motion.alive.cpu().numpy(),
            "generator": self.generator.get_state().numpy(),
            "counts": self.distances.counts.cpu().numpy(),
            "kelvin": self.kelvin.cpu().numpy(),
            "averaged": self.averaged.cpu().numpy(),
            "kept": np.array([frame.positions for frame in self.kept]),
            "kept_from": np.array([frame[:2] for frame in self.kept], dtype=np.int64).reshape(-1, 2),
        }
        meta = np.array(json.dumps({"step": self.step, "failures": self.failures}))
        write_arrays(self.path, meta=meta, **arrays)

    def _load(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Take back a state; return positions, velocities and which replicas live."""
        arrays = read_npz(self.path)
        meta = json.loads(str(arrays["meta"]))
        self.step, self.failures = meta["step"], meta["failures"]
        self.generator.set_state(torch.from_numpy(arrays["generator"]))
        self.distances.counts = torch.tensor(arrays["counts"], device=device)
        self.kelvin = torch.tensor(arrays["kelvin"], device=device)
        self.averaged = torch.tensor(arrays["averaged"], device=device)
        self.kept = _kept(arrays)
        names = ("positions", "velocities", "alive")
        positions, velocities, alive = (torch.tensor(arrays[name], device=device) for name in names)
        return positions, velocities, alive


def read_kept(path: Path) -> list[Kept]:
    """Return the frames that a state on disk holds.

    Raises:
        DataError: the file is missing or damaged.
    """
    return _kept(read_npz(existing_file(path, "state of the replicas")))


def _kept(arrays: dict[str, NDArray[Any]]) -> list[Kept]:
    return [
        Kept(int(replica), int(step), positions)
        for (replica, step), positions in zip(arrays["kept_from"], arrays["kept"], strict=True)
    ]
