"""Work for sweeps' processes, which import it by name."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.results.run_folder import run_folder


def work(point: dict[str, Any]) -> dict[str, Any]:
    """Does what its point says."""
    match point["do"]:
        case "refuse":
            raise InputError("it does not fit")
        case "fail":
            raise ZeroDivisionError("in a policy")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "child":
            child = multiprocessing.get_context("fork").Process(target=int, daemon=True)  # as an engine's ranks are
            child.start()
            child.join()
        case "run":
            with run_folder(Path(point["folder"])) as partial:
                (partial / "begun").touch()
                time.sleep(120)
        case "pid":
            return {"status": "done", "value": os.getpid()}
        case "slot":
            return {"status": "done", "value": os.environ["SLOT"]}
        case number:
            return {"status": "done", "value": number**2}
    return {"status": "done"}
