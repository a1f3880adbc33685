"""`accelerate launch` that exits with the launched script's exit code and gives its processes time to save and stop.

By itself, `accelerate launch` exits with 1 on every failure, and sends SIGKILL 30 seconds after it forwards a SIGTERM.
"""

import os
import subprocess
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


if __name__ == "__main__":
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # seconds; since torch 2.12
    arguments = launch_command_parser().parse_args()
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several; negative: killed by a signal, because another one failed
        codes = {failure.exitcode for failure in error.failures.values() if failure.exitcode > 0}
        sys.exit(codes.pop() if len(codes) == 1 else 1)
