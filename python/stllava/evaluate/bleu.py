"""Sentence BLEU with one reference and no smoothing, equal to `sentence_bleu` of nltk 3.8 bit for bit."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def sentence_bleu(
    hypothesis: Sequence[str], reference: Sequence[str], weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25)
) -> float:
    """BLEU of two token lists, in [0, 1]; weights[i] belongs to (i + 1)-grams.

    0 without a common token. A precision of zero at a higher order counts as the smallest normal double, as nltk 3.8
    does, hence results such as 1e-231. Source: Papineni et al. 2002, sections 2.1-2.3.
    """
    log_precisions = []
    for i, weight in enumerate(weights):
        counts, limits = _ngrams(hypothesis, i + 1), _ngrams(reference, i + 1)
        matched = sum(min(count, limits[ngram]) for ngram, count in counts.items())
        if i == 0 and matched == 0:
            return 0.0
        precision = matched / max(1, counts.total()) or sys.float_info.min
        log_precisions.append(weight * math.log(precision))
    too_short = len(hypothesis) <= len(reference)
    brevity_penalty = math.exp(1 - len(reference) / len(hypothesis)) if too_short else 1.0
    return brevity_penalty * math.exp(math.fsum(log_precisions))
