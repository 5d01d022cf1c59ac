"""Seconds until the command line answers, the package is imported, and the first energy is there.

Each is a fresh process, five times; the smallest and the median are reported.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import machine, parser, write

CASES = {
    "ffpretrain --help": ["-m", "ffpretrain", "--help"],
    "import ffpretrain": ["-c", "import ffpretrain"],
    "first energy of ndem-aspirin": [
        "-c",
        "from ase import Atoms\n"
        "from ffpretrain import FFCalculator\n"
        "from ffpretrain.artifacts import read_card\n"
        "g = read_card('ndem-aspirin').reference_geometry\n"
        "a = Atoms(g.numbers, g.positions); a.calc = FFCalculator('ndem-aspirin')\n"
        "a.get_potential_energy()\n",
    ],
}


def main() -> None:
    options = parser(__doc__).parse_args()
    started, content = time.perf_counter(), {"machine": machine(), "unit": "s", "cases": {}}
    for name, arguments in CASES.items():
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begun)
        content["cases"][name] = {
            "smallest": round(min(times), 3),
            "median": round(statistics.median(times), 3),
        }
        print(f"{name}: {min(times):.2f} s (median {statistics.median(times):.2f} s)")
    write("startup", content, started, options.out)


if __name__ == "__main__":
    main()
