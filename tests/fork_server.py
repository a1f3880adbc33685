"""Run the project's scripts without paying for their imports each time.

A server process imports torch and the rest once and forks for every command; what a command prints goes to files.
A fork can be changed before its script starts, which is how tests cause faults: see trainer_faults.py and
preparer_faults.py.
"""

import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from support import PATIENCE, ROOT

from gpt2repro.errors import run_script


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ForkServer:
    """`with ForkServer(["train_accelerate"], environment) as server`.

    Args:
        modules: imported once, by the server.
        environment: variables of the server and its commands, besides this process's own.
    """

    def __init__(self, modules: Sequence[str], environment: dict[str, str]):
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *modules],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.kill()
        self.server.communicate()

    def start(
        self,
        argv: Sequence,
        stdout: Path,
        stderr: Path,
        before: Sequence[Callable[[], object]] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """Start a script in a session of its own.

        Args:
            argv: name of a script of the project, then its flags.
            before: called in the new process before the script's main. Anything that pickles, so usually
                functools.partial of a function that the server can import.
            environment: further variables.
        Returns:
            The process id.
        """
        command = {"argv": list(map(str, argv)), "stdout": str(stdout), "stderr": str(stderr)}
        self._send("start", command | {"before": list(before), "environment": dict(environment)})
        return self._answer()

    def start_processes(self, world_size: int, *command, **options) -> list[int]:
        """Start one process per rank, with the variables that `accelerate launch` would set.

        Args:
            command, options: as in start.
        """
        if world_size == 1:
            return [self.start(*command, **options)]
        environment = options.pop("environment", {})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(world_size):
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
            group |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            rank_environment = environment | {name: str(value) for name, value in group.items()}
            pids.append(self.start(*command, **options, environment=rank_environment))
        return pids

    def wait(self, pid: int) -> int:
        """The exit status of a process; the negative signal number if it was killed.

        Raises:
            AssertionError: it did not end within PATIENCE, and was killed.
        """
        self._send("wait", {"pid": pid})
        finished, _, _ = select.select([self.server.stdout], [], [], PATIENCE)
        if not finished:
            os.killpg(pid, signal.SIGKILL)
        status = self._answer()
        assert finished, f"process {pid} did not end within {PATIENCE} s"
        return status

    def _send(self, name: str, arguments: dict) -> None:
        pickle.dump((name, arguments), self.server.stdin)
        self.server.stdin.flush()

    def _answer(self) -> int:
        return int(self.server.stdout.readline())


# ---- in the server process ----


def serve() -> None:
    """Answer each request on stdin with a number on stdout, until the client is gone."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit that it is ignored
    requests = {"start": start, "wait": wait}
    while True:
        name, arguments = pickle.load(sys.stdin.buffer)
        print(requests[name](**arguments), flush=True)


def wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def start(**command) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = run(**command)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(
    argv: list[str],
    stdout: str,
    stderr: str,
    before: list[Callable[[], object]],
    environment: dict[str, str],
) -> int:
    """What a forked process does; returns its exit status."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= environment
    sys.argv = argv
    try:
        for change in before:
            change()
        script = importlib.import_module(Path(argv[0]).stem)
        sys.modules["__main__"] = script  # which spawned worker processes import, as if it had been run as a script
        run_script(script.main)
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    serve()
