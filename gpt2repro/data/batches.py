"""Micro-batches of one rank, read ahead by worker processes."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from gpt2repro.data.mixture import Mixture
from gpt2repro.data.order import mix, source_seed, window_starts
from gpt2repro.errors import UserError, first_line
from gpt2repro.recipe import Recipe


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Item (b, m) is micro-batch m of batch b on this rank.

    A batch takes the next samples of the data order, as many as it has room for; its micro-batch m takes the next
    micro_batch_size of them for each rank in turn. So the tokens of a batch do not depend on the world size.
    """

    data: Mixture
    recipe: Recipe
    rank: int
    num_processes: int

    def accumulation(self, batch: int) -> int:
        """How many micro-batches each rank has in a batch."""
        return self.recipe.accumulation(self.num_processes, batch)

    def samples(self, batch: int, micro: int) -> np.ndarray:
        """(micro_batch_size,) int64: the numbers of the samples in a micro-batch."""
        first = self.recipe.first_sample(batch)
        size = self.recipe.sequences_per_micro_batch
        first += (micro * self.num_processes + self.rank) * size
        return np.arange(first, first + size)

    def __getitem__(self, where: tuple[int, int]) -> torch.Tensor:
        """(micro_batch_size, T + 1) int64 token ids: inputs are all but the last column, targets all but the first."""
        recipe, T = self.recipe, self.recipe.sequence_length
        tokens = np.empty((recipe.sequences_per_micro_batch, T + 1), np.int64)
        sources, numbers = mix(self.samples(*where), self.data.slots, recipe.seed)
        for source, stream in enumerate(self.data.streams):
            rows = np.flatnonzero(sources == source)
            seed = source_seed(recipe.seed, source)
            starts = window_starts(recipe.sampling, numbers[rows], len(stream), T, seed)
            for row, start in zip(rows, starts):
                tokens[row] = stream.read(int(start), T + 1)
        return torch.from_numpy(tokens)

    def iterate(
        self, first_step: int, pin_memory: bool, batch_of: Callable[[int], int] = lambda step: step
    ) -> Iterator[torch.Tensor]:
        """The micro-batches from `first_step` to the end of the run, in order.

        Worker processes that die, e.g. for lack of shared memory, are replaced unless the new ones get nothing done.

        Args:
            batch_of: the batch that a step reads.
        Raises:
            UserError: a token is not an id of the vocabulary.
        """
        done, restarted_at = 0, -1  # micro-batches
        while True:
            loader = DataLoader(
                self,
                batch_size=None,  # an item is a batch already
                sampler=islice(self._order(first_step, batch_of), done, None),
                num_workers=self.recipe.num_workers,
                pin_memory=pin_memory,
            )
            try:
                batches = iter(loader)
                if self.recipe.num_workers:
                    # torch's handler would raise in the middle of a step; next(batches) reports a dead worker as well
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for tokens in batches:
                    yield tokens
                    done += 1
                return
            except UserError as error:
                # A worker's arrives with its traceback: "Caught UserError ... gpt2repro.errors.UserError: MESSAGE"
                raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
            except (RuntimeError, OSError, EOFError) as error:
                # An OSError or EOFError comes from the pipe of a worker that died.
                is_of_a_worker = "DataLoader worker" in str(error) or not isinstance(error, RuntimeError)
                has_died = self.recipe.num_workers > 0 and is_of_a_worker
                if not has_died or done == restarted_at:
                    raise
                restarted_at = done
                message = f"a data loader worker died ({first_line(error)}); started again"
                print(message, file=sys.stderr, flush=True)

    def _order(self, first_step: int, batch_of: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        for step in range(first_step, self.recipe.max_steps):
            batch = batch_of(step)
            for micro in range(self.accumulation(batch)):
                yield batch, micro


class Batches:
    """The batches of a run on this rank, step by step.

    Args:
        batch_of: the number of the batch that a step reads; Guard.batch leaves out bad ones.

    Attributes:
        seconds_waited: in all, for data that had not been read ahead.
    """

    def __init__(
        self,
        data: Mixture,
        recipe: Recipe,
        accelerator: Accelerator,
        batch_of: Callable[[int], int] = lambda step: step,
    ):
        self.micro_batches = MicroBatches(data, recipe, accelerator.process_index, accelerator.num_processes)
        self.pin_memory = accelerator.device.type == "cuda"
        self.batch_of = batch_of
        self.stream: Iterator[torch.Tensor] = iter(())
        self.next_step = -1  # of the stream
        self.seconds_waited = 0.0

    def of_step(self, step: int) -> "StepBatches":
        """The micro-batches of step `step`, counted from 0. Steps are asked for in order; at any other one, such as
        the first or one after a rollback, reading ahead starts anew there."""
        if step != self.next_step:
            self.stream = self.micro_batches.iterate(step, self.pin_memory, self.batch_of)
        self.next_step = step + 1
        return StepBatches(self, self.micro_batches.accumulation(self.batch_of(step)))


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one step, (micro_batch_size, T + 1) int64 each; its length is the gradient accumulation."""

    batches: Batches
    accumulation: int

    def __len__(self) -> int:
        return self.accumulation

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.accumulation):
            began = time.perf_counter()
            tokens = next(self.batches.stream)
            self.batches.seconds_waited += time.perf_counter() - began
            yield tokens
