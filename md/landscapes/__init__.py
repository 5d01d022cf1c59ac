"""Energy landscapes: grids of geometries, energies on them, figures, an interactive page, roughness."""

from ffpretrain.md.landscapes.api import landscape
from ffpretrain.md.landscapes.bands import minimum_energy_path
from ffpretrain.md.landscapes.files import read_folder, write
from ffpretrain.md.landscapes.grids import along
from ffpretrain.md.landscapes.histograms import (
    FreeEnergy,
    collective_variable,
    free_energy,
    free_energy_landscape,
    standard_error,
)
from ffpretrain.md.landscapes.learned import learned_plane, noise_scale
from ffpretrain.md.landscapes.noise_figure import draw_noise
from ffpretrain.md.landscapes.planes import modes_plane, plane_through, principal_plane, random_plane
from ffpretrain.md.landscapes.roughness import roughness
from ffpretrain.md.landscapes.scans import Coordinate, parse_coordinate, relaxed_scan, rigid_scan
from ffpretrain.md.landscapes.surface import Axis, Geometries, Landscape

__all__ = [
    "Axis",
    "Coordinate",
    "FreeEnergy",
    "Geometries",
    "Landscape",
    "along",
    "collective_variable",
    "draw_noise",
    "free_energy",
    "free_energy_landscape",
    "landscape",
    "learned_plane",
    "minimum_energy_path",
    "modes_plane",
    "noise_scale",
    "parse_coordinate",
    "plane_through",
    "principal_plane",
    "random_plane",
    "read_folder",
    "relaxed_scan",
    "rigid_scan",
    "roughness",
    "standard_error",
    "write",
]
