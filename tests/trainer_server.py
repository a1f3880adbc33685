"""The trainer as a process that starts in milliseconds: one that has imported everything forks for each run."""

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
SERVER = """
import json, os, sys
import matplotlib.pyplot, train_accelerate

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
    elif not (pid := os.fork()):
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(asked["output"][descriptor - 1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = asked["argv"]
        status = 1
        try:
            names = {"__name__": "__main__", "__file__": sys.argv[0]}
            exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), names)
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    else:
        print(pid, flush=True)
"""


class TrainerServer:
    """Starts scripts that use the trainer, one process each, on the CPU."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **asked) -> int:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, argv: list, stdout: Path, stderr: Path) -> int:
        """Run a script with its arguments; returns the process id. It has a session of its own."""
        return self._ask(argv=list(map(str, argv)), output=[str(stdout), str(stderr)])

    def wait(self, pid: int) -> int:
        """The exit code of a process, below 0 for a signal's."""
        return self._ask(wait=pid)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
