"""The one error a user can mend.

`InputError` says what was wrong with the input and what to change; the command line prints it on one line and exits
with code 2. Anything else that is raised is a defect of Windtunnel and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 8  # names at most that an error lists beside the nearest one
MANY = 24  # of more names a guess that is far off is better than none
MOST_WORDS = 1200  # characters of an error's line, which may repeat what was given


class InputError(ValueError):
    """The input asks for something impossible; the message names the value and the fix."""


class DiskFullError(InputError):
    """A disk is full: whatever was being done can't be finished, and says nothing of what was asked for."""


def one_line(message: str) -> str:
    """Return a message fit for one line of a terminal: nothing unprintable, and not longer than can be read."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in message)
    return text if len(text) <= MOST_WORDS else f"{text[: MOST_WORDS * 2 // 3]} ... {text[-MOST_WORDS // 3 :]}"


def unknown(kind: str, value: str, known: Iterable[str]) -> InputError:
    """An error for a name that is not known, with the nearest known one, and all of them where they are few."""
    names = sorted(known)
    folded = {name.casefold(): name for name in names}
    near = get_close_matches(value.casefold(), folded, n=1, cutoff=0.4 if len(names) > MANY else 0.6)
    value = value if len(value) <= 60 else f"{value[:57]}..."
    hint = f"did you mean {folded[near[0]]!r}?" if near else ""
    if hint and len(names) > SHOWN:
        return InputError(f"unknown {kind} {value!r}: {hint}")
    return InputError(f"unknown {kind} {value!r}: {hint}{' ' * bool(hint)}known are {', '.join(names)}")
