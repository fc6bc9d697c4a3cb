"""Work for sweeps' processes, which import it by name."""

import os
import signal
from typing import Any

from engine.errors import InputError


def work(point: dict[str, Any]) -> dict[str, Any]:
    """Does what its point says."""
    match point["do"]:
        case "refuse":
            raise InputError("it does not fit")
        case "fail":
            raise ZeroDivisionError("in a policy")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "slot":
            return {"status": "done", "value": os.environ["SLOT"]}
    return {"status": "done", "value": point["do"] ** 2}
