"""The one-page report: a self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ffpretrain.md.validation.figures import draw, embedded
from ffpretrain.md.validation.result import Check

TITLES = {
    "engines": "Engines agree",
    "symmetry": "Symmetry and forces",
    "stretch": "Smooth at the cutoff",
    "vibrations": "Vibrations",
    "nve": "Energy is conserved",
    "stability": "Replicas are stable",
    "distances": "Distances as in the data",
    "own-frames": "Error on own frames",
}
_COLOURS = {
    "passed": "#1a7f37",
    "missed": "#c0392b",
    "undecided": "#b35900",
    "reported": "#1f5fa8",
    "not run": "#777777",
}
_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:1.5em auto;max-width:60em;padding:0 1em;color:#222}
h1{font-size:1.4em;margin:0 0 .2em}table{border-collapse:collapse;width:100%;margin:.8em 0}
td,th{text-align:left;padding:.25em .6em;border-bottom:1px solid #ddd;vertical-align:top}
.s{font-weight:600;white-space:nowrap}img{width:100%}small{color:#666}
"""


def html_report(summary: Mapping[str, Any], checks: Mapping[str, Check]) -> str:
    """Return the report as HTML that needs no other file.

    Args:
        summary: what ``validation.json`` holds.
        checks: by name.
    """
    model, structure, plan = summary["model"], summary["structure"], summary["plan"]
    verdict = "passed" if summary["passed"] else "missed"
    head = f"{escape(model['name'])} <span style='color:{_COLOURS[verdict]}'>{verdict}</span>"
    about = [
        f"{structure['formula']}, {structure['n_atoms']} atoms",
        model["level_of_theory"] or "level of theory not stated",
        f"level {plan['name']}",
        f"{summary['dtype']} on {summary['device']}",
        f"seed {summary['seed']}",
        f"ffpretrain {summary['package_version']}",
    ]
    rows = [
        (
            escape(TITLES.get(name, name)),
            f"<span class='s' style='color:{_COLOURS[check.status]}'>{check.status}</span>",
            escape(check.summary),
        )
        for name, check in checks.items()
    ]
    figure = draw(checks)
    plots = f"<img alt='plots' src='{embedded(figure)}'>" if figure is not None else ""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{escape(model['name'])}: validation</title><style>{_STYLE}</style></head>"
        f"<body><h1>{head}</h1>"
        f"<small>{escape(' · '.join(about))}</small>{_table(rows)}{plots}{_engines(checks)}"
        f"<small>weights {escape(model['fingerprint'][:16])}…; thresholds: {_thresholds(summary)}</small>"
        "</body></html>\n"
    )


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return a table of cells that are HTML already."""
    top = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _engines(checks: Mapping[str, Check]) -> str:
    check = checks.get("engines")
    if check is None:
        return ""
    rows = [(row["engine"], row["version"] or "", row) for row in check.measured.get("engines", [])]
    for row in check.measured.get("paths", []):
        rows.append((f"{'dynamics' if row['dynamics'] else 'runtime'}: {row['path']}", row["dtype"], row))
    filled = [
        (name, version, row["status"], _number(row.get("energy_error")), _number(row.get("force_error")))
        for name, version, row in rows
    ]
    cells = [[escape(str(cell)) for cell in row] for row in filled]
    return _table(cells, ("against float64", "version", "", "energy (eV)", "forces (eV/Å)"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _thresholds(summary: Mapping[str, Any]) -> str:
    return escape(
        ", ".join(
            f"{name.replace('_', ' ')} {entry['value']:g} {entry['unit']}"
            for name, entry in summary["thresholds"].items()
        )
    )
