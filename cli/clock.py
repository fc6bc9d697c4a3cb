"""When this process started: imported before everything else, whose imports are most of the start-up time."""

import time

STARTED = time.perf_counter()
