"""The one reader of JSON and YAML that others wrote: within limits, or one line that says what is wrong.

A document is read whole, so its size is limited; so is how deep it nests and how many digits its numbers have, for what
goes beyond them is damage or malice, and would end in an error somewhere else. Text in it can be written again: half of
a surrogate pair can't. Types and ranges are for whoever knows what the document is about.

    config = read_json(Path("model/config.json"), "give a Hugging Face config.json")
"""

from __future__ import annotations

import json
import os
import stat
from math import isfinite
from pathlib import Path
from typing import Any

from engine.errors import InputError

MIB = 1 << 20
MOST_JSON_BYTES = 64 * MIB
MOST_YAML_BYTES = MIB // 2  # which takes a hundred times as long to read
MOST_LINE_BYTES = 8 * MIB  # of a table's first line, which may be one of JSON
MOST_COLUMNS = 1000
MOST_DEPTH = 64
MOST_DIGITS = 40  # of a whole number: a hash of 128 bits has 39
_MOST_WHOLE = 10**MOST_DIGITS
MOST_VALUES = 20_000_000  # of JSON, its keys among them
MOST_YAML_VALUES = 200_000  # after aliases, each of which may stand for many


def given_path(text: Path | str) -> Path:
    """Return the path that somebody gave, where ~ is a home. Raises InputError for one that no file can have."""
    try:
        path = Path(text).expanduser()
        if b"\0" in os.fsencode(path):
            raise ValueError("a null character")
    except (RuntimeError, ValueError) as error:
        why = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)
        raise InputError(f"{shown(text)} can't be a path: {why}: give another") from None
    return path


def read_text(path: Path, hint: str, most_bytes: int = MOST_JSON_BYTES) -> str:
    """Return a text file's contents (UTF-8, with or without a byte order mark).

    Raises InputError, which ends with `hint` (what to give in its place), if it can't be read, is too large or no text.
    """
    try:
        with open_file(path) as file:
            data: bytes = file.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"can't read {shown(path)}: {error.strerror or error}: {hint}") from None
    if len(data) > most_bytes:
        raise InputError(f"{path} is larger than {most_bytes / MIB:g} MiB: {hint}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text ({error.reason} at byte {error.start:,}): {hint}") from None


def open_file(path: Path) -> Any:
    """Open a file or a pipe to read bytes. Raises OSError, also for a device that would be read for ever."""
    try:
        file = path.open("rb")
    except ValueError as error:  # a path with a null character
        raise OSError(str(error)) from None
    if not (stat.S_ISREG(mode := os.fstat(file.fileno()).st_mode) or stat.S_ISFIFO(mode)):
        file.close()
        raise OSError("it is neither a file nor a pipe")
    return file


def check_table(path: Path, most_bytes: int | None = None) -> str:
    """Return the first line of a table with anything in it. Raises InputError if that is no header, OSError if no file.

    A header says how many columns there are, which is limited; a file's size is where `most_bytes` is given.
    """
    with open_file(path) as file:
        if most_bytes is not None and os.fstat(file.fileno()).st_size > most_bytes:
            raise InputError(f"{path} is larger than {most_bytes / MIB:g} MiB: give a table in parts")
        line = b"\n"
        while line and not line.strip():
            line = file.readline(MOST_LINE_BYTES + 1)
    if len(line) > MOST_LINE_BYTES:
        raise InputError(f"{path} is no table: its first line is longer than {MOST_LINE_BYTES / MIB:g} MiB")
    text = str(line.decode("utf-8-sig"))
    if not text.lstrip().startswith("{") and text.count(",") >= MOST_COLUMNS:
        raise InputError(f"{path} has {text.count(',') + 1:,} columns: give a table of at most {MOST_COLUMNS:,}")
    return text


def read_json(path: Path, hint: str, most_bytes: int = MOST_JSON_BYTES, constants: bool = False) -> Any:
    """Return what a JSON file holds. Raises InputError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, hint, most_bytes), str(path), hint, constants)


def parse_json(text: str | bytes, where: str, hint: str, constants: bool = False) -> Any:
    """Return what a JSON text holds; `constants` allows NaN and Infinity, which are no JSON but which some write.

    Raises InputError that names `where` and ends with `hint` for what is no JSON, or beyond the limits.
    """
    try:
        found = json.loads(text)
        check_document(found, constants)
    except RecursionError:
        raise InputError(f"{where} nests deeper than {MOST_DEPTH} levels: {hint}") from None
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({_reason(error)}): {hint}") from None
    return found


def read_yaml(path: Path, hint: str, ranges: bool = False) -> Any:
    """Return what a YAML file holds, as `parse_yaml` does. Raises InputError as it and `read_text` do."""
    return parse_yaml(read_text(path, hint, MOST_YAML_BYTES), str(path), hint, ranges)


def parse_yaml(text: str, where: str, hint: str, ranges: bool = False) -> Any:
    """Return what a YAML text holds; with `ranges` 1:5 is text, and not a number to the base 60.

    Raises InputError that names `where` and ends with `hint` for what is no YAML, or beyond the limits.
    """
    import yaml  # only here: it takes a while, and a node that measures may lack it

    loader: Any = yaml.SafeLoader
    try:
        found = yaml.load(text, _without_base_60(loader) if ranges else loader)
        check_document(found, constants=True, most_values=MOST_YAML_VALUES)
    except RecursionError:
        raise InputError(f"{where} nests deeper than {MOST_DEPTH} levels: {hint}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        # the last three of values that look like dates or numbers and are none, and of keys that are lists
        raise InputError(f"{where} is not YAML: {_reason(error)}: {hint}") from None
    return found


def check_document(document: Any, constants: bool = False, most_values: int = MOST_VALUES) -> None:
    """Raise ValueError for what no document of ours holds, and RecursionError for one that nests too deep."""
    level, count = [document], 0
    for _ in range(MOST_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list | tuple | set):
                inner += value
            elif isinstance(value, str):
                if not value.isascii():
                    _check_text(value)
            elif isinstance(value, float):
                if not constants and not isfinite(value):
                    raise ValueError(f"{value} is no number")
            elif isinstance(value, int) and abs(value) >= _MOST_WHOLE:
                raise ValueError(f"a number of more than {MOST_DIGITS} digits")
            if len(inner) > most_values - count:
                raise ValueError(f"more than {most_values:,} values")
        if not inner:
            return
        level, count = inner, count + len(inner)
    raise RecursionError


def shown(path: Path | str) -> str:
    """Return a path fit for one line of an error."""
    text = str(path)
    return text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode("ascii")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair in {text[:40]!r} (character {error.start})") from None


def _reason(error: Exception) -> str:
    """Return why a text can't be read, on a line."""
    text = " ".join(str(error).split())[:300]
    return f"a number of more than {MOST_DIGITS} digits" if "int_max_str_digits" in text else text


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NO_COLON = r"(?![^\s:]*:)"


def _without_base_60(safe: Any) -> Any:
    """Return YAML's safe loader without its numbers to the base 60: `1:5` is a range of ours, and not 65."""
    import re

    resolvers = {
        first: [
            (tag, re.compile(_NO_COLON + text.pattern, text.flags) if tag in _NUMBERS else text) for tag, text in kinds
        ]
        for first, kinds in safe.yaml_implicit_resolvers.items()
    }
    return type("Loader", (safe,), {"yaml_implicit_resolvers": resolvers})
