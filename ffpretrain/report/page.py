"""One self-contained HTML page: nothing is loaded when it is opened, and it prints well."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root{color-scheme:light;--line:#d8dde3;--ink:#1c2733;--soft:#5b6875;--accent:#0072b2}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);max-width:60rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.7rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:.4rem;
border-top:1px solid var(--line)}
p.lead{color:var(--soft);margin:.2rem 0 1rem}nav a{margin-right:1rem;color:var(--accent);text-decoration:none}
table{border-collapse:collapse;margin:.6rem 0;font-size:.92rem}
th,td{border-bottom:1px solid var(--line);padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top}
td.number{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:1rem 0;break-inside:avoid}figure svg{max-width:100%;height:auto}
figcaption{color:var(--soft);font-size:.9rem}
button{font:inherit;padding:.15rem .7rem;margin:0 .4rem .4rem 0;border:1px solid var(--line);
border-radius:.4rem;background:#fff;cursor:pointer}button[aria-pressed=true]{background:var(--accent);color:#fff}
.plot{position:relative}.plot output{display:block;min-height:1.5em;color:var(--soft);font-size:.9rem}
canvas{width:100%;max-width:34rem;height:auto;touch-action:none}
.good{color:#00663f}.bad{color:#a33b00;font-weight:600}
@media print{nav,button,.hint,.plot output{display:none}.plot[data-landscape] output{display:block}
.plot[data-landscape] canvas{width:49%}body{max-width:none;padding:0}h2{break-after:avoid}}
"""


class Page:
    """Collects sections; :meth:`html` gives the page.

    Args:
        title: heading and window title.
        lead: one line below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self.sections: list[tuple[str, str, str]] = []
        self.scripts: dict[str, str] = {}

    def add(self, name: str, *parts: str) -> None:
        """Add a section; parts are HTML."""
        anchor = re.sub(r"\W+", "-", name.lower()).strip("-")
        self.sections.append((anchor, name, "\n".join(parts)))

    def use(self, name: str, script: str) -> None:
        """Put a script into the page, once for each name."""
        self.scripts[name] = script

    def html(self) -> str:
        """Return the whole page."""
        links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in self.sections)
        body = "".join(
            f'<section id="{anchor}"><h2>{escape(name)}</h2>\n{content}\n</section>\n'
            for anchor, name, content in self.sections
        )
        scripts = "".join(f"<script>{script}</script>" for script in self.scripts.values())
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            # an icon of nothing, so that no browser asks for one
            '<link rel="icon" href="data:,">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head><body>\n"
            f'<h1>{escape(self.title)}</h1><p class="lead">{escape(self.lead)}</p><nav>{links}</nav>\n'
            f"{body}{scripts}</body></html>\n"
        )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; numbers are given four significant digits and stand to the right."""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table of names and values; empty values are left out."""
    kept = [(name, value) for name, value in values.items() if value not in (None, "", [], {})]
    rows = "".join(f"<tr><th>{escape(name)}</th>{_cell(value)}</tr>" for name, value in kept)
    return f"<table><tbody>{rows}</tbody></table>"


def drawing(figure: Figure, caption: str, place: str = "") -> str:
    """Return a figure as SVG inside the page.

    Args:
        figure: by matplotlib.
        caption: one line; also what a screen reader says.
        place: tells figures of one caption in a page apart.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    # text stays text, and ids do not change from run to run
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    label = escape(caption, quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>{_own_ids(svg, caption + place)}<figcaption>{escape(caption)}</figcaption></figure>"


def _own_ids(svg: str, salt: str) -> str:
    """Make ids unique in the page: several figures name their clip paths and axes alike."""
    import hashlib

    prefix = "f" + hashlib.sha256(salt.encode()).hexdigest()[:8] + "-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(url\(#|xlink:href="#|href="#)(?!' + prefix + ")", rf"\g<1>{prefix}", svg)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    kind = {"passed": ' class="good"', "missed": ' class="bad"'}.get(value, "")
    return f"<td{kind}>{escape(str(value))}</td>"
