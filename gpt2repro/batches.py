"""Micro-batches of one process, read ahead by worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gpt2repro.data_order import window_starts
from gpt2repro.recipe import Recipe
from gpt2repro.shards import TokenStream


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Item i is the i-th micro-batch that this process sends through the model since the start of the run.

    Step s takes the samples s * S ... s * S + S - 1, where S sequences make a global batch; its micro-batch m takes
    the next micro_batch_size samples for each rank in turn. So the tokens of a step do not depend on the number of
    processes.
    """

    stream: TokenStream
    recipe: Recipe
    rank: int
    num_processes: int

    def samples(self, index: int) -> np.ndarray:
        """(micro_batch_size,) int64: the numbers of the samples in micro-batch `index`."""
        step, micro = divmod(index, self.recipe.accumulation(self.num_processes))
        first = step * self.recipe.sequences_per_step
        first += (micro * self.num_processes + self.rank) * self.recipe.micro_batch_size
        return np.arange(first, first + self.recipe.micro_batch_size)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(micro_batch_size, T + 1) int64 token ids: inputs are all but the last column, targets all but the first."""
        recipe = self.recipe
        starts = window_starts(
            recipe.sampling, self.samples(index), len(self.stream), recipe.sequence_length, recipe.seed
        )
        windows = [self.stream.read(int(start), recipe.sequence_length + 1) for start in starts]
        return torch.from_numpy(np.stack(windows))

    def iterate(self, first_step: int, pin_memory: bool) -> Iterator[torch.Tensor]:
        """The micro-batches from `first_step` to the end of the run, in order."""
        accumulation = self.recipe.accumulation(self.num_processes)
        loader = DataLoader(
            self,
            batch_size=None,  # an item is a batch already
            sampler=range(first_step * accumulation, self.recipe.max_steps * accumulation),
            num_workers=self.recipe.num_workers,
            pin_memory=pin_memory,
        )
        return iter(loader)
