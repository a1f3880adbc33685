"""Validation loss on a fixed set of windows, independent of the world size."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from gpt2repro.data.mixture import Mixture
from gpt2repro.data.order import count_windows
from gpt2repro.data.token_stream import TokenStream
from gpt2repro.errors import SharedError
from gpt2repro.recipe import Recipe
from gpt2repro.run_folder import RunFolder


def validation_losses(
    model: torch.nn.Module, data: Mixture, recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """The validation loss, and for a mixture also that of each source. All ranks call it and get the same result.

    Returns:
        `val_loss`, nats per token. For a mixture it is the weighted mean of the losses on each source's validation
        split, which are returned as `val_loss_NAME`.
    Raises:
        SharedError: a loss is not finite.
    """
    losses = [validation_loss(model, stream, recipe, accelerator) for stream in data.streams]
    if not all(map(math.isfinite, losses)):
        raise SharedError(f"the validation loss is {sum(losses)}: the weights are broken; {_remedy(recipe)}")
    metrics = {"val_loss": sum(share * loss for share, loss in zip(data.shares, losses))}
    if len(losses) > 1:
        metrics |= {f"val_loss_{name}": loss for name, loss in zip(data.names, losses)}
    return metrics


def _remedy(recipe: Recipe) -> str:
    """What to do about weights that are broken."""
    if recipe.eval_only:
        return "choose another --init_from"
    start_over = "start over with a lower learning_rate"
    if RunFolder(recipe.output_dir).latest_checkpoint() is None:
        return start_over
    return f"go back to an older checkpoint in {recipe.output_dir} by deleting the newer ones, or {start_over}"


@torch.no_grad()
def validation_loss(model: torch.nn.Module, stream: TokenStream, recipe: Recipe, accelerator: Accelerator) -> float:
    """Mean loss in nats per token over the windows that tile the start of the stream.

    The windows have the recipe's sequence_length and cover its validation_tokens (at least one window; 0: the whole
    stream). Every batch has micro_batch_size rows, the last one padded with rows of ignored labels, so that
    torch.compile sees a single shape.

    Args:
        model: returns `.loss`, the mean over all labels that are not ignored, given input_ids and shift_labels.
    """
    T, batch_size = recipe.sequence_length, recipe.sequences_per_micro_batch
    n_windows = count_windows(len(stream), T)
    if recipe.validation_tokens:
        n_windows = min(n_windows, max(1, recipe.validation_tokens // T))
    mine = range(accelerator.process_index, n_windows, accelerator.num_processes)

    was_training = model.training
    model.eval()
    total = 0.0
    # The same number of batches on each rank, even if the last is empty: a sharded model hangs if one rank runs more
    # forward passes than the others.
    windows_per_rank = math.ceil(n_windows / accelerator.num_processes)
    for first in range(0, windows_per_rank, batch_size):
        windows = mine[first : first + batch_size]
        tokens = torch.zeros(batch_size, T + 1, dtype=torch.int64)
        for row, window in enumerate(windows):
            tokens[row] = torch.from_numpy(stream.read(window * T, T + 1))
        labels = tokens[:, 1:].clone()
        labels[len(windows) :] = -100
        inputs, labels = tokens[:, :-1].to(accelerator.device), labels.to(accelerator.device)
        # The loss covers every position. logits_to_keep limits the logits, which are not read here, to one position.
        with accelerator.autocast():
            loss = model(input_ids=inputs, shift_labels=labels, logits_to_keep=1, use_cache=False).loss
        if windows:
            total += loss.item() * len(windows)
    model.train(was_training)
    return sum(gather_object([total])) / n_windows
