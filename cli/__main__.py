"""The process behind `windtunnel` (and `python -m cli`): signals, exit codes and the line that goes with them.

Small, so that Ctrl-C prints one line from the first moment on; everything else is imported inside.
"""

import cli.clock  # noqa: F401, I001  # first: it reads the clock

import signal
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 2 on bad input, 130 when interrupted, 1 on any other failure."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given[:1] == ["selfcheck"]:  # a GPU node may lack what the other doors need
            from studies.selfcheck import main as selfcheck

            sys.exit(selfcheck(given[1:]))
        from cli.main import run

        code, message = run(arguments)
    except KeyboardInterrupt:
        code, message = 130, f"interrupted: {_after_interrupt(given)}"
    if message:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _after_interrupt(arguments: list[str]) -> str:
    """Return what became of the results of an interrupted command."""
    if arguments[:1] in (["search"], ["plan"], ["profile"]) or arguments[:2] == ["study", "run"]:
        return "rerun the same command to resume"
    if arguments[:1] == ["selfcheck"]:
        return "the output folder holds the steps that were finished"
    return "no results were written"


if __name__ == "__main__":
    main()
