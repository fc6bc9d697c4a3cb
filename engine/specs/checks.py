"""What the specs check of their own fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from engine.errors import InputError, unknown

Spec = TypeVar("Spec")

MOST_WHOLE = 1 << 53  # the whole numbers that a float holds exactly: sizes beyond are no sizes
MOST_NUMBER, LEAST_NUMBER = 1e18, 1e-15  # of anything in SI units: beyond them products overflow, or vanish
MOST_SECONDS = 1e6  # of one operation, or a goal
MOST_NAME = 120  # bytes: a folder's name has 255, and holds several
_TYPES: dict[type[Any], dict[str, Any]] = {}  # of the fields of each spec, for it takes a while to find out


def field_types(spec: type[Any]) -> dict[str, Any]:
    """Return the type of each field of a dataclass, whose annotations may be text."""
    if spec not in _TYPES:
        _TYPES[spec] = get_type_hints(spec)
    return _TYPES[spec]


def check_fields(spec: object, names: str, *, zero: bool = False, most: int | None = None) -> None:
    """Raise InputError unless each of the space-separated fields is a positive number (or zero, if allowed).

    It is at most `most`; what is open is bounded by what can be calculated with.
    """
    types = field_types(type(spec))
    for name in names.split():
        value: Any
        value, whole = getattr(spec, name), types[name] in (int, int | None)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            wanted = f"{'whole ' * whole}number {'of at least' if zero else 'above'} 0"
            raise InputError(f"{type(spec).__name__} {name}={short(value)}: give a {wanted}")
        limit = most or (MOST_WHOLE if whole else MOST_SECONDS if _is_time(name) else MOST_NUMBER)
        if value > limit:
            raise InputError(f"{type(spec).__name__} {name}={short(value)}: give at most {limit:,}")
        if value and not whole and value < LEAST_NUMBER and not zero:
            raise InputError(f"{type(spec).__name__} {name}={value!r}: give at least {LEAST_NUMBER}")


def _is_time(name: str) -> bool:
    return name.endswith("_s") and not name.endswith("_per_s")


def short(value: object) -> str:
    """Return a value fit for one line of an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 0.15.1, without those that are none."""
    return tuple(int(part) for part in version.split(".") if part.isascii() and part.isdigit() and len(part) < 10)


def file_name(what: str, name: str) -> str:
    """Return a name that becomes part of a path. Raises InputError if it would lead elsewhere, or can't be a file's."""
    if not name or len(name.encode("utf-8", "replace")) > MOST_NAME or name.startswith("."):
        raise InputError(f"{what} {short(name)}: give a name of 1 to {MOST_NAME} characters that begins with no dot")
    if wrong := next((c for c in name if c in "/\\" or not c.isprintable()), ""):
        raise InputError(f"{what} {short(name)}: it becomes part of a file's name, without {wrong!r}: leave that out")
    return name


def build(kind: type[Spec], values: Any, where: str) -> Spec:
    """Return a spec of a mapping; each key must be a field, and each field without a default a key.

    Raises InputError that names `where`, the key and the value for one of another type, and what the spec itself does.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise InputError(f"{where} holds {short(values)}: give the keys {', '.join(known)}")
    for key in values:
        if key not in known:
            raise unknown(f"key in {where}", str(key), known)
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{where}: the key {name!r} is missing: it needs {', '.join(known)}")
    types = field_types(kind)
    arguments = {key: _value(types[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as its field wants it. YAML 1.1 reads 312e12 as text and 80e9 is no integer, so numbers are converted."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = (each for each in kinds if each is not type(None))
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown(f"value of {where}:", str(value), get_args(kind))
        return value
    if get_origin(kind) is tuple and isinstance(value, Mapping) and get_origin(inner := get_args(kind)[0]) is tuple:
        return {str(name): _value(get_args(inner)[1], each, f"{where}.{name}") for name, each in value.items()}
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: {short(value)}: give a list")
        return tuple(_value(get_args(kind)[0], each, where) for each in value)
    if kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{where}: {short(value)}: give true or false")
        return value
    if kind is str:
        if isinstance(value, list | Mapping):
            raise InputError(f"{where}: {short(value)}: give text")
        return str(value)
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {short(value)}: give a number, such as 312e12")
    if kind is int and isinstance(value, int):
        return value
    return int(number) if kind is int and number.is_integer() else number
