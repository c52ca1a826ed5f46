"""One run: its folder and lock, its stop file, and what its config describes, ready for an engine.

Here: the threads of a process that will import torch.
"""

from __future__ import annotations

import os


def set_threads(threads: int | None) -> None:
    """Fixes the number of CPU threads, where given, and lets idle ones sleep.

    To be called before torch is imported. Waiting threads that spin starve the busy ones on a
    shared machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
