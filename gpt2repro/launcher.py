"""The process that launched this one, watched from the first second: nothing may outlive a launch that was killed.

Scripts import this module before anything slow. Until `hand_over` there is nothing to save: a thread ends this process
as soon as its launcher has ended, also while it waits for other processes that will never come.
"""

import os
import sys
import threading
from pathlib import Path


POLL_SECONDS = 0.5


class Launcher:
    """`accelerate launch` or torchrun; for a process that neither of them started, nothing."""

    def __init__(self) -> None:
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self.pid = os.getppid() if launched else None
        self._was_gone = launched and _is_orphan()
        self._handed_over = threading.Event()
        if launched:
            threading.Thread(target=self._watch, daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._was_gone or (self.pid is not None and os.getppid() != self.pid)

    def hand_over(self) -> None:
        """From now on the caller asks `has_ended` itself, and saves before it ends the process."""
        self._handed_over.set()

    def _watch(self) -> None:
        while not self._handed_over.wait(POLL_SECONDS):
            if self.has_ended:
                print("error: the launcher has ended before training began; repeat the command", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


def _is_orphan() -> bool:
    """Whether the launcher ended while this interpreter started. In a container it may itself be process 1."""
    if os.getppid() != 1:
        return False
    try:
        init = Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False
    return not any(word in init for word in (b"accelerate", b"torch", b"launch"))


launcher = Launcher()
