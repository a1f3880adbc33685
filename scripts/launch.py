"""`accelerate launch` that exits with the launched script's exit code, ends with the script's own error lines, and lets
its processes save and stop when it gets SIGTERM or Ctrl-C, or its terminal is closed.

By itself, `accelerate launch` exits with 1 on every failure and ends with a traceback of its own; when it is signalled,
it is gone before its process has saved, or with several processes sends SIGKILL after 30 seconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def forward(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the launched processes; this one keeps waiting for their exit codes."""
    processes = psutil.Process().children()
    if not processes:
        sys.exit(128 + number)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def exit_code(failures: list[ProcessFailure]) -> int:
    """The exit code that the failed processes agree on, else 1; those killed because another failed do not count."""
    own = {failure.exitcode for failure in failures if failure.exitcode > 0}
    if own:
        return own.pop() if len(own) == 1 else 1
    return 128 - failures[0].exitcode  # all were killed by a signal, whose number torch negates


def main() -> None:
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # seconds; since torch 2.12
    arguments = launch_command_parser().parse_args()
    arguments.signals_to_handle = "SIGQUIT"  # torchrun would also take FORWARDED, and forget the exit codes
    for number in FORWARDED:
        outlives_terminal = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # nohup
        if not outlives_terminal:
            signal.signal(number, forward)
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # one process
        code = error.returncode
        sys.exit(code if code > 0 else 128 - code)
    except ChildFailedError as error:  # several
        _, failure = error.get_first_failure()
        if isinstance(failure.message, dict):  # gpt2repro.errors wrote it; torchrun has logged lines of its own since
            print(failure.message["message"], file=sys.stderr)
        sys.exit(exit_code(list(error.failures.values())))
    except DistError as error:  # of the launchers of several machines; the processes have not been started yet
        remedy = "start them together, with the same --main_process_ip and a --main_process_port that nothing else uses"
        sys.exit(f"error: the machines have not found each other ({str(error).splitlines()[0]}); {remedy}")


if __name__ == "__main__":
    main()
