"""What the specs check of their own fields."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

from engine.errors import InputError

_TYPES: dict[type[Any], dict[str, Any]] = {}  # of the fields of each spec, for it takes a while to find out


def field_types(spec: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a dataclass, whose annotations may be text."""
    if spec not in _TYPES:
        _TYPES[spec] = get_type_hints(spec)
    return _TYPES[spec]


def check_fields(spec: object, names: str, *, zero: bool = False) -> None:
    """Raise InputError unless each of the space-separated fields is finite and positive (or zero, if allowed)."""
    types = field_types(type(spec))
    for name in names.split():
        value, whole = getattr(spec, name), types[name] in (int, int | None)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            wanted = f"{'whole ' * whole}number {'of at least' if zero else 'above'} 0"
            raise InputError(f"{type(spec).__name__} {name}={value!r}: give a {wanted}")
