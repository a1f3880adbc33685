"""Micro-batches of one process, read ahead by worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gpt2repro.data_order import mix, source_seed, window_starts
from gpt2repro.errors import UserError
from gpt2repro.mixture import Mixture
from gpt2repro.recipe import Recipe


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Item (s, m) is the m-th micro-batch that this process sends through the model in step s.

    A step takes the next samples, as many as its batch has; its micro-batch m takes the next micro_batch_size of them
    for each rank in turn. So the tokens of a step do not depend on the number of processes.
    """

    data: Mixture
    recipe: Recipe
    rank: int
    num_processes: int

    def samples(self, step: int, micro: int) -> np.ndarray:
        """(micro_batch_size,) int64: the numbers of the samples in a micro-batch."""
        first = self.recipe.first_sample(step)
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

    def iterate(self, first_step: int, pin_memory: bool) -> Iterator[torch.Tensor]:
        """The micro-batches from `first_step` to the end of the run, in order.

        Raises:
            UserError: a token that is no id of the vocabulary.
        """
        steps = range(first_step, self.recipe.max_steps)
        loader = DataLoader(
            self,
            batch_size=None,  # an item is a batch already
            sampler=((s, m) for s in steps for m in range(self.recipe.accumulation(self.num_processes, s))),
            num_workers=self.recipe.num_workers,
            pin_memory=pin_memory,
        )
        try:
            yield from loader
        except UserError as error:  # a worker process sends it as the last line of its traceback
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
