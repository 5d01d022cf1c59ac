"""Does the artefact itself obey the symmetries, and are its forces the derivative of its energy?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ffpretrain.graphs import Graph
from ffpretrain.md.validation.result import Check, verdict
from ffpretrain.md.validation.subject import Subject
from ffpretrain.md.validation.thresholds import FORCES, SMOOTHNESS, SYMMETRY
from ffpretrain.testing import SymmetryError, physics, symmetry
from ffpretrain.testing.periodic import check_wrapping

#: Å, displacements from the structure, which may itself be symmetric or without forces
DISPLACEMENT = 0.08
#: Å of the finite differences: short, since a trained network may bend within 1e-3 Å; the reference energies,
#: which would cost digits, are left out
STEP = 1e-4


class Interactions:
    """A model without its reference energies, which would hide what the network gets wrong.

    Args:
        subject: evaluated in float64.

    Attributes:
        cutoff: Å.
        dtype: float64.
    """

    dtype = torch.float64

    def __init__(self, subject: Subject) -> None:
        self.model = subject.potential
        self.cutoff = subject.cutoff
        self.device = subject.runtime.device

    def __call__(self, graph: Graph) -> dict[str, Tensor]:
        """Return ``energy [B]`` eV of the network alone, and forces ``[N, 3]`` eV/Å."""
        out = self.model(graph.to(self.device))
        energy, offsets = out["energy"].detach(), getattr(self.model, "reference", None)
        if isinstance(offsets, Tensor) and "energies" in out:
            z, batch = graph.z.to(self.device), graph.batch.to(self.device)
            network = out["energies"].detach() - offsets[z]
            energy = network.new_zeros(graph.n_graphs).index_add(0, batch, network)
        return {"energy": energy.cpu(), "forces": out["forces"].detach().cpu().to(torch.float64)}


def check_symmetry(subject: Subject) -> Check:
    """Run the test kit's checks on the model in float64, on displaced copies of the structure."""
    model = Interactions(subject)
    graph, other = (subject.graph(atoms).to("cpu") for atoms in subject.displaced(2, DISPLACEMENT))
    elements = sorted({int(z) for z in subject.atoms.numbers})
    seed = subject.seed
    checks: dict[str, tuple[float, Callable[[], float | None]]] = {
        "translation": (SYMMETRY, lambda: symmetry.check_translation(model, graph, seed=seed)),
        "rotation": (SYMMETRY, lambda: symmetry.check_rotation(model, graph, seed=seed)),
        "reflection": (SYMMETRY, lambda: symmetry.check_reflection(model, graph, seed=seed)),
        "permutation": (SYMMETRY, lambda: symmetry.check_permutation(model, graph, seed=seed)),
        "batching": (SYMMETRY, lambda: symmetry.check_batching(model, [graph, other])),
        "forces": (FORCES, lambda: physics.check_forces(model, graph, step=STEP, tolerance=FORCES)),
        "cutoff": (SMOOTHNESS, lambda: physics.check_smoothness(model, elements, tolerance=SMOOTHNESS)),
    }
    if subject.periodic:
        checks["wrapping"] = (SYMMETRY, lambda: check_wrapping(model, graph, seed=seed))
    rows, bad = [], []
    for name, (tolerance, check) in checks.items():
        row: dict[str, object] = {"check": name, "tolerance": tolerance, "difference": None}
        try:
            row.update(difference=check(), status="passed")
        except SymmetryError as error:
            row.update(status="missed", error=str(error))
            bad.append(name)
        rows.append(row)
    summary = f"broken: {', '.join(bad)}" if bad else f"{', '.join(checks)} hold in float64"
    return Check("symmetry", verdict(not bad), summary, {"checks": rows})
