"""How far a trained potential can be trusted: engines, symmetry, conservation, stability, vibrations."""

from ffpretrain.md.validation.plan import Plan
from ffpretrain.md.validation.result import Check
from ffpretrain.md.validation.run import ValidationResult, validate

__all__ = ["Check", "Plan", "ValidationResult", "validate"]
