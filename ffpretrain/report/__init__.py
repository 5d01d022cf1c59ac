"""Reports: one HTML page that says what a model is, how it was trained, and how far it can be trusted."""

from ffpretrain.report.build import write_report

__all__ = ["write_report"]
