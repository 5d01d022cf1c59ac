"""Format versions of the model card: one function for each step from an older one to the next.

When the card's layout changes, raise :data:`FORMAT_VERSION`, add a function here and keep a file of the old
format in ``tests/ffpretrain/data``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ffpretrain.errors import ArtifactError

FORMAT_VERSION = 2
"""The format this package writes, and the newest it reads."""


def _from_0(card: dict[str, Any]) -> dict[str, Any]:
    """Format 0, before the first release.

    The backbone was a name beside ``backbone_options``, the head was always the energy head, charge and spin
    were single numbers, the scale was called ``scale`` and there was one training set.
    """
    card = dict(card)
    card["backbone"] = {"name": card.pop("backbone", None), "options": card.pop("backbone_options", {})}
    card["head"] = {"name": "energy", "options": {}}
    card["charges"] = [card.pop("charge", 0)]
    card["spins"] = [card.pop("spin", 1)]
    card["energy_scale"] = card.pop("scale", 1.0)
    data = card.pop("training_data", None)
    card["training_data"] = [] if data is None else [data]
    return card


def _from_1(card: dict[str, Any]) -> dict[str, Any]:
    """Format 1 knew potentials only: it had no fields without an energy, nor what only they need."""
    return dict(card)


_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0, 1: _from_1}


def upgrade(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Bring a card to the current format.

    Args:
        raw: the card as read; one without ``format_version`` is a new card being made.
        where: the file, for messages.

    Raises:
        ArtifactError: a format newer than this package knows, or no format that ever was.
    """
    card = dict(raw)
    version = card.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version < 0:
        raise ArtifactError(f"{where}: format_version is {version!r}, no whole number; the file is damaged")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: was made by a newer ffpretrain (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade with: pip install -U ffpretrain"
        )
    for step in range(version, FORMAT_VERSION):
        card = _UPGRADES[step](card)
    card["format_version"] = FORMAT_VERSION
    return card
