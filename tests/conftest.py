"""The same random examples on every CI run, new ones on each run by hand; and helpers that tests import by name."""

import os
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

from hypothesis import settings

sys.path.append(str(Path(__file__).parent))  # `import checkpoints`: --import-mode=importlib leaves it out

# a script's background job ignores it, and so would every process that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers that share the cores would fight over them
os.environ.setdefault("RAY_ADDRESS", "local")  # tests run side by side: none may join the cluster of another
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("hand", deadline=None)  # a shared machine stalls now and then
settings.load_profile("hand")
if os.environ.get("CI"):
    settings.load_profile("ci")

_preload = forkserver.set_forkserver_preload


def _with_ranks(modules: list[str]) -> None:
    """One process forks all ranks and jobs of these tests: without torch in it each rank would import it, for 2 s."""
    _preload(["engine.worker.rank_process", *modules])


forkserver.set_forkserver_preload = _with_ranks
