"""Two models side by side on the same text: proof that a conversion is exact."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Comparison:
    """Model B against model A, over all positions of the text.

    hidden_max, hidden_mean: absolute difference of the hidden states of each layer, embedding first, final LayerNorm
        last; empty if the two models differ in depth or width.
    logits_max, logits_mean: absolute difference of the logits over the real vocabulary.
    loss_a, loss_b: nats per token.
    top1_agreement: share of positions at which both predict the same token.
    kl: Kullback-Leibler divergence from A to B, nats per token; kl_max: at the worst position.
    tokens: number of predicted tokens.
    """

    hidden_max: list[float]
    hidden_mean: list[float]
    logits_max: float
    logits_mean: float
    loss_a: float
    loss_b: float
    top1_agreement: float
    kl: float
    kl_max: float
    tokens: int


@torch.no_grad()
def compare_models(a: PreTrainedModel, b: PreTrainedModel, windows: torch.Tensor, vocab_size: int) -> Comparison:
    """Compare two causal language models; both in float32, on one device.

    Args:
        windows: (N, T + 1) int64 token ids; all but the last of each window are inputs, all but the first targets.
        vocab_size: number of real tokens; padding rows after them are left out.
    """
    a, b = a.eval(), b.eval()
    scored_windows: list[dict[str, torch.Tensor]] = []
    hidden_max, hidden_mean = [], []  # per window, (layers,) each
    for window in windows.split(1):
        window = window.to(a.device)
        inputs, targets = window[:, :-1], window[0, 1:]
        output_a = a(inputs, output_hidden_states=True, use_cache=False)
        output_b = b(inputs, output_hidden_states=True, use_cache=False)
        logits_a = output_a.logits[0, :, :vocab_size].float()
        logits_b = output_b.logits[0, :, :vocab_size].float()
        scored_windows.append(score_positions(logits_a, logits_b, targets))
        differences = layer_differences(output_a.hidden_states, output_b.hidden_states)
        hidden_max.append(torch.tensor([difference.max() for difference in differences]))
        hidden_mean.append(torch.tensor([difference.mean() for difference in differences]))
    scores = {name: torch.cat([window[name] for window in scored_windows]) for name in scored_windows[0]}
    means = {name: values.double().mean().item() for name, values in scores.items()}
    return Comparison(
        hidden_max=torch.stack(hidden_max).amax(0).tolist(),
        hidden_mean=torch.stack(hidden_mean).mean(0).tolist(),
        logits_max=scores["logits_max"].max().item(),
        logits_mean=means["logits_mean"],
        loss_a=means["nll_a"],
        loss_b=means["nll_b"],
        top1_agreement=means["same_top1"],
        kl=means["kl"],
        kl_max=scores["kl"].max().item(),
        tokens=windows[:, 1:].numel(),
    )


def score_positions(logits_a: torch.Tensor, logits_b: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """What can be said about two models' logits at each position of one window.

    Args:
        logits_a, logits_b: (T, V) float32.
        targets: (T,) int64.
    Returns:
        logits_max, logits_mean: absolute difference; nll_a, nll_b: nats; same_top1: bool; kl: nats. (T,) each.
    """
    difference = (logits_a - logits_b).abs()
    # In float64: rounding in float32 would give identical models a KL divergence above zero.
    log_p = F.log_softmax(logits_a.double(), dim=-1)
    log_q = F.log_softmax(logits_b.double(), dim=-1)
    return {
        "logits_max": difference.amax(-1),
        "logits_mean": difference.mean(-1),
        "nll_a": F.nll_loss(log_p, targets, reduction="none"),
        "nll_b": F.nll_loss(log_q, targets, reduction="none"),
        "same_top1": logits_a.argmax(-1) == logits_b.argmax(-1),
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
    }


def layer_differences(states_a: Sequence[torch.Tensor], states_b: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Absolute differences of the hidden states of each layer; none if the models differ in depth or width."""
    if len(states_a) != len(states_b) or states_a[0].shape != states_b[0].shape:
        return []
    return [(state_a.float() - state_b.float()).abs() for state_a, state_b in zip(states_a, states_b)]


def as_table(comparison: Comparison) -> str:
    """The comparison as lines of text."""
    c = comparison
    lines = [f"{'':30}{'largest':>12}{'mean':>12}   absolute difference"]
    for layer, (largest, mean) in enumerate(zip(c.hidden_max, c.hidden_mean)):
        name = "embedding" if layer == 0 else f"block {layer}"
        if layer == len(c.hidden_max) - 1:
            name += " and final LayerNorm"
        lines.append(f"{name:30}{largest:12.3e}{mean:12.3e}")
    if not c.hidden_max:
        lines.append("(no hidden states: the models differ in depth or width)")
    lines += [
        f"{'logits':30}{c.logits_max:12.3e}{c.logits_mean:12.3e}",
        "",
        f"{'loss of A':30}{c.loss_a:12.6f}   nats per token, {c.tokens:,} tokens",
        f"{'loss of B':30}{c.loss_b:12.6f}   difference {c.loss_b - c.loss_a:+.3e}",
        f"{'same likeliest token':30}{c.top1_agreement:12.4%}",
        f"{'KL divergence (A to B)':30}{c.kl:12.3e}   nats per token, {c.kl_max:.3e} at the worst position",
    ]
    return "\n".join(lines)
