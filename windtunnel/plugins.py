"""Load a user's plugin, and show its part of a traceback when it raises."""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path

from engine.errors import InputError

_LOADED: set[str] = set()  # file names as tracebacks give them


class PluginError(RuntimeError):
    """A plugin raised; the message has its own frames and, as the last line, the error."""


def load_plugin(path: Path) -> None:
    """Run a Python file, which adds its names to POLICIES, ROUTERS, PREDICTORS or the metrics.

    Raises InputError if it is no file or raises one itself, PluginError if it raises anything else.
    """
    if not path.is_file():
        raise InputError(f"plugin {path} is not a file: give the path of a Python file")
    _LOADED.add(str(path))
    try:
        runpy.run_path(str(path))
    except InputError:
        raise
    except SyntaxError as error:
        raise PluginError(f"plugin {path} line {error.lineno}: SyntaxError: {error.msg}") from error
    except Exception as error:
        raise blamed(error) or error from None


def blamed(error: BaseException) -> PluginError | None:
    """Return the error of the plugin whose code raised, with the plugin's own frames; None if no plugin's did."""
    for each in _chain(error):
        frames = [frame for frame in traceback.extract_tb(each.__traceback__) if frame.filename in _LOADED]
        if frames:
            shown = "".join(traceback.format_list(frames))
            what = " ".join(f"{type(each).__name__}: {each}".split())
            return PluginError(f"{shown}plugin {frames[-1].filename} line {frames[-1].lineno}: {what}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
