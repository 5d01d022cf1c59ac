"""Draw the pictures of the README from the named models: python docs/gallery.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ffpretrain import FFCalculator
from ffpretrain.datasets.engines import open_engine
from ffpretrain.md import landscape, simulate
from ffpretrain.md.landscapes import principal_plane
from ffpretrain.md.landscapes.figures import draw
from ffpretrain.md.landscapes.grids import read_structures


def main() -> None:
    """Write every picture."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    plane = landscape("ndem-aspirin", points=61, extent=0.15)
    draw(plane).savefig(folder / "aspirin-plane.png", dpi=80)
    turn = landscape(
        "ndem-ethanol",
        scan=["dihedral 1 0 2 8 -180 180 73"],
        reference=open_engine("gfn2").calculator,
        reference_label="GFN2-xTB, another level of theory",
    )
    draw(turn).savefig(folder / "ethanol-hydroxyl.png", dpi=80)
    with TemporaryDirectory() as run:
        simulate(None, "ndem-aspirin", time_ps=1.0, seed=0, out=Path(run) / "md")
        grid, path = principal_plane(read_structures(Path(run) / "md" / "trajectory.traj"), points=41)
    # corners of the plane lie beyond what the dynamics visit
    motion = landscape(FFCalculator("ndem-aspirin", on_unfamiliar="ignore"), geometries=grid)
    draw(motion, path=path).savefig(folder / "aspirin-trajectory.png", dpi=80)


if __name__ == "__main__":
    main()
