"""Load a user's plugin, and show its part of a traceback when it raises."""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path

from engine.errors import InputError

_LOADED: set[str] = set()  # file names as tracebacks give them


class PluginError(RuntimeError):
    """A plugin raised. `frames` are the plugin's own of the traceback, as text; `code` is the exit code."""

    def __init__(self, message: str, frames: str = "", code: int = 1) -> None:
        super().__init__(message)
        self.frames = frames
        self.code = code


def load_plugin(path: Path) -> None:
    """Run a Python file, which adds its names to POLICIES, ROUTERS, PREDICTORS or the metrics.

    Raises InputError if it is no file, and PluginError if it raises.
    """
    if not path.is_file():
        raise InputError(f"plugin {path} is not a file: give the path of a Python file")
    _LOADED.add(str(path))
    try:
        runpy.run_path(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin does not end the command
        plugin = blamed(error)
        if plugin is None and isinstance(error, SyntaxError):  # in its own text, of which nothing has run
            where = f"{error.filename} line {error.lineno}"
            raise PluginError(f"plugin {path}: SyntaxError: {error.msg} ({where})") from error
        if plugin is None:
            raise
        raise plugin from error


def blamed(error: BaseException) -> PluginError | None:
    """Return an error as that of the plugin whose code it came through; None if it came through none's."""
    for each in _chain(error):
        frames = [frame for frame in traceback.extract_tb(each.__traceback__) if frame.filename in _LOADED]
        if frames:
            what = " ".join(str(each).split())
            kind = "" if isinstance(each, InputError) else f"{type(each).__name__}: "
            message = f"plugin {frames[-1].filename} line {frames[-1].lineno}: {kind}{what}"
            shown = "".join(traceback.format_list(frames))
            return PluginError(message, shown, 2 if isinstance(each, InputError) else 1)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
