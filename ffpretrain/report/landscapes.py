"""The landscapes of a report: the same figures to turn and read as on a landscape's own page."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ffpretrain.report.page import Page
from ffpretrain.report.sections import pictures_section

#: energies and geometries of each landscape, fewer than on its own page: a report may hold several
MOST_POINTS, MOST_FRAMES = 4000, 450
#: pictures of what the figures to turn show
_DRAWN = {"landscape", "noise"}


def add_landscape(page: Page, folder: Path) -> None:
    """Add a section with what ``ffpretrain landscape`` wrote into a folder, and other pictures in it.

    Args:
        page: of the report.
        folder: with ``landscape.json``, or with pictures alone.

    Raises:
        DataError: the landscape cannot be read.
    """
    if not (folder / "landscape.json").is_file():
        page.add(folder.name, *pictures_section(folder))
        return
    # here, because the way from reports to landscapes is the exception: they stand on this package
    from ffpretrain.md.landscapes.files import read_folder
    from ffpretrain.md.landscapes.page import noise_section, numbers_table, viewer_script, viewers

    landscapes, unit, path = read_folder(folder)
    note = landscapes[0].geometries.note
    parts = [f"<p>{escape(note)}</p>"] if note else []
    parts += viewers(landscapes, unit, path, MOST_POINTS, MOST_FRAMES)
    parts += noise_section(landscapes, unit, folder.name)
    if any(one.roughness or one.errors() for one in landscapes):
        parts.append(numbers_table(landscapes, unit))
    page.add(folder.name, *parts, *pictures_section(folder, without=_DRAWN))
    page.use("viewer", viewer_script())
