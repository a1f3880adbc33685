"""HellaSwag accuracy as an `evaluate` metric that needs no network:
`evaluate.load("gpt2repro/evaluation/metrics/hellaswag")`.

`evaluate` copies this file into its module cache and runs the copy. The file therefore imports installed packages only,
one per line, because `evaluate` parses the import lines with a regular expression.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = """
Each item is a context with several endings, one of which is true. A language model chooses the likeliest ending: acc
compares the summed negative log-likelihoods of the endings, acc_norm these sums divided by the endings' lengths, which
does not penalize long endings.
"""

INPUTS = """
Args:
    summed_nll: for each item, the negative log-likelihood of each ending, summed over its tokens, in nats.
    ending_lengths: for each item, the length of each ending: its tokens, as in build-nanogpt, or its characters, as in
        lm-evaluation-harness.
    references: for each item, the index of the true ending.
Returns:
    acc: share of items whose true ending has the lowest sum. The first ending wins a tie.
    acc_norm: share of items whose true ending has the lowest sum divided by its length.
    acc_stderr, acc_norm_stderr: standard errors of the two shares; None for a single item.
    n: number of items.
"""

CITATION = """
@inproceedings{zellers2019hellaswag,
    title={HellaSwag: Can a Machine Really Finish Your Sentence?},
    author={Zellers, Rowan and Holtzman, Ari and Bisk, Yonatan and Farhadi, Ali and Choi, Yejin},
    booktitle={Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics},
    year={2019}
}
"""


class Hellaswag(evaluate.Metric):
    def _info(self):
        features = {
            "summed_nll": datasets.List(datasets.Value("float64")),
            "ending_lengths": datasets.List(datasets.Value("int64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/1905.07830", "https://github.com/rowanz/hellaswag"],
        )

    def _compute(self, summed_nll, ending_lengths, references):
        acc, acc_stderr = mean_and_stderr(predict(summed_nll, np.ones_like(summed_nll)) == references)
        acc_norm, acc_norm_stderr = mean_and_stderr(predict(summed_nll, ending_lengths) == references)
        return {
            "acc": acc,
            "acc_norm": acc_norm,
            "acc_stderr": acc_stderr,
            "acc_norm_stderr": acc_norm_stderr,
            "n": len(references),
        }


def predict(summed_nll, lengths):
    """The index of the ending with the lowest sum divided by its length; the first in a tie.

    Args:
        summed_nll, lengths: (n, endings).
    Returns:
        (n,) int64.
    """
    summed_nll, lengths = np.asarray(summed_nll), np.asarray(lengths)
    if not np.isfinite(summed_nll).all() or not (lengths > 0).all():
        raise ValueError("every ending needs a finite summed_nll and a length above 0")  # argmin would pick a NaN
    return (summed_nll / lengths).argmin(axis=1)


def mean_and_stderr(correct):
    """The share of True in `correct`, (n,) bool, and its standard error from the sample variance.

    The sample variance of n zeros and ones with mean p is p (1 - p) n / (n - 1); that of their mean is 1/n of it.
    Source: lm-evaluation-harness lm_eval/api/metrics.py, mean_stderr.
    """
    n = len(correct)
    p = float(np.mean(correct))
    if n < 2:
        return p, None
    return p, (p * (1 - p) / (n - 1)) ** 0.5
