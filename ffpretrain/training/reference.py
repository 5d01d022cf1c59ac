"""The table of recipe fields in the documentation, made from the fields themselves.

``python -m ffpretrain.training.reference docs/training.md`` writes it anew between its two marks.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ffpretrain.training.config import Recipe, section_of

BEGIN, END = "<!-- fields: made by ffpretrain.training.reference -->", "<!-- end of fields -->"
_NAMES = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "file",
    dict: "mapping",
}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def field_table() -> str:
    """Return a Markdown table of all recipe fields: key, default, values, meaning."""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key, field in _fields(Recipe, ""):
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{key}` | {_default(field)} | {_values(field)} | {meaning} |")
    return "\n".join(rows)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from _fields(section, f"{prefix}{name}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "`null`"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _values(field: FieldInfo) -> str:
    kind = _kind(field.annotation)
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(rule, name)
    ]
    return " ".join([kind, " and ".join(bounds)]).strip()


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(a) for a in arguments if a is not type(None)))
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    return _NAMES.get(origin or annotation, str(annotation))


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Put text between two marks of a Markdown file, in place of what is there."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")


def main(path: Path) -> None:
    """Write the table anew in a Markdown file that holds the two marks."""
    write_between(path, BEGIN, END, field_table())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
