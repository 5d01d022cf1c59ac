"""Energy landscapes: grids of geometries, energies on them, figures, an interactive page, roughness."""

from ffpretrain.md.landscapes.api import landscape, write
from ffpretrain.md.landscapes.bands import collective_variable, free_energy, minimum_energy_path
from ffpretrain.md.landscapes.planes import modes_plane, plane_through, principal_plane, random_plane
from ffpretrain.md.landscapes.roughness import roughness
from ffpretrain.md.landscapes.scans import Coordinate, parse_coordinate, relaxed_scan, rigid_scan
from ffpretrain.md.landscapes.surface import Axis, Geometries, Landscape

__all__ = [
    "Axis",
    "Coordinate",
    "Geometries",
    "Landscape",
    "collective_variable",
    "free_energy",
    "landscape",
    "minimum_energy_path",
    "modes_plane",
    "parse_coordinate",
    "plane_through",
    "principal_plane",
    "random_plane",
    "relaxed_scan",
    "rigid_scan",
    "roughness",
    "write",
]
