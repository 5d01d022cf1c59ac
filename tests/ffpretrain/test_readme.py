"""The Python in the README runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[2] / "README.md"


def test_every_python_block_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, str(README), "exec"), names)
        atoms = names["atoms"]
        assert np.isfinite(atoms.get_total_energy())  # type: ignore[attr-defined]
        assert 50 < atoms.get_temperature() < 800  # type: ignore[attr-defined]
