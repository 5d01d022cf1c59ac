"""What every benchmark shares: the description of the machine and the result file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).parent / "results"


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--out", type=Path, help="result file; default benchmarks/results/NAME.json")
    return made


def stop(message: str) -> NoReturn:
    """End the benchmark with one line and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def need(*modules: str) -> None:
    """End the benchmark where a package of a peer is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            stop(f"{name} is not installed; benchmarks/README.md says what a comparison needs")


def machine() -> dict[str, Any]:
    import torch

    import ffpretrain

    cpu = platform.processor() or platform.machine()
    flags: list[str] = []
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
        told = {key.strip(): value.strip() for key, value in lines}
        cpu, flags = told.get("model name", cpu), told.get("flags", "").split()
    return {
        "cpu": cpu,
        "vectors": next((name for name in ("avx512f", "avx2") if name in flags), None),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ffpretrain": ffpretrain.__version__,
        "load_average_before": os.getloadavg()[0],
    }


def write(name: str, content: dict[str, Any], started: float, out: Path | None) -> None:
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, **content, "seconds": round(time.perf_counter() - started, 1)}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written to {path}")
