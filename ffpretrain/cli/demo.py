"""``ffpretrain demo``: the whole chain on bundled data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("ffpretrain-demo"),
) -> None:
    """Pretrain, fine-tune, evaluate and run a small model on bundled data, in a few minutes.

    Needs nothing but the package: no download, no GPU.
    """
    from ffpretrain.demo import run_demo

    run_demo(out, typer.echo)
