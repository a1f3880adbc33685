"""Micro-batches of one process, read ahead by worker processes."""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gpt2repro.data.mixture import Mixture
from gpt2repro.data.order import mix, source_seed, window_starts
from gpt2repro.errors import UserError, first_line
from gpt2repro.recipe import Recipe


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Item (b, m) is the m-th micro-batch of batch b that this process sends through the model.

    A batch takes the next samples, as many as it has; its micro-batch m takes the next micro_batch_size of them for
    each rank in turn. So the tokens of a batch do not depend on the number of processes.
    """

    data: Mixture
    recipe: Recipe
    rank: int
    num_processes: int

    def samples(self, batch: int, micro: int) -> np.ndarray:
        """(micro_batch_size,) int64: the numbers of the samples in a micro-batch."""
        first = self.recipe.first_sample(batch)
        first += (micro * self.num_processes + self.rank) * self.recipe.micro_batch_size
        return np.arange(first, first + self.recipe.micro_batch_size)

    def __getitem__(self, where: tuple[int, int]) -> torch.Tensor:
        """(micro_batch_size, T + 1) int64 token ids: inputs are all but the last column, targets all but the first."""
        recipe, T = self.recipe, self.recipe.sequence_length
        tokens = np.empty((recipe.micro_batch_size, T + 1), np.int64)
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
        """The micro-batches from `first_step` to the end of the run, in order. Worker processes that die, e.g. for want
        of shared memory, are replaced, unless the new ones get nothing done.

        Args:
            batch_of: the batch that a step reads.
        Raises:
            UserError: a token that is no id of the vocabulary.
        """
        done, restarted_at = 0, -1  # micro-batches
        while True:
            loader = DataLoader(
                self,
                batch_size=None,  # an item is a batch already
                sampler=islice(self._each(first_step, batch_of), done, None),
                num_workers=self.recipe.num_workers,
                pin_memory=pin_memory,
            )
            try:
                batches = iter(loader)
                if self.recipe.num_workers:  # torch's handler raises in the midst of a step; next(batches) tells too
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for tokens in batches:
                    yield tokens
                    done += 1
                return
            except UserError as error:  # a worker process sends it as the last line of its traceback
                raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
            except (RuntimeError, OSError, EOFError) as error:  # the last two: of the pipe that it died upon
                died = "DataLoader worker" in str(error) or not isinstance(error, RuntimeError)
                if not died or done == restarted_at:
                    raise
                restarted_at = done
                print(
                    f"a process that reads batches died ({first_line(error)}); started again",
                    file=sys.stderr,
                    flush=True,
                )

    def _each(self, first_step: int, batch_of: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        for batch in map(batch_of, range(first_step, self.recipe.max_steps)):
            for micro in range(self.recipe.accumulation(self.num_processes, batch)):
                yield batch, micro
