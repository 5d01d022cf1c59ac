"""Options by name, from recipes, cards and keyword arguments: checked before anything is built with them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from ffpretrain.errors import ConfigError, nearest


def check_options(owner: str, function: Callable[..., Any], options: Mapping[str, Any], *given: str) -> None:
    """Refuse options that a function does not take, or values that are not of the annotated type.

    Args:
        owner: whose options they are, for the message.
        function: a class's ``__init__``, or a function; annotations that cannot be resolved are not checked.
        options: by name.
        *given: parameters that are given otherwise.

    Raises:
        ConfigError: an unknown name, with the nearest known one, or a value of another type.
    """
    known = [name for name in inspect.signature(function).parameters if name not in ("self", *given)]
    for key in options:
        if key not in known:
            raise ConfigError(f"{owner} has no option {key!r}{nearest(key, known)}")
    hints = _hints(function)
    for key, value in options.items():
        problem = _problem(hints.get(key, Any), value)
        if problem:
            raise ConfigError(f"{owner}: {key}={value!r} is no valid value: {problem}")


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # of a name imported for type checkers alone
        return {}


def _problem(hint: Any, value: Any) -> str | None:
    """Return what is wrong with a value, or None."""
    import numpy as np
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    if hint is Any:
        return None
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True))
        adapter.validate_python(value.item() if isinstance(value, np.generic) else value)
    except PydanticSchemaGenerationError:  # of a class that pydantic knows nothing of
        return None
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] in ("is_instance_of", "sequence_str"):
            return "give a list"
        return first["msg"][:1].lower() + first["msg"][1:]
    return None
