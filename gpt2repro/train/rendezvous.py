"""How the processes of a run come together: they wait minutes for each other, compare what they were started with, and
only then build the process group, whose collectives may take an hour."""

import dataclasses
import json
import os
from datetime import timedelta
from typing import Any

import torch.distributed
from accelerate import PartialState

from gpt2repro.errors import UserError, first_line
from gpt2repro.processes import cpu_asked, world_size
from gpt2repro.recipe import Recipe


MEETING_TIME = timedelta(minutes=10)
# The other ranks wait while the main process hashes the data or writes a large checkpoint. That may take longer than
# NCCL's default timeout of 10 minutes.
COLLECTIVE_TIME = timedelta(hours=1)
OF_A_MACHINE = {"output_dir", "data_dir", "data", "corpus", "hellaswag_data", "init_from", "num_workers"}


def join(recipe: Recipe) -> None:
    """Build the process group, if this run has several processes and it does not exist yet.

    Raises:
        UserError: some processes did not come, or they do not belong together.
    """
    try:
        store = None if torch.distributed.is_initialized() or world_size() == 1 else meet(recipe)
        PartialState(cpu=cpu_asked(), timeout=COLLECTIVE_TIME)
    except torch.distributed.DistError as error:
        raise UserError(f"the processes of this run lost each other ({first_line(error)}); {_remedy()}") from error
    del store  # rank 0's is the server at which the others build the group


def meet(recipe: Recipe) -> torch.distributed.Store:
    """Wait until all ranks have come, and compare their recipes.

    Returns:
        The store at which they met.
    Raises:
        UserError: as `join`.
    """
    rank, size = int(os.environ["RANK"]), world_size()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store may be the one of the last attempt
    keys = [f"gpt2repro_{attempt}_rank_{other}" for other in range(size)]
    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, size, timeout=MEETING_TIME))
        if store.add(f"{keys[rank]}_count", 1) > 1:
            raise UserError(f"another process is rank {rank} at {_address()}, too; {_remedy()}")
        store.set(keys[rank], json.dumps(_shared_settings(recipe)))
        store.wait(keys, MEETING_TIME)
    except torch.distributed.DistError as error:
        raise UserError(
            f"not all of the {size} processes of this run have come to {_address()} within "
            f"{MEETING_TIME.total_seconds() / 60:g} minutes ({first_line(error)}); {_remedy()}"
        ) from error
    _refuse_other_recipes([json.loads(settings) for settings in store.multi_get(keys)])
    return store


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
    """What all ranks must agree on: all but paths, and what may suit a machine."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in OF_A_MACHINE}


def _refuse_other_recipes(settings: list[dict[str, Any]]) -> None:
    """
    Args:
        settings: of each rank.
    """
    main = settings[0]
    for rank, other in enumerate(settings):
        different = [name for name in main if other.get(name) != main[name]]
        if different:
            name = different[0]
            raise UserError(
                f"rank {rank} was started with {name}={other.get(name)}, rank 0 with {name}={main[name]}; start all "
                f"processes of a run with the same recipe and flags, and other runs at a port of their own"
            )


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _remedy() -> str:
    return (
        "see why the others did not start or ended, and start all machines together, with the same --main_process_ip "
        "and a --main_process_port that no other run uses"
    )
