"""A real Slurm cluster of two nodes, all on this machine: its controller and daemons, on loopback, for one user.

The nodes' names are addresses, because the processes of a job look up the name of its first node.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import wait_until


CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,defer_batch=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
GresTypes=gpu
NodeName=DEFAULT CPUs=4 RealMemory=9000 Gres=gpu:1
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}]
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach the cluster. Skips the test unless SLURM_TESTS asks for it, as
    it starts daemons, whose queues wait for minutes."""
    if not os.environ.get("SLURM_TESTS"):
        pytest.skip("SLURM_TESTS=1 starts a Slurm of two nodes for it")
    path = f"{os.environ['PATH']}:/usr/sbin"
    daemons = [shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "sbatch")]
    if not all(daemons):
        pytest.skip("needs apt-get install slurmctld slurmd slurm-client")
    first = free_port_before_two_free_ports()
    settings = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder}
    (folder / "state").mkdir()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(ports=range(first, first + 3), **settings))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # any device will do
    environment = {"SLURM_CONF": str(config)}
    commands = [[daemons[0], "-D", "-f", config]] + [
        [daemons[1], "-D", "-f", config, "-N", name] for name in ("127.0.0.1", "127.0.0.2")
    ]
    with (folder / "console.log").open("w") as log:
        running = [
            subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log) for command in commands
        ]
    try:

        def idle_nodes() -> bool:
            if any(process.poll() is not None for process in running):
                pytest.skip(f"Slurm does not start here: {(folder / 'console.log').read_text()[-500:]}")
            asked = subprocess.run(
                ["sinfo", "--noheader", "--format=%D %t"], env=os.environ | environment, capture_output=True, text=True
            )
            return asked.stdout.split() == ["2", "idle"]

        wait_until(idle_nodes, lambda: (folder / "slurmctld.log").read_text())
        yield environment
    finally:
        subprocess.run(["scancel", f"--user={settings['user']}"], env=os.environ | environment)
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait()


def free_port_before_two_free_ports() -> int:
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with contextlib.suppress(OSError):
                for port in (first + 1, first + 2):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                return first
