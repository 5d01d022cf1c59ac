"""The demonstration: noise, labels, held-out errors and dynamics, on bundled data, in a few minutes."""

from __future__ import annotations

from ffpretrain.demo.run import run_demo

__all__ = ["run_demo"]
