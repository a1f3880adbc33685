"""How the ranks of a run come together: who does not come, and who does not belong there, is one line."""

import json
from datetime import timedelta

import pytest
from accelerate.utils.other import get_free_port
from torch.distributed import TCPStore

from gpt2repro.errors import UserError
from gpt2repro.recipe import Recipe
from gpt2repro.train import rendezvous


pytestmark = pytest.mark.slow  # they wait for processes that never come


@pytest.fixture
def port(monkeypatch):
    """Where the two ranks of a run meet; this process is one of them."""
    monkeypatch.setattr(rendezvous, "MEETING_TIME", timedelta(seconds=1))
    port = get_free_port()
    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


@pytest.fixture
def torchruns_store(port, monkeypatch):
    """The store of torchrun, as its processes see it; this one is rank 1."""
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "1")
    return store


@pytest.mark.parametrize("rank", [0, 1])
def test_a_partner_that_never_comes(port, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(UserError, match=f"not all of the 2 processes .* to 127.0.0.1:{port} within .*; see why"):
        rendezvous.meet(Recipe())


def test_a_partner_that_never_comes_although_the_launcher_waits(torchruns_store):
    with pytest.raises(UserError, match="not all of the 2 processes"):
        rendezvous.meet(Recipe())


def come(store: TCPStore, recipe: Recipe) -> None:
    """As rank 0 does in rendezvous.meet."""
    store.set("gpt2repro_0_rank_0", json.dumps(rendezvous._shared_settings(recipe)))


def test_paths_and_workers_may_differ(torchruns_store):
    come(torchruns_store, Recipe(output_dir="elsewhere", data_dir="/mnt/data", num_workers=7))
    assert rendezvous.meet(Recipe()) is not None


def test_another_recipe_is_another_run(torchruns_store):
    come(torchruns_store, Recipe(seed=2, data_dir="/mnt/data"))
    with pytest.raises(UserError, match="rank 1 was started with seed=1337, rank 0 with seed=2; .* of their own"):
        rendezvous.meet(Recipe())


def test_a_rank_that_is_there_already_is_of_another_run(torchruns_store):
    come(torchruns_store, Recipe())
    rendezvous.meet(Recipe())
    with pytest.raises(UserError, match="another process is rank 1 at 127.0.0.1:.*, too; .* that no other run uses"):
        rendezvous.meet(Recipe())
