"""Scores of shared words and characters, through the reference implementations of each.

They come with the extra `peftcli[metrics]`; without it, each raises one clear error.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from peftcli.errors import ResourceError

Statistics = tuple[float, ...]
EXTRA = "pip install 'peftcli[metrics]'"


def rouge_l(prediction: str, reference: str) -> Statistics:
    """ROUGE-L F1 without stemming, by the rouge-score package (Lin, 2004)."""
    return float(_rouge().score(reference, prediction)["rougeL"].fmeasure), 1.0


def chrf(prediction: str, reference: str) -> Statistics:
    """Counts of character n-grams up to 6, by sacrebleu: answer, reference, shared, per order.

    Popovic, 2015, chrF: character n-gram F-score for automatic MT evaluation.
    """
    ngrams = _sacrebleu_ngrams()
    counts: list[float] = []
    for own, other in zip(ngrams(prediction, 6), ngrams(reference, 6), strict=True):
        shared = (own & other).total()
        counts += [own.total() if other else 0, other.total(), shared]
    return tuple(map(float, counts))


def bleu(prediction: str, reference: str) -> Statistics:
    """Matches and totals of word n-grams up to 4 and both lengths, by sacrebleu (13a tokens).

    Papineni et al., 2002; Post, 2018, arXiv 1804.08771.
    """
    found = _sacrebleu_bleu().sentence_score(prediction, [reference])
    counts = (*found.counts, *found.totals, found.sys_len, found.ref_len)
    return tuple(map(float, counts))


def chrf_total(sums: Any) -> Any:
    """F2 of the mean precision and mean recall over the orders that occur, from 0 to 100."""
    import numpy as np

    own, other, shared = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    occurs = (own > 0) & (other > 0)
    orders = np.maximum(1, occurs.sum(-1))
    precision = np.where(occurs, shared / np.maximum(own, 1), 0).sum(-1) / orders
    recall = np.where(occurs, shared / np.maximum(other, 1), 0).sum(-1) / orders
    below = 4 * precision + recall
    return 100 * 5 * precision * recall / np.where(below > 0, below, 1)


def bleu_total(sums: Any) -> Any:
    """sacrebleu's corpus BLEU with its default smoothing, from 0 to 100."""
    import numpy as np

    def score(one: Any) -> float:
        counts, totals = [int(x) for x in one[:4]], [int(x) for x in one[4:8]]
        lengths = int(one[8]), int(one[9])
        compute = type(_sacrebleu_bleu()).compute_bleu
        return float(compute(counts, totals, *lengths, smooth_method="exp").score)

    return np.apply_along_axis(score, -1, sums)


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ResourceError("metric rouge_l needs the rouge-score package", EXTRA) from None
    return RougeScorer(["rougeL"])


@cache
def _sacrebleu_bleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ResourceError("metric bleu needs the sacrebleu package", EXTRA) from None
    return BLEU(effective_order=True)


@cache
def _sacrebleu_ngrams() -> Any:
    try:
        from sacrebleu.metrics.helpers import extract_all_char_ngrams
    except ImportError:
        raise ResourceError("metric chrf needs the sacrebleu package", EXTRA) from None
    return extract_all_char_ngrams
