"""What a process owes the one that started it."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this process as soon as its parent has ended; to be run in a thread of the child.

    A rank that waits for another in a collective hears no pipe.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
