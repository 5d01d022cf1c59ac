"""Use an installed wheel as a user would: commands, a named model's energy, everything from one copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ENERGY = """
import sys
from ase.build import molecule
from ffpretrain import FFCalculator, list_models
import ffpretrain.md, ffpretrain.datasets
atoms = molecule("CH3CH2OH")
atoms.calc = FFCalculator("ndem-ethanol")
energy, forces = atoms.get_potential_energy(), atoms.get_forces()
assert energy < -1000.0 and abs(forces.sum(axis=0)).max() < 1e-3, (energy, forces)
homes = [m.__file__ for m in (ffpretrain, ffpretrain.md, ffpretrain.datasets)]
print(f"{energy:.4f} eV with ndem-ethanol, one of {list_models()}; from", *homes)
"""


def output(*command: str) -> str:
    """Run a command in the present folder and return what it prints; stop where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)[:200]}\nexit code {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def main() -> None:
    """Run the checks; the only argument is the path of the console script."""
    script = sys.argv[1]
    verbs = "Usage" in output(script, "--help") and output(script, "--version").strip()
    models = json.loads(output(script, "models", "--json"))
    names = [model["name"] for model in models["models"]]
    report = json.loads(output(script, "doctor", "--json"))
    site = Path(sys.prefix)
    if not Path(report["location"]).is_relative_to(site):
        sys.exit(f"the console script uses {report['location']}, not the wheel in {site}")
    print(verbs, "| models:", *names, "| problems:", report["problems"] or "none", "|", report["location"])
    print(output(sys.executable, "-P", "-c", ENERGY), end="")  # -P: the wheel, whatever the folder
    print(output(sys.executable, "-c", ENERGY), end="")  # in the repository root: the checkout


if __name__ == "__main__":
    main()
