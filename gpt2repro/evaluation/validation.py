"""Validation loss on a fixed set of windows, whatever the number of processes."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from gpt2repro.data.mixture import Mixture
from gpt2repro.data.order import count_windows
from gpt2repro.data.shards import TokenStream
from gpt2repro.errors import SharedError
from gpt2repro.recipe import Recipe


class Best:
    """The best validation of a run.

    Args:
        patience: validations without a better one after which it is old; 0: never.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.step, self.val_loss, self.since = 0, math.inf, 0

    def note(self, step: int, val_loss: float) -> None:
        if val_loss < self.val_loss:
            self.step, self.val_loss, self.since = step, val_loss, 0
        else:
            self.since += 1

    @property
    def is_old(self) -> bool:
        return 0 < self.patience <= self.since

    def state_dict(self) -> dict:
        finite = self.val_loss if math.isfinite(self.val_loss) else None
        return {"step": self.step, "val_loss": finite, "since": self.since}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.since = state["step"], state["since"]
        self.val_loss = math.inf if state["val_loss"] is None else state["val_loss"]


def validation_losses(
    model: torch.nn.Module, data: Mixture, recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """The metrics of a validation: `val_loss`, and in a mixture `val_loss_NAME` for each source's validation split, of
    which val_loss is then the mean with the weights of the mixture. All in nats per token.

    Raises:
        SharedError: one is not finite.
    """
    losses = [validation_loss(model, stream, recipe, accelerator) for stream in data.streams]
    if not all(map(math.isfinite, losses)):
        raise SharedError(
            f"the validation loss is {sum(losses)}: the weights are broken; go back to an older checkpoint of "
            f"{recipe.output_dir} by deleting the newer ones, or start again with a lower learning_rate"
        )
    metrics = {"val_loss": sum(share * loss for share, loss in zip(data.shares, losses))}
    if len(losses) > 1:
        metrics |= {f"val_loss_{name}": loss for name, loss in zip(data.names, losses)}
    return metrics


@torch.no_grad()
def validation_loss(model: torch.nn.Module, stream: TokenStream, recipe: Recipe, accelerator: Accelerator) -> float:
    """Mean loss over the windows that tile the start of the stream, in nats per token.

    The windows are those of the recipe's validation_tokens (at least one; 0: all), of its sequence_length. Every batch
    has micro_batch_size rows, the last one filled up with rows without labels, so that a model is compiled only once.

    Args:
        model: gives `.loss`, the mean over the labels that count, from input_ids and shift_labels.
    """
    T, batch_size = recipe.sequence_length, recipe.micro_batch_size
    n_windows = count_windows(len(stream), T)
    if recipe.validation_tokens:
        n_windows = min(n_windows, max(1, recipe.validation_tokens // T))
    mine = range(accelerator.process_index, n_windows, accelerator.num_processes)

    was_training = model.training
    model.eval()
    total = 0.0
    # As many batches on each process, though the last may hold no window: a sharded model hangs if one process runs a
    # forward pass more than the others.
    for first in range(0, math.ceil(n_windows / accelerator.num_processes), batch_size):
        windows = mine[first : first + batch_size]
        tokens = torch.zeros(batch_size, T + 1, dtype=torch.int64)
        for row, window in enumerate(windows):
            tokens[row] = torch.from_numpy(stream.read(window * T, T + 1))
        labels = tokens[:, 1:].clone()
        labels[len(windows) :] = -100
        inputs, labels = tokens[:, :-1].to(accelerator.device), labels.to(accelerator.device)
        # The loss covers every position; logits_to_keep spares the logits, which nobody reads here.
        with accelerator.autocast():
            loss = model(input_ids=inputs, shift_labels=labels, logits_to_keep=1, use_cache=False).loss
        if windows:
            total += loss.item() * len(windows)
    model.train(was_training)
    return sum(gather_object([total])) / n_windows
