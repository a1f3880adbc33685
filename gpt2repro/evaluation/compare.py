"""Two models side by side on the same text: how a user convinces himself that a conversion is exact."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Comparison:
    """Of model B against model A, over all positions of the text.

    hidden_max, hidden_mean: absolute difference of the hidden states of each layer, embedding first, final LayerNorm
        last; empty where the two differ in depth or width.
    logits_max, logits_mean: absolute difference of the logits of the tokens that both know.
    loss_a, loss_b: nats per token.
    top1_agreement: share of positions where both find the same token the likeliest.
    kl: Kullback-Leibler divergence of B from A, nats per token; kl_max: at the worst position.
    tokens: predicted.
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
        windows: (N, T + 1) int64 token ids; all but the last of each are read, all but the first are predicted.
        vocab_size: real tokens; padding rows behind them are left out.
    """
    a, b = a.eval(), b.eval()
    sums, maxima = torch.zeros(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    hidden_mean = hidden_max = None
    for window in windows.split(1):
        window = window.to(a.device)
        inputs, targets = window[:, :-1], window[0, 1:]
        outputs = [model(inputs, output_hidden_states=True, use_cache=False) for model in (a, b)]
        logits = [output.logits[0, :, :vocab_size].float() for output in outputs]
        log_p, log_q = (F.log_softmax(x.double(), dim=-1) for x in logits)  # float32 leaves a KL of identical models
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        difference = (logits[0] - logits[1]).abs()
        sums += torch.stack(
            [
                difference.mean(-1).sum(),
                F.nll_loss(log_p, targets, reduction="sum"),
                F.nll_loss(log_q, targets, reduction="sum"),
                (logits[0].argmax(-1) == logits[1].argmax(-1)).sum(),
                kl.sum(),
            ]
        ).cpu()
        maxima = torch.maximum(maxima, torch.stack([difference.max().double(), kl.max()]).cpu())
        states = [output.hidden_states for output in outputs]
        if len(states[0]) == len(states[1]) and states[0][0].shape == states[1][0].shape:
            gaps = [(x.float() - y.float()).abs() for x, y in zip(*states)]
            largest, mean = torch.stack([gap.max() for gap in gaps]), torch.stack([gap.mean() for gap in gaps])
            hidden_max = largest if hidden_max is None else torch.maximum(hidden_max, largest)
            hidden_mean = mean if hidden_mean is None else hidden_mean + mean
    tokens = windows[:, 1:].numel()
    logits_mean, loss_a, loss_b, agreement, kl = (sums / tokens).tolist()
    return Comparison(
        hidden_max=[] if hidden_max is None else hidden_max.tolist(),
        hidden_mean=[] if hidden_mean is None else (hidden_mean / len(windows)).tolist(),
        logits_max=maxima[0].item(),
        logits_mean=logits_mean,
        loss_a=loss_a,
        loss_b=loss_b,
        top1_agreement=agreement,
        kl=kl,
        kl_max=maxima[1].item(),
        tokens=tokens,
    )


def as_table(comparison: Comparison) -> str:
    """The comparison as lines of text."""
    c = comparison
    lines = [f"{'':30}{'largest':>12}{'mean':>12}   absolute difference"]
    for layer, (largest, mean) in enumerate(zip(c.hidden_max, c.hidden_mean)):
        name = "embedding" if layer == 0 else f"block {layer}"
        name += " and final LayerNorm" if layer == len(c.hidden_max) - 1 else ""
        lines.append(f"{name:30}{largest:12.3e}{mean:12.3e}")
    if not c.hidden_max:
        lines.append("(hidden states: the two differ in depth or width)")
    lines += [
        f"{'logits':30}{c.logits_max:12.3e}{c.logits_mean:12.3e}",
        "",
        f"{'loss of A':30}{c.loss_a:12.6f}   nats per token, {c.tokens:,} tokens",
        f"{'loss of B':30}{c.loss_b:12.6f}   difference {c.loss_b - c.loss_a:+.3e}",
        f"{'same likeliest token':30}{c.top1_agreement:12.4%}",
        f"{'KL divergence (A to B)':30}{c.kl:12.3e}   nats per token, {c.kl_max:.3e} at the worst position",
    ]
    return "\n".join(lines)
