"""Stopping a run from outside, without losing anything."""

import math
import os
import signal
import time
from types import FrameType


EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: what is not finished is saved; the same command goes on with it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PASSED_ON = 2.0  # seconds within which a signal comes again that the launcher passes on


class StopRequest:
    """Whether this process is to stop after its current step: for one of SIGNALS, because its time is over, or because
    the launcher that started it is gone.

    A second signal ends it at once; torchrun and accelerate pass on what the terminal has sent to all processes, so it
    counts as a second one only after PASSED_ON.

    Args:
        max_hours: from now; 0: no limit.
    """

    def __init__(self, max_hours: float):
        self.signal: signal.Signals | None = None
        self.signalled_at = math.inf
        self.deadline = time.monotonic() + max_hours * 3600 if max_hours else math.inf
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self.launcher = os.getppid() if launched else None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.signalled_at + PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.signalled_at = signal.Signals(number), time.monotonic()

    @property
    def reason(self) -> str | None:
        """Why it is to stop; None: it is not."""
        if self.signal is not None:
            return self.signal.name
        if time.monotonic() > self.deadline:
            return "max_hours"
        if self.launcher is not None and os.getppid() != self.launcher:
            return "the launcher has ended"
        return None
