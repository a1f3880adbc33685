"""scripts/: what the jobs of all engines have in common is run, each job is read by its engine's own tool or schema."""

import importlib.util
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml
from accelerate.utils.other import get_free_port
from slurm_cluster import slurm_cluster
from support import PATIENCE, ROOT, measured, metric_rows, wait_until


SCRIPTS = ROOT / "scripts"
RECIPE = """
sequence_length: 32
global_batch_tokens: 512
micro_batch_size: 4
warmup_steps: 1
max_steps: 40
learning_rate: 3e-3
log_every: 1
validate_every: 0
validation_tokens: 544
sample_tokens: 8
sample_every: 0
num_workers: 0
model: {n_positions: 32, n_layer: 2, n_head: 2, n_embd: 32}
"""
STOPPED = 75


@pytest.fixture(scope="module")
def recipe(data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(f"data_dir: {data_dir}\n{RECIPE}")
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe, trainer_server, tmp_path_factory):
    """The losses of one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    log = folder / "log"
    pid = trainer_server.start(["train_accelerate.py", "--config", recipe, "--output_dir", folder / "run"], log, log)
    assert trainer_server.wait(pid) == 0, log.read_text()
    return measured(folder / "run", "loss")


def environment(**variables) -> dict[str, str]:
    """Of a machine with one process and no GPU."""
    here = {"PYTHON": sys.executable, "CONFIG": "accelerate_configs/multi_cpu.yaml", "GPUS_PER_NODE": "1"}
    return os.environ | {"OMP_NUM_THREADS": "1", **here, **{name: str(value) for name, value in variables.items()}}


def steps_of(run):
    return [row["step"] for row in metric_rows(run, "loss")] if (run / "metrics.jsonl").exists() else []


# ---- what all engines run ----


@pytest.mark.slow
def test_two_nodes_stop_at_a_signal_with_a_checkpoint_and_the_same_command_resumes(recipe, uninterrupted, tmp_path):
    run = tmp_path / "run"

    def start(rank: int, port: int) -> subprocess.Popen:
        command = [SCRIPTS / "launch.sh", "--config", recipe, "--output_dir", run]
        variables = environment(NODES=2, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with (tmp_path / f"log{rank}").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)

    def logs() -> str:
        return "".join((tmp_path / f"log{rank}").read_text() for rank in range(2))

    port = get_free_port()
    nodes = [start(rank, port) for rank in range(2)]
    wait_until(lambda: len(steps_of(run)) >= 3 or any(node.poll() is not None for node in nodes), logs)
    nodes[1].send_signal(signal.SIGTERM)  # one machine is preempted
    assert [node.wait(PATIENCE) for node in nodes] == [STOPPED] * 2, logs()
    stopped_at = steps_of(run)[-1]
    assert stopped_at < 40 and (run / "checkpoints" / f"step_{stopped_at:08d}").is_dir()

    port = get_free_port()
    nodes = [start(rank, port) for rank in range(2)]
    assert [node.wait(PATIENCE) for node in nodes] == [0, 0], logs()
    assert steps_of(run) == list(range(1, 41))  # no step twice
    assert measured(run, "loss") == pytest.approx(uninterrupted, abs=1e-5)


HF = """#!/usr/bin/env bash
# `hf sync [--delete] --exclude PATTERN SOURCE DEST` between folders; hf://buckets/ is $BUCKETS. Without the Hub.
[[ $1 == sync ]] || exit 9
shift
paths=() delete=
while (($#)); do
    case $1 in --exclude) shift ;; --delete) delete=1 ;; *) paths+=("${1/#hf:\\/\\/buckets/$BUCKETS}") ;; esac
    shift
