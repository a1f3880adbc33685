"""What loss to expect of a longer run, from short ones: a power law of the tokens, with its uncertainty.

    python benchmarks/extrapolate.py 204800=6.96 409600=6.31 819200=5.54 --tokens 65536000

Each short run is a whole one, with its own decay of the learning rate; with lr_schedule wsd the same command with a
larger --max_steps extends the last one, exactly. docs/small-machines.md has the commands.

The law is L(D) = E + B / D**b (Hoffmann et al. 2022, with the model's size fixed). Few points do not determine all
three, so for each exponent b between 0.1 and 1 the best E and B are computed, and all laws that fit nearly as well as
the best count. What is printed is the range of their predictions, which widens with the distance; that the law itself
may fail, because text is repeated or the first steps follow another one, it does not cover.
"""

import numpy as np

from gpt2repro.errors import Parser, UserError, run_script


EXPONENTS = np.linspace(0.1, 1.0, 181)
# nats; two seeds of a small run differ by about as much, e.g. those of shakespeare-char-cpu: 1.901 to 1.920
SEED_SPREAD = 0.02


def predictions(tokens: list[float], losses: list[float], target: float) -> tuple[np.ndarray, np.ndarray]:
    """The exponents whose law fits, and what each predicts.

    Args:
        tokens, losses: of the short runs, nats per token; three or more.
        target: tokens of the long run.
    Returns:
        Both (laws,) float64: laws with a positive E whose residuals are, in the root mean square, at most SEED_SPREAD
        above those of the best.
    """
    sizes, values = np.array(tokens, np.float64), np.array(losses, np.float64)
    rows = []
    for exponent in EXPONENTS:
        design = np.stack([np.ones_like(sizes), (sizes / sizes[-1]) ** -exponent], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(design, values, rcond=None)
        residual = np.sqrt(np.mean((design @ [floor, scale] - values) ** 2))
        if floor > 0:
            rows.append((exponent, residual, floor + scale * (target / sizes[-1]) ** -exponent))
    exponents, residuals, predicted = np.array(rows).reshape(-1, 3).T
    if len(rows) == 0 or residuals.min() > 2 * SEED_SPREAD:
        raise UserError("no power law fits these losses; leave out the shortest runs, or measure longer ones")
    kept = residuals <= residuals.min() + SEED_SPREAD
    return exponents[kept], predicted[kept]


def measured(pair: str) -> tuple[float, float]:
    """Tokens and loss of TOKENS=LOSS."""
    tokens, loss = map(float, pair.split("="))
    return tokens, loss


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "measured", nargs="+", type=measured, metavar="TOKENS=LOSS", help="of three or more runs, shortest first"
    )
    parser.add_argument("--tokens", type=float, required=True, help="of the run to predict")
    args = parser.parse_args(argv)
    if len(args.measured) < 3:
        parser.error("a power law with a limit needs three or more runs")
    tokens, losses = map(list, zip(*args.measured))
    exponents, predicted = predictions(tokens, losses, args.tokens)
    print(f"{args.tokens:,.0f} tokens, {args.tokens / tokens[-1]:,.0f} times the longest run")
    print(
        f"loss {predicted.min():.2f} to {predicted.max():.2f}, for exponents {exponents[0]:.2f} to {exponents[-1]:.2f}"
    )


if __name__ == "__main__":
    run_script(main)
