"""Per-item metrics for medical visual question answering, in two sets.

`compat`: what the scripts of LLaVA-Med 1.0 compute, so that numbers compare with published ones. Names are theirs:
"exact match" is a word precision, "recall" counts the candidate's repetitions, and closed answers are looked up as
character substrings ("no" is in "abnormal").
`strict`: the same questions answered word by word.

Texts that come in are once-normalised answers (`stllava.evaluate.normalize`).
Source: `llava/eval/eval_metrics/evaluate_metrics.py` and `llava/eval/run_eval*.py`, microsoft/LLaVA-Med v1.0.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stllava.evaluate.bleu import sentence_bleu
from stllava.evaluate.normalize import normalize_word

YES_NO = ("yes", "no")

Values = dict[str, float | None]
"""Metric name -> value; None: the script leaves this item out of the mean."""


# ---- compat


def _word_counts(text: str) -> Counter[str]:
    return Counter(normalize_word(text).lower().split())  # the scripts normalise a second time here


def exact_match(candidate: str, reference: str) -> float:
    """Distinct reference words found in the candidate, divided by the number of candidate words; 0 if that is 0."""
    candidate_counts, reference_counts = _word_counts(candidate), _word_counts(reference)
    n_found = sum(word in candidate_counts for word in reference_counts)
    return n_found / candidate_counts.total() if candidate_counts else 0.0


def f1_precision_recall(candidate: str, reference: str) -> tuple[float, float, float]:
    """(F1, precision, recall) with true positives counted on the candidate's side; all 0 without a common word."""
    candidate_counts, reference_counts = _word_counts(candidate), _word_counts(reference)
    tp = sum(count for word, count in candidate_counts.items() if word in reference_counts)
    fn = sum(count for word, count in reference_counts.items() if word not in candidate_counts)
    if tp == 0:
        return 0.0, 0.0, 0.0
    precision, recall = tp / candidate_counts.total(), tp / (tp + fn)
    return 2 * precision * recall / (precision + recall), precision, recall


def open_hit_candidates(prediction: str, reference: str, candidates: Sequence[str]) -> float:
    """1 iff the candidate answer that shares the largest part of its words with the prediction is the reference.

    candidates: normalised answers, not empty; the first of equals wins.
    """
    words = set(_word_counts(prediction))

    def overlap(candidate: str) -> float:
        types = set(candidate.split())
        return len(types & words) / len(types) if types else 0.0

    return float(max(candidates, key=overlap) == normalize_word(reference))


def closed_hits(prediction: str, reference: str) -> dict[str, float | None]:
    """The three closed hits in use; keys are the variants "run_eval", "batch" and "pvqa".

    "batch" made the published numbers. "pvqa" leaves out an item that says yes or no but not the reference.
    """
    says_yes_or_no = any(word in prediction for word in YES_NO)
    found = float(reference in prediction)
    run_eval = found if says_yes_or_no else 0.0
    return {"run_eval": run_eval, "batch": found, "pvqa": None if says_yes_or_no and not found else run_eval}


def compat_values(is_open: bool, prediction: str, reference: str, candidates: Sequence[str] | None) -> Values:
    """All compat metrics of one item; "open_hit_run_eval" only with candidate answers."""
    f1, precision, recall = f1_precision_recall(prediction, reference)
    values: Values = {
        "exact_match": exact_match(prediction, reference),
        "f1": f1,
        "precision": precision,
        "recall": recall,
    }
    if not is_open:
        hits = closed_hits(prediction, reference)
        return values | {
            "closed_hit_run_eval": hits["run_eval"],
            "closed_hit_batch": hits["batch"],
            "closed_pvqa": hits["pvqa"],
        }
    if candidates is not None:
        values["open_hit_run_eval"] = open_hit_candidates(prediction, reference, candidates)
    values["open_hit_batch"] = float(reference in prediction)
    hypothesis, answer = prediction.lower().split(), reference.lower().split()
    values["bleu"] = sentence_bleu(hypothesis, answer)
    for order in range(3):
        weights = [float(i == order) for i in range(4)]
        values[f"bleu_{order + 1}"] = sentence_bleu(hypothesis, answer, weights)
    return values


# ---- strict


def _contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted` stands in `words` as neighbours; nothing contains the empty answer but itself."""
    if not wanted:
        return not words
    return any(list(words[i : i + len(wanted)]) == list(wanted) for i in range(len(words) - len(wanted) + 1))


def strict_values(is_open: bool, prediction: str, reference: str) -> Values:
    """Multiset overlap (tp = sum of the smaller counts), whole-word hits, and for yes/no references the first of the
    words yes and no in the prediction decides."""
    words, wanted = prediction.split(), reference.split()
    tp = (Counter(words) & Counter(wanted)).total()
    same = float(words == wanted)
    precision = tp / len(words) if words else same
    recall = tp / len(wanted) if wanted else same
    if not is_open and reference in YES_NO:
        hit = next((word for word in words if word in YES_NO), None) == reference
    else:
        hit = _contains(words, wanted)
    return {
        "exact_match": same,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "precision": precision,
        "recall": recall,
        "hit": float(hit),
    }
