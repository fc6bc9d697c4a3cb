"""The command line in this process: as a user meets it, but for the seconds that a process's imports take."""

import contextlib
import io
import signal
from pathlib import Path
from subprocess import CompletedProcess

from cli.__main__ import main


def windtunnel(*arguments: str, cwd: Path) -> CompletedProcess[str]:
    """Run a command in `cwd`: its exit code, and what it printed.

    What its processes print, signals and plugins need a process of their own.
    """
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    return CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
