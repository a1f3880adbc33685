"""When a run must stop early and save: signals, a time limit, or a launcher that has died."""

import math
import signal
import time
from types import FrameType

from gpt2repro.launcher import launcher


EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: unfinished but saved; the same command resumes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FORWARDING_SECONDS = 2.0  # a repeated signal within this time may be the launcher forwarding the first one


class StopRequest:
    """Tells this process to stop after its current step: it got one of SIGNALS, its time is up, or its launcher died.

    A second signal kills it at once. torchrun and accelerate forward signals that a terminal has already sent to every
    process, so a signal counts as the second one only after FORWARDING_SECONDS.

    Args:
        max_hours: time limit, from now; 0: none.
    """

    def __init__(self, max_hours: float):
        self.signal: signal.Signals | None = None
        self.signalled_at = math.inf
        self.deadline = time.monotonic() + max_hours * 3600 if max_hours else math.inf
        launcher.hand_over()
        for number in SIGNALS:
            outlives_terminal = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # nohup
            if not outlives_terminal:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.signalled_at + FORWARDING_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if self.signal is None:
            self.signal, self.signalled_at = signal.Signals(number), time.monotonic()

    def ignore_signals(self) -> None:
        """From now on signals neither stop nor kill this process: all is saved, and it exits within seconds."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def reason(self) -> str | None:
        """Why to stop; None: continue."""
        if self.signal is not None:
            return self.signal.name
        if time.monotonic() > self.deadline:
            return "max_hours"
        if launcher.has_ended:
            return "the launcher has ended"
        return None
