"""The folder where downloaded datasets are kept."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT_VARIABLE = "FFPRETRAIN_CACHE"


def cache_folder() -> Path:
    """Return the cache folder: ``FFPRETRAIN_CACHE``, else the platform's; it may not exist yet."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import pooch

    return Path(pooch.os_cache("ffpretrain"))
