"""Fixtures that several test modules share. No test needs the network."""

import ctypes
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from fork_server import ForkServer
from huggingface_hub import constants
from support import PATIENCE, ROOT, prepare

from gpt2repro.data.tokenization import Tokenizer, build_tokenizer, gpt2_encoding
from gpt2repro.prepare import built_in


# `make quick` promises to start no process: it deselects tests that are marked slow or use one of these fixtures.
PROCESS_FIXTURES = {"run_script", "trainer_server", "preparer", "train", "python", "job"}
PROCESS_EVENTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")  # of sys.addaudithook
quick_test: str | None = None  # the running test, unless it is slow


def pytest_collection_modifyitems(items):
    for item in items:
        if PROCESS_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def only_slow_tests_start_processes(request, monkeypatch):
    global quick_test
    if request.node.get_closest_marker("slow"):
        yield
        return
    quick_test = request.node.nodeid
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", lambda *args: refuse("multiprocessing"))
    yield
    quick_test = None


def refuse(event: str) -> None:
    raise AssertionError(f"{quick_test} starts a process ({event}); mark it @pytest.mark.slow")


def audit(event: str, arguments: tuple) -> None:
    if quick_test is not None and event in PROCESS_EVENTS:
        refuse(event)


sys.addaudithook(audit)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by the processes that tests start


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data files beside a developer's checkout; users do not have them."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data does not exist")
    return folder


@pytest.fixture(scope="session")
def run_script():
    """Run a script of the project as a user does; returns the finished process with its output."""

    def run(script: str, *args, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, args)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    return run


@pytest.fixture(scope="session")
def topics() -> list[str]:
    """Some 80 real documents, half a megabyte: the topics of Python's language reference."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def texts(topics):
    """250 distinct documents: real paragraphs, and texts that are easily mangled."""
    paragraphs = dict.fromkeys(paragraph for topic in topics[:20] for paragraph in topic.split("\n\n"))
    return [*list(paragraphs)[:246], "", "a\r\nb\0", "👩‍👩‍👧 é", "written <|endoftext|> out"]


@pytest.fixture(scope="session")
def python_docs() -> list[str]:
    return list(built_in.python_docs())


@pytest.fixture(scope="session")
def data_dir(topics, tmp_path_factory) -> Path:
    """A prepared directory: the language reference, one token per character."""
    root = tmp_path_factory.mktemp("data")
    (root / "topics.txt").write_text("\n".join(topics))
    prepared = root / "prepared"
    prepare("files", "--source", root / "topics.txt", "--tokenizer", "char", "--output_dir", prepared)
    return prepared


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    return build_tokenizer("gpt2", [])


@pytest.fixture(scope="session")
def encoding() -> tiktoken.Encoding:
    return gpt2_encoding()


@pytest.fixture(scope="session")
def trainer_server():
    """Forks runs of train_accelerate.py on the CPU."""
    modules = ["matplotlib.pyplot", "train_accelerate", "trainer_faults"]
    with ForkServer(modules, {"ACCELERATE_USE_CPU": "true"}) as server:
        yield server


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size; needs root. MS_REMOUNT among the flags resizes it."""
    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size, flags=0):
        if libc.mount(b"tmpfs", bytes(disk), b"tmpfs", flags, f"size={size}".encode()):
            pytest.skip(f"cannot mount a file system: {os.strerror(ctypes.get_errno())}")
        return disk

    yield mount
    libc.umount2(bytes(disk), 2)


@pytest.fixture
def no_network(monkeypatch):
    """No name can be resolved; the names that were asked for."""
    asked = []

    def fail(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return asked
