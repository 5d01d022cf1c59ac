"""Aspirin on a CUDA device: one molecule, replicas, the floor, and where the time goes.

Sections, in the order they run (``--only a,c`` picks some):
  a  torchmd-et 6x128: ms per model call and per step of velocity Verlet through ASE, TorchMD-Net beside it
  c  1,000 replicas (and fewer): µs per atom and evaluation, by Replicas and by TorchMD's External
  d  the floor: matrix products, copies, launches, and the fraction of it reached
  e  the kernels of one replay, from a profile
  b  painn 3x128 as a, without a peer
  p  TorchMD-Net's compile option (slow to build)
  f  options of the compiler, one molecule; only where asked for
Variants take turns in blocks in one process; the median over blocks counts. float32, TF32 off.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator
from common import machine, parser, write
from shared import aspirin, dynamics, torchmd_net_checkpoint
from speed import peer_pairs
from speed.kernels import DEVICE, alternate, device_rates, kernels_of, replay_cost

from ffpretrain import FFCalculator
from ffpretrain.cuda_graph import record
from ffpretrain.md import cuda as molecules
from ffpretrain.md.compiled import compile_function
from ffpretrain.md.paths import dense_function
from ffpretrain.md.replicas import Replicas
from ffpretrain.md.runtime import Runtime
from ffpretrain.md.torchmd import External
from ffpretrain.potential import Potential

ORDER = "acdebp"


class Bench:
    """What the sections share."""

    def __init__(self, quick: bool, folder: Path) -> None:
        self.block, self.blocks = (10, 5) if quick else (30, 12)
        self.quick, self.folder = quick, folder
        self.results: dict[str, Any] = {}
        self.numbers, self.positions = aspirin().numbers, aspirin().positions
        rng = np.random.default_rng(0)
        self.frames = self.positions + rng.normal(0.0, 0.02, (16, *self.positions.shape))
        self.ours: dict[str, dict[str, FFCalculator]] = {}
        self.no_peer = ""
        self.peer = "torchmd-net"
        try:
            self.peer += ", pair search by torch" if peer_pairs.install() else ""
            from ffpretrain.backbones.torchmd_et import from_torchmd_net

            content = torchmd_net_checkpoint(folder / "et.ckpt")
            self.et = from_torchmd_net(content["state_dict"], content["hyper_parameters"])
        except Exception as error:  # a peer may fail in any way; the reason is the result then
            self.no_peer = first_line(error)
            self.et = untrained("torchmd-et")

    def say(self, section: str, name: str, values: dict[str, Any]) -> None:
        self.results.setdefault(section, {})[name] = values
        print(f"{section}  {name}: " + ", ".join(f"{k} {v}" for k, v in values.items()), flush=True)

    def calculators(self, network: str) -> dict[str, FFCalculator]:
        """Return ours, ready: recorded compiled, recorded eager, plain eager."""
        if network not in self.ours:
            potential = self.et if network == "torchmd-et 6x128" else untrained("painn")
            made: dict[str, FFCalculator] = {}
            for name, option in (
                ("recorded eager", "auto"),
                ("plain eager", False),
                ("recorded compiled", True),
            ):
                started = time.perf_counter()
                made[name] = FFCalculator(potential, "cuda", "float32", option, on_unfamiliar="ignore")
                made[name].get_forces(aspirin())
                backend, seconds = made[name].backend, round(time.perf_counter() - started, 1)
                error = max(a.force_error / a.force_scale for a in made[name].runtimes[0].agreement.values())
                self.say("ready", f"{network} {name}", {"s": seconds, "as": backend, "error": f"{error:.1e}"})
            self.ours[network] = made
        return self.ours[network]


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def untrained(name: str) -> Potential:
    from ffpretrain.backbones import create_backbone

    torch.manual_seed(0)
    return Potential(create_backbone(name)).eval()


def calls(bench: Bench, runtime: Runtime) -> Callable[[], object]:
    """Return a model call with its transfers, at other positions every time."""
    count = iter(range(10**9))
    return lambda: runtime.evaluate(bench.numbers, bench.frames[next(count) % len(bench.frames)])


def one_molecule(
    bench: Bench, section: str, network: str, peers: dict[str, Callable[[], Calculator]]
) -> None:
    ours = bench.calculators(network)
    found = alternate(
        {name: calls(bench, calc.runtimes[0]) for name, calc in ours.items()}, bench.block, bench.blocks
    )
    for name, ms in found.items():
        bench.say(section, f"{network}, model call, {name}", {"ms": round(ms, 4)})
    runs = {name: dynamics(lambda calc=calc: calc) for name, calc in ours.items()}  # type: ignore[misc]
    for name, make in peers.items():
        try:
            runs[name] = dynamics(make)
        except Exception as error:  # as above
            bench.say(section, f"{network}, {name}", {"failed": first_line(error)})
    steps: dict[str, Callable[[], object]] = {
        name: (lambda run=run: run.run(1))
        for name, run in runs.items()  # type: ignore[misc]
    }
    found = alternate(steps, bench.block, bench.blocks)
    forces = {name: run.atoms.get_forces() for name, run in runs.items()}
    for name, ms in found.items():
        difference = float(np.abs(forces[name] - forces["plain eager"]).max())
        times = round(ms / found["recorded compiled"], 2)
        values = {"ms": round(ms, 4), "times_ours": times, "force_difference": f"{difference:.1e}"}
        bench.say(section, f"{network}, ASE step, {name}", values)


def theirs(bench: Bench, compile: bool) -> Calculator:
    if bench.no_peer:
        raise RuntimeError(bench.no_peer)
    from torchmdnet.calculators import TMDNETCalculator

    return TMDNETCalculator(str(bench.folder / "et.ckpt"), device="cuda", compile=compile)


def section_a(bench: Bench) -> None:
    one_molecule(bench, "a", "torchmd-et 6x128", {bench.peer: lambda: theirs(bench, False)})


def section_b(bench: Bench) -> None:
    one_molecule(bench, "b", "painn 3x128", {})


def section_p(bench: Bench) -> None:
    one_molecule(bench, "p", "torchmd-et 6x128", {f"{bench.peer}, compile": lambda: theirs(bench, True)})


def moving(evaluate: Callable[[torch.Tensor], torch.Tensor], positions: torch.Tensor) -> Callable[[], object]:
    """Return an evaluation of positions ``[R, N, 3]`` that follow the forces a little, on the device."""

    def step() -> None:
        positions.add_(evaluate(positions).to(positions.dtype).clamp(-1.0, 1.0), alpha=1e-5)

    step()
    return step


def replicas(bench: Bench, count: int, option: Any) -> tuple[str, Callable[[], object]]:
    made = Replicas(Runtime(bench.et, "cuda", "float32", option), bench.numbers, bench.positions, count)
    return made.backend, moving(lambda x: made(x)[1], copies(bench, count))


def external(bench: Bench, count: int, option: Any) -> tuple[str, Callable[[], object]]:
    numbers, box = np.tile(bench.numbers, (count, 1)), torch.zeros(count, 3, 3, device=DEVICE)
    made = External(bench.et, numbers, "cuda", "float32", option, on_unfamiliar="ignore")
    step = moving(lambda x: made.calculate(x, box)[1], copies(bench, count))
    return made.model.runtime.backend, step


def their_external(bench: Bench, count: int) -> tuple[str, Callable[[], object]]:
    import warp  # noqa: F401  the stand-in for it searches all pairs of a single molecule only
    from torchmdnet.calculators import External as Theirs

    numbers = torch.as_tensor(np.tile(bench.numbers, (count, 1)), device=DEVICE)
    made = Theirs(str(bench.folder / "et.ckpt"), numbers, "cuda", use_cuda_graph=True)
    return "torchmd-net, its CUDA graph", moving(
        lambda x: made.calculate(x.float(), None)[1].view_as(x), copies(bench, count)
    )


def copies(bench: Bench, count: int) -> torch.Tensor:
    rng = np.random.default_rng(1)
    return torch.tensor(
        bench.positions + rng.normal(0.0, 0.02, (count, *bench.positions.shape)), device=DEVICE
    )


def section_c(bench: Bench) -> None:
    for count in (1000, 100, 10, 1):
        makes: dict[str, Callable[[], tuple[str, Callable[[], object]]]] = {}
        compiled = count == 1000 or not bench.quick
        for name, option in (("recorded eager", "auto"), ("plain eager", False), ("recorded compiled", True)):
            if option is not True or compiled:
                makes[f"Replicas, {name}"] = lambda o=option, n=count: replicas(bench, n, o)  # type: ignore[misc]
            if option is not False and (option == "auto" or count == 1000):
                makes[f"External, {name}"] = lambda o=option, n=count: external(bench, n, o)  # type: ignore[misc]
        if not bench.no_peer:
            makes["External of torchmd-net"] = lambda n=count: their_external(bench, n)  # type: ignore[misc]
        for name, make in makes.items():
            label, started = f"{count} replicas, {name}", time.perf_counter()
            try:
                backend, step = make()
                ready = time.perf_counter() - started
                ms = alternate({"": step}, 5 if count > 10 else bench.block, 4)[""]
            except Exception as error:  # memory, or a peer
                bench.say("c", label, {"failed": first_line(error)})
            else:
                us = ms * 1e3 / count / len(bench.numbers)
                values = {"ms": round(ms, 3), "us_per_atom": round(us, 3), "ready_s": round(ready, 1)}
                bench.say("c", label, {**values, "as": backend})
            step = make = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()


def flops_of(bench: Bench, network: str) -> int:
    """Return the operations in matrix products of one evaluation of all pairs, with forces."""
    from torch.utils.flop_counter import FlopCounterMode

    model = bench.calculators(network)["plain eager"].runtimes[0].model
    z, pos = (torch.as_tensor(x, device=DEVICE) for x in (bench.numbers, bench.positions))
    with FlopCounterMode(display=False) as counter:
        dense_function(model, z)(pos)
    return counter.get_total_flops()


def section_d(bench: Bench) -> None:
    rate, copy = device_rates()
    one, many = replay_cost(1), replay_cost(1001)
    kernel = (many - one) / 1000
    device = {"fp32_tflop_per_s": round(rate / 1e12, 1), "copy_gb_per_s": round(copy / 1e9)}
    costs = {"replay_us": round(one * 1e6, 2), "kernel_us": round(kernel * 1e6, 3)}
    bench.say("d", "device", {**device, **costs})
    for network in ("torchmd-et 6x128", *(["painn 3x128"] if "painn 3x128" in bench.ours else [])):
        flops = flops_of(bench, network)
        for name in ("recorded compiled", "recorded eager"):
            call = calls(bench, bench.calculators(network)[name].runtimes[0])
            ms = alternate({"": call}, bench.block, 4)[""]
            count = len(kernels_of(call))
            arithmetic, launches = flops / rate * 1e3, (one + count * kernel) * 1e3
            floor = {"gflop": round(flops / 1e9, 3), "arithmetic_ms": round(arithmetic, 4)}
            launched = {"kernels": count, "launches_ms": round(launches, 4)}
            reached = {"ms": round(ms, 4), "fraction": round((arithmetic + launches) / ms, 2)}
            bench.say("d", f"{network}, {name}", {**floor, **launched, **reached})
        per_atom = flops / rate * 1e6 / len(bench.numbers)
        bench.say("d", f"{network}, many replicas", {"arithmetic_us_per_atom": round(per_atom, 3)})


def breakdown(bench: Bench, label: str, function: Callable[[], object]) -> None:
    found = kernels_of(function)
    grouped: dict[str, list[float]] = {}
    for name, us in found:
        grouped.setdefault(name, []).append(us)
    total = sum(us for _, us in found)
    bench.say("e", label, {"kernels": len(found), "busy_us": round(total, 1)})
    top = sorted(grouped.items(), key=lambda item: -sum(item[1]))[:12]
    for name, times in top:
        share = {
            "times": len(times),
            "us": round(sum(times), 1),
            "percent": round(100 * sum(times) / total, 1),
        }
        bench.say("e", f"{label} | {name[:90]}", share)


def section_e(bench: Bench) -> None:
    for name, calc in bench.calculators("torchmd-et 6x128").items():
        if name != "plain eager":
            breakdown(bench, f"aspirin, {name}", calls(bench, calc.runtimes[0]))
    for name, option in (("recorded eager", "auto"), ("recorded compiled", True)):
        breakdown(bench, f"1000 replicas, {name}", replicas(bench, 1000, option)[1])
        torch.cuda.empty_cache()


def section_f(bench: Bench) -> None:
    potential = bench.calculators("torchmd-et 6x128")["plain eager"].runtimes[0].model
    z, pos = (torch.as_tensor(x, device=DEVICE) for x in (bench.numbers, bench.positions))
    plain = molecules.MoleculeGraph(potential, z, pos)(pos).forces
    for options in (
        {},
        {"coordinate_descent_tuning": True},
        {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"},
        {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON", "epilogue_fusion": True},
    ):
        started, label = time.perf_counter(), f"options {options or 'none'}"
        try:
            built = compile_function(dense_function(potential, z), pos, options)
            if built is None:
                continue
            replay = record(lambda built=built: built(pos), DEVICE)  # type: ignore[misc]
            difference = float((replay()[1] - plain).abs().max())
            ready = time.perf_counter() - started
            ms = alternate({"": replay}, bench.block, bench.blocks)[""]
            values = {"ms": round(ms, 4), "kernels": len(kernels_of(replay)), "ready_s": round(ready, 1)}
            bench.say("f", label, {**values, "force_difference": f"{difference:.1e}"})
        except Exception as error:  # a combination may be unknown to this version
            bench.say("f", label, {"failed": first_line(error)})


SECTIONS = {
    "a": section_a,
    "b": section_b,
    "c": section_c,
    "d": section_d,
    "e": section_e,
    "f": section_f,
    "p": section_p,
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--only", default=",".join(ORDER), help="sections, such as a,c; see the file's head")
    made.add_argument("--quick", action="store_true", help="fewer steps, compiled replicas only for 1,000")
    options = made.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    if unknown := [name for name in wanted if name not in SECTIONS]:
        made.error(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device and torch finds none", file=sys.stderr)
        raise SystemExit(2)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.quick, Path(folder))
        if bench.no_peer:
            bench.say("peer", "torchmd-net", {"failed": bench.no_peer})
        for name in sorted(wanted, key=(ORDER + "f").index):
            try:
                SECTIONS[name](bench)
            except Exception as error:  # the other sections are worth having all the same
                bench.say(name, "section", {"failed": first_line(error)})
            print(f"-- {name} done after {time.perf_counter() - started:.0f} s", flush=True)
    content = {
        "machine": machine(),
        "what": "aspirin, float32, TF32 off, changing positions; one molecule: transfers included",
        "timed_steps": bench.block * bench.blocks,
        "results": bench.results,
    }
    write("speed_cuda", content, started, options.out)


if __name__ == "__main__":
    main()
