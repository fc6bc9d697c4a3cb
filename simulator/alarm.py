"""A timer of an event loop that is precise to some tens of microseconds, where the loop's own are to a millisecond.

alarm = Alarm(loop, callback)
alarm.set(0.0123)

Linux's timerfd, as a file that the loop waits for; elsewhere the loop's own timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_LEAST_S = 1e-6  # a timerfd that is set to 0 is off


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


class Alarm:
    """Calls back once, when the time that was set last has passed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._timer: asyncio.TimerHandle | None = None
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = -1
        if hasattr(self._libc, "timerfd_create"):
            self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file >= 0:
            loop.add_reader(self._file, self._ring)

    def set(self, delay_s: float) -> None:
        """Call back `delay_s` seconds from now, and not when it was to before."""
        if self._file < 0:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(delay_s, self._callback)
            return
        seconds, rest = divmod(max(_LEAST_S, delay_s), 1.0)
        setting = _Setting(_Time(0, 0), _Time(int(seconds), int(rest * 1e9)))
        self._libc.timerfd_settime(self._file, 0, ctypes.byref(setting), None)

    def close(self) -> None:
        """Never call back again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set again meanwhile
            os.read(self._file, 8)
            self._callback()