done
[[ -d $(dirname "${paths[0]}") ]] || exit 1
mkdir -p "${paths[@]}"
[[ $delete ]] && rm -rf "${paths[1]:?}"/*
cp -rp "${paths[0]}/." "${paths[1]}"
echo "${paths[@]}" >> "$BUCKETS/calls"
"""


@pytest.fixture
def bucket(tmp_path):
    """Stands for the Hub's buckets, in the environment of a command."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hf").write_text(HF)
    (tmp_path / "bin" / "hf").chmod(0o755)
    (tmp_path / "buckets" / "me" / "b").mkdir(parents=True)
    return environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", BUCKETS=tmp_path / "buckets")


@pytest.mark.slow
def test_a_run_goes_on_from_a_bucket_on_another_machine(recipe, uninterrupted, bucket, tmp_path):
    def start(machine: str) -> subprocess.Popen:
        run = tmp_path / machine / "run"
        launch = [SCRIPTS / "launch.sh", "--config", recipe, "--output_dir", run]
        command = [SCRIPTS / "synced.sh", "hf://buckets/me/b/runs/one", run, *launch]
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=bucket, stdout=log, stderr=log)

    (tmp_path / "buckets" / "me" / "b" / "runs").mkdir()
    one = start("machine1")
    wait_until(lambda: len(steps_of(tmp_path / "machine1" / "run")) >= 3, (tmp_path / "log").read_text)
    one.send_signal(signal.SIGTERM)
    assert one.wait(PATIENCE) == STOPPED, (tmp_path / "log").read_text()
    assert start("machine2").wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    for run in (tmp_path / "machine2" / "run", tmp_path / "buckets" / "me" / "b" / "runs" / "one"):
        assert steps_of(run) == list(range(1, 41))
        assert measured(run, "loss") == pytest.approx(uninterrupted, abs=1e-5)


@pytest.mark.slow
def test_what_is_written_meanwhile_is_pushed_and_the_exit_code_kept(bucket, tmp_path):
    folder, remote = tmp_path / "run", tmp_path / "buckets" / "me" / "b" / "one"
    work = f"echo 1 > {folder}/early; until [ -e {remote}/early ]; do sleep 0.1; done; echo 2 > {folder}/late; exit 3"
    command = [SCRIPTS / "synced.sh", "hf://buckets/me/b/one", folder, "bash", "-c", work]
    done = subprocess.run(command, env=bucket | {"SYNC_SECONDS": "1"}, timeout=PATIENCE)
    assert done.returncode == 3
    assert sorted(path.name for path in remote.iterdir()) == ["early", "late"]


@pytest.mark.slow
def test_nothing_starts_without_the_bucket(bucket, tmp_path):
    """Else the run would start anew, and replace what is in the bucket."""
    command = [SCRIPTS / "synced.sh", "hf://buckets/me/nothere/one", tmp_path / "run", "touch", tmp_path / "started"]
    done = subprocess.run(command, env=bucket, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "cannot fetch hf://buckets/me/nothere/one" in done.stderr
    assert not (tmp_path / "started").exists()


# ---- each engine's job ----


@pytest.mark.slow
def test_the_slurm_job_trains_on_two_nodes_and_requeues_itself(recipe, uninterrupted, tmp_path):
    (tmp_path / "slurm").mkdir()
    run, log = tmp_path / "run", tmp_path / "log"
    with slurm_cluster(tmp_path / "slurm") as cluster:

        def slurm(*command) -> str:
            done = subprocess.run(command, cwd=ROOT, env=environment() | cluster, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        def state() -> str:
            return slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--job={job}").strip()

        small = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}", "--parsable"]
        script = ["scripts/slurm_train.sbatch", "--config", str(recipe), "--output_dir", str(run)]
        job = slurm("sbatch", *small, *script).strip()
        wait_until(lambda: len(steps_of(run)) >= 3 or state() not in ("PENDING", "CONFIGURING", "RUNNING"))
        slurm("scancel", "--signal=USR1", job)  # as before the time limit
        wait_until(lambda: state() == "PENDING", lambda: log.read_text())
        assert "stopped with a checkpoint; requeued" in log.read_text()
        assert 3 <= len(steps_of(run)) < 40
        slurm("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm waits for two minutes
        wait_until(lambda: state() == "COMPLETED", lambda: log.read_text())
    assert steps_of(run) == list(range(1, 41))
    assert measured(run, "loss") == pytest.approx(uninterrupted, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="needs pip install skypilot")
def test_skypilot_reads_its_task(tmp_path):
    program = f"""
import sky
task = sky.Task.from_yaml({str(SCRIPTS / "skypilot_train.yaml")!r})
(resources,) = task.resources
print(resources.use_spot, resources.accelerators, resources.job_recovery["recover_on_exit_codes"])
print(task.storage_mounts["/bucket"].mode.value, task.num_nodes)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == [f"True {{'H100': 8}} [{STOPPED}]", "MOUNT_CACHED 1"], done.stderr


def test_kubeflow_reads_its_job():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    content = yaml.safe_load((SCRIPTS / "kubeflow_train.yaml").read_text())
    assert TrainerV1alpha1TrainJob.from_dict(content).to_dict() == content  # which leaves out what it does not know


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, variables",
    [
        (
            lambda: yaml.safe_load((SCRIPTS / "skypilot_train.yaml").read_text())["run"],
            {
                "RECIPE": "recipes/demo.yaml",
                "SKYPILOT_NUM_NODES": "2",
                "SKYPILOT_NODE_RANK": "1",
                "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
                "SKYPILOT_NUM_GPUS_PER_NODE": "8",
            },
        ),
        (
            lambda: yaml.safe_load((SCRIPTS / "kubeflow_train.yaml").read_text())["spec"]["trainer"]["args"][0],
            {
                "PET_NNODES": "2",
                "PET_NODE_RANK": "1",
                "PET_MASTER_ADDR": "10.0.0.7",
                "PET_MASTER_PORT": "29500",
                "PET_NPROC_PER_NODE": "8",
            },
        ),
    ],
    ids=["skypilot", "kubeflow"],
)
def test_the_jobs_tell_the_launcher_which_machine_it_is(job, variables, tmp_path):
    """The job's own commands and launch.sh run; in the place of Python stands what prints its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\nenv | grep ^PET_ && exit 9\nexit 0\n')
    python.chmod(0o755)
    script = job().replace("cd /code", f"cd {ROOT}")
    variables = {"PATH": os.environ["PATH"], "PYTHON": str(python)} | variables
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = done.stdout.split()
    given = {flag: value for flag, value in zip(flags, flags[1:]) if flag.startswith("--")}
    assert given["--num_machines"] == "2" and given["--machine_rank"] == "1" and given["--num_processes"] == "16"
    assert given["--main_process_ip"] == "10.0.0.7" and given["--main_process_port"] == "29500"
    assert given["--config"] in ("recipes/demo.yaml", "recipes/gpt2-124m-fineweb-edu.yaml")
    assert "train_accelerate.py" in flags and given["--output_dir"].startswith(("/bucket/runs/", "/storage/"))


@pytest.mark.slow
def test_hf_reads_its_job():
    """`hf jobs run --dry-run` resolves the whole job without the Hub."""
    variables = {"BUCKET": "me/b", "RUN": "demo", "HF_JOBS_OPTIONS": "--dry-run", "HF_TOKEN": "hf_secret"}
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = ["bash", SCRIPTS / "hf_jobs_train.sh", "--config", "recipes/demo.yaml"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables | {"PATH": path}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    job = dict(re.findall(r"^  (\w+) +(.*)$", done.stdout, re.MULTILINE))
    assert job["timeout"] == "24h" and job["attempts"] == "3" and job["flavor"] == "h200x8"
    assert job["secrets"].startswith("HF_TOKEN=") and "hf_secret" not in done.stdout
    assert re.search(r"hf://buckets/me/b:/bucket:ro", done.stdout) and re.search(r"\S+:/code:ro", done.stdout)
    script = "scripts/synced.sh hf://buckets/me/b/runs/demo /run/demo scripts/launch.sh --output_dir /run/demo"
    assert f"{script} --max_hours 23 --config recipes/demo.yaml" in job["command"]
