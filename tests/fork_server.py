"""Scripts of the project as commands that start in milliseconds: a process that has imported what they need forks for
each of them. What a command prints goes to files."""

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SERVER = """
import json, os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
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
            exec(asked["before"])
            script = sys.argv[0]
            exec(compile(open(script).read(), script, "exec"), {"__name__": "__main__", "__file__": script})
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    else:
        print(pid, flush=True)
"""


class ForkServer:
    """`with ForkServer("import train_accelerate", environment) as server`."""

    def __init__(self, imports: str, environment: dict):
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"{imports}\n{SERVER}"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.kill()
        self.server.communicate()

    def _ask(self, **question) -> int:
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], 150)
        assert ready, "a command did not end"
        return int(self.server.stdout.readline())

    def start(self, argv: list, stdout: Path, stderr: Path, before: str = "") -> int:
        """Start a script with its arguments; returns the process id. It has a session of its own.

        Args:
            before: Python that its process runs first, with what the server has imported in scope.
        """
        return self._ask(
            argv=[str(ROOT / argv[0]), *map(str, argv[1:])], output=[str(stdout), str(stderr)], before=before
        )

    def start_processes(self, number: int, argv: list, stdout: Path, stderr: Path, before: str = "") -> list[int]:
        """Start a script as so many processes that find each other, as `accelerate launch` does; see start."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(number):
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            group |= {"RANK": rank, "LOCAL_RANK": rank}
            group = {name: str(value) for name, value in group.items()} if number > 1 else {}
            pids.append(self.start(argv, stdout, stderr, f"import os; os.environ |= {group}\n{before}"))
        return pids

    def wait(self, pid: int) -> int:
        """The exit status of a process; minus the signal that ended it."""
        return self._ask(wait=pid)
