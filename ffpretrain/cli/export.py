"""``ffpretrain export``: a model as a file that another program runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Target(StrEnum):
    """The program that reads the file."""

    OPENMM_TORCH = "openmm-torch"


def export(
    model: Annotated[str, typer.Argument(help="Name of a model or a model file.")],
    to: Annotated[Target, typer.Option(help="The program that reads it: openmm-torch.", show_choices=False)],
    out: Annotated[Path, typer.Option(help="The new file, such as aspirin.pt.")],
    numbers: Annotated[
        str | None,
        typer.Option(help="Atomic numbers in OpenMM's order, as 8,1,1; without it the model's own molecule."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write MODEL for another program; openmm-torch: the TorchScript file that TorchForce takes.

    It is called with positions and box vectors in nm and returns the energy in kJ/mol.
    """
    import json

    from ffpretrain.errors import ConfigError
    from ffpretrain.md.export import export_torch_force

    if out.exists() and not overwrite:
        raise ConfigError(f"{out}: exists; choose another name or give --overwrite")
    written = export_torch_force(model, out, None if numbers is None else _atomic_numbers(numbers))
    if json_output:
        answer = {
            "schema": "ffpretrain-export",
            "version": 1,
            "to": to.value,
            "path": str(written.path),
            "model": model,
            "numbers": written.numbers,
            "bytes": written.path.stat().st_size,
            "units": {"positions": "nm", "boxvectors": "nm", "energy": "kJ/mol"},
            "agreement": [found.as_dict() for found in written.agreement],
            "agreement_units": {"energy": "eV", "forces": "eV/angstrom"},
        }
        typer.echo(json.dumps(answer))
        return
    worst = max(found.energy_error for found in written.agreement)
    force = max(found.force_error for found in written.agreement)
    typer.echo(
        f"{written.path}: {len(written.numbers)} atoms, {written.path.stat().st_size / 1e6:.1f} MB; nm to "
        f"kJ/mol; differs from the model by at most {worst:.1e} eV and {force:.1e} eV/Å"
    )


def _atomic_numbers(text: str) -> list[int]:
    """Read ``8,1,1``."""
    from ffpretrain.errors import ConfigError

    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"--numbers {text!r}: give atomic numbers separated by commas, as 8,1,1") from None
