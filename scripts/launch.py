"""`accelerate launch` with the exit code of the script that it launches, and with time for several processes to stop.

Its own code is 1 for every failure, and 30 seconds after it has passed on a SIGTERM it sends SIGKILL.
"""

import os
import subprocess
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


if __name__ == "__main__":
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # seconds; from torch 2.12 on
    arguments = launch_command_parser().parse_args()
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # one process
        sys.exit(error.returncode)
    except ChildFailedError as error:  # several; those that end because another has failed have a signal's, below 0
        codes = {failure.exitcode for failure in error.failures.values() if failure.exitcode > 0}
        sys.exit(codes.pop() if len(codes) == 1 else 1)
