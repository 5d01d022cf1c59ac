"""Recipe files: strict YAML, dotted changes on top of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ffpretrain.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-3 as a number, as YAML 1.2 does."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, (str, int, float, bool)):
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            seen.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value
    }


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top is a mapping. Nothing in it is executed.

    Raises:
        ConfigError: the file is missing, unreadable, no YAML, no mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({(error.strerror or str(error)).lower()}); give a recipe file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text; give a recipe file in YAML") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path}: holds {found}, not keys and values; see the shipped recipes")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Args:
        text: of one document.
        where: for messages.

    Raises:
        ConfigError: it is no YAML, or gives a key twice; the line is named.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{place}: {problem}; correct the YAML") from error
    except (RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: is no recipe ({error}); correct the YAML") from error


def parse_override(word: str) -> tuple[str, Any]:
    """Return key and value of ``key=value``; the value is read as YAML.

    Raises:
        ConfigError: another form.
    """
    key, equals, text = word.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"{word!r} is not of the form key=value, such as trainer.max_steps=1000")
    return key, parse_yaml(text, f"the value of {key}")


def apply_changes(raw: dict[str, Any], changes: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe with changes made to it.

    Args:
        raw: nested dictionaries.
        changes: values by dotted key, or ``key=value`` words.

    Raises:
        ConfigError: a word of another form, or a key below something that is no section.
    """
    pairs = changes.items() if isinstance(changes, Mapping) else [parse_override(word) for word in changes]
    result = _copied(raw)
    for key, value in pairs:
        *outer, last = key.split(".")
        section = result
        for depth, part in enumerate(outer):
            inner = section.setdefault(part, {})
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{key}: {'.'.join(outer[: depth + 1])} is a value, not a section; change that"
                )
            section = inner
        section[last] = value
    return result


def _copied(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in raw.items()}
