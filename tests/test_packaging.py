"""The wheel, the sdist, and the constraints files that say which releases of other packages go with them."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROMISES = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
CUDA = ("nvidia-", "cuda-", "triton")  # required by torch on some machines, in releases that torch itself pins


def run(*command, **options) -> None:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of the checkout that git tracks."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listing.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory) -> Path:
    """Built from a copy of the tracked files, without the network."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')", cwd=checkout)
    (archive,) = (checkout / "dist").iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, sdist)
    (archive,) = folder.iterdir()
    return archive


def test_type_checks_read_our_files_and_no_run_beside_them():
    """Runs and published folders hold copies of the model's file; mypy refuses two modules of one name."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    chosen = {path for pattern in patterns for path in ROOT.glob(pattern)}
    ours = {ROOT / "gpt2repro", ROOT / "scripts", *ROOT.glob("*.py")}
    assert chosen == ours and not any("**" in pattern for pattern in patterns)


@pytest.mark.slow
def test_the_sdist_holds_the_checkout(sdist, tracked):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - names == set(), "name these, or their folder, in MANIFEST.in"


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel, tracked):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.startswith("gpt2repro/")} | {"modeling_gpt2repro.py"}
    assert {"gpt2repro/py.typed", "gpt2repro/evaluation/metrics/hellaswag/hellaswag.py"} <= names


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run(sys.executable, "-P", ROOT / "tests" / "wheel_user.py", site, cwd=empty, env=environment)


def pins(file: str) -> dict[str, Version]:
    """The releases that a constraints file pins."""
    lines = (ROOT / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in requirements}


def test_the_oldest_constraints_are_the_lower_bounds():
    bounds = {}
    for requirement in map(Requirement, PROMISES):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                bounds[canonicalize_name(requirement.name)] = Version(specifier.version)
    assert pins("constraints-oldest.txt") == bounds


def test_the_constraints_pin_whatever_a_pinned_release_requires():
    pinned = pins("constraints.txt")
    installed = {canonicalize_name(package.name): package for package in distributions()}
    required = {canonicalize_name(Requirement(line).name) for line in PROMISES} - {"gpt2repro"}
    for name in set(pinned) & set(installed):
        if Version(installed[name].version).public != pinned[name].public:
            continue  # another release is installed; it may require other packages
        for requirement in map(Requirement, installed[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required.add(canonicalize_name(requirement.name))
    missing = {name for name in required - set(pinned) if not name.startswith(CUDA)}
    assert not missing, "run `make constraints`"


def test_the_pre_commit_hooks_are_the_tools_that_make_lint_runs():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {re.sub(r".*/|-pre-commit", "", repo["repo"]): repo["rev"] for repo in repositories}
    for tool in ("ruff", "codespell"):
        assert revisions[tool] == f"v{pins('constraints.txt')[tool]}"
