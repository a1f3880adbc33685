"""Stopping a run from outside without losing anything: signals, a time limit, or a launcher that has died."""

import math
import os
import signal
import time
from types import FrameType


EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not finished, but saved; the same command resumes it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
FORWARDING_SECONDS = 2.0  # within which a launcher forwards a signal that the process has already received


class StopRequest:
    """Whether this process must stop after its current step: because of one of SIGNALS, because its time is up, or
    because the launcher that started it is gone.

    A second signal ends it at once. torchrun and accelerate forward what the terminal has sent to every process
    already, so a signal counts as a second one only after FORWARDING_SECONDS.

    Args:
        max_hours: from now on; 0: no limit.
    """

    def __init__(self, max_hours: float):
        self.signal: signal.Signals | None = None
        self.signalled_at = math.inf
        self.deadline = time.monotonic() + max_hours * 3600 if max_hours else math.inf
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        self.launcher = os.getppid() if launched else None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.signalled_at + FORWARDING_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.signalled_at = signal.Signals(number), time.monotonic()

    @property
    def reason(self) -> str | None:
        """Why to stop; None: go on."""
        if self.signal is not None:
            return self.signal.name
        if time.monotonic() > self.deadline:
            return "max_hours"
        if self.launcher is not None and os.getppid() != self.launcher:
            return "the launcher has ended"
        return None
