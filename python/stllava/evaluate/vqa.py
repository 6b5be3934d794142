"""Evaluation of a VQA test set: join answers to questions by id, score every item, average."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from stllava.errors import FormatError
from stllava.evaluate.metrics import Values, compat_values, strict_values
from stllava.evaluate.normalize import DOT_LIMIT, normalize_word
from stllava.evaluate.report import VqaItem, VqaReport

MetricSet = Literal["compat", "strict"]
ClosedVariant = Literal["batch", "run_eval", "pvqa"]

# PathVQA's own files use the types on the right.
_OPEN_TYPES, _CLOSED_TYPES = ("open", "other", "number"), ("closed", "yes/no")

_OPEN_ROWS = {"exact match score": "exact_match", "f1 score": "f1", "precision": "precision", "recall": "recall"}
_BLEU_ROWS = {"bleu_score": "bleu", "bleu_score_1": "bleu_1", "bleu_score_2": "bleu_2", "bleu_score_3": "bleu_3"}
# Row of the script's table -> (open items?, metric). One table per script, in the script's order.
_COMPAT_TABLES: dict[str, dict[str, tuple[bool, str]]] = {
    "run_eval": {
        **{row: (True, metric) for row, metric in (_OPEN_ROWS | _BLEU_ROWS).items()},
        "open accuracy": (True, "open_hit_run_eval"),
        "yes/no accuracy": (False, "closed_hit_run_eval"),
    },
    "batch": {
        **{row: (True, metric) for row, metric in (_OPEN_ROWS | _BLEU_ROWS).items()},
        "open accuracy": (True, "open_hit_batch"),
        "yes/no accuracy": (False, "closed_hit_batch"),
        "recall_closed": (False, "recall"),
    },
    "pvqa": {
        **{row: (True, metric) for row, metric in _OPEN_ROWS.items()},
        "open accuracy": (True, "open_hit_run_eval"),
        "yes/no accuracy": (False, "closed_pvqa"),
    },
}
_STRICT_TABLE: dict[str, tuple[bool, str]] = {
    "exact match": (True, "exact_match"),
    "f1": (True, "f1"),
    "precision": (True, "precision"),
    "recall": (True, "recall"),
    "open accuracy": (True, "hit"),
    "closed accuracy": (False, "hit"),
    "closed recall": (False, "recall"),
}


def evaluate_vqa(
    references: Sequence[Mapping[str, Any]],
    predictions: Iterable[Mapping[str, Any]],
    metric_set: MetricSet = "compat",
    closed: ClosedVariant = "batch",
    *,
    candidates: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
    unmatched: Literal["error", "wrong"] = "error",
) -> VqaReport:
    """Score `predictions` against `references`.

    Args:
        references: LLaVA-Med items {"id", "answer_type", "conversations": [question, answer]} (the key `conversatons`
            of older files too), or {"id" | "question_id", "answer_type", "answer"}. Answers may be numbers. Answer types
            are trimmed and case-folded; items of an unknown type are skipped and counted.
        predictions: {"question_id" | "id", "text"}.
        metric_set: "compat" or "strict", see `stllava.evaluate.metrics`.
        closed: which script's table a compat report shows: "batch" (published numbers), "run_eval" or "pvqa".
        candidates: answers for the open accuracy of "run_eval" and "pvqa", a list or {"0": list}; without them that row
            is absent.
        unmatched: "wrong" gives an item without exactly one prediction the value 0 everywhere; a prediction for an
            unknown id is then only counted.

    Raises:
        FormatError: damaged items; with unmatched="error" also missing, duplicate or surplus ids.
    """
    if metric_set not in ("compat", "strict") or closed not in _COMPAT_TABLES:
        variants = sorted(_COMPAT_TABLES)
        raise ValueError(f"metric_set={metric_set!r}, closed={closed!r}; want compat or strict, and one of {variants}")
    if unmatched not in ("error", "wrong"):
        raise ValueError(f"unmatched={unmatched!r}, want 'error' or 'wrong'")
    ids = [_id(item, "reference", row) for row, item in enumerate(references)]
    # Files mix 12 and "12" for the same question, so ids are compared as text.
    answers, n_surplus = _join([str(i) for i in ids], predictions, unmatched)
    normalised_candidates = _candidates(candidates)
    items, n_skipped = [], 0
    for item_id, item, prediction in zip(ids, references, answers, strict=True):
        is_open_item = is_open(item)
        if is_open_item is None:
            n_skipped += 1
            continue
        reference = answer_of(item_id, item)
        items.append(_score(item_id, is_open_item, reference, prediction, metric_set, normalised_candidates))
    table = _STRICT_TABLE if metric_set == "strict" else _COMPAT_TABLES[closed]
    return VqaReport(
        metric_set=metric_set,
        closed=closed if metric_set == "compat" else None,
        n_open=sum(item.is_open for item in items),
        n_closed=sum(not item.is_open for item in items),
        n_skipped=n_skipped,
        n_unanswered=sum(item.prediction is None for item in items),
        n_surplus=n_surplus,
        items=tuple(items),
        values=_corpus(items, table),
    )


def _id(item: Mapping[str, Any], what: str, row: int) -> Any:
    for key in ("id", "question_id") if what == "reference" else ("question_id", "id"):
        if key in item:
            return item[key]
    raise FormatError(f"{what} {row}: no 'id' or 'question_id', found keys {sorted(item)}", field="id")


def _join(ids: list[str], predictions: Iterable[Mapping[str, Any]], unmatched: str) -> tuple[list[str | None], int]:
    duplicates = [i for i, count in Counter(ids).items() if count > 1]
    if duplicates:
        raise FormatError(f"references: {len(duplicates)} ids occur more than once, first {duplicates[0]!r}", field="id")
    texts: dict[str, list[str]] = {}
    for row, item in enumerate(predictions):
        prediction_id = str(_id(item, "prediction", row))
        if "text" not in item:
            found = sorted(item)
            raise FormatError(f"prediction {row} (id {prediction_id}): no 'text', found keys {found}", field="text")
        texts.setdefault(prediction_id, []).append(str(item["text"]))
    surplus = texts.keys() - set(ids)
    if unmatched == "error":
        problems = {
            "missing": [i for i in ids if i not in texts],
            "duplicate": [i for i in texts if len(texts[i]) > 1],
            "surplus": sorted(surplus),
        }
        found = [f"{len(some)} {what} (first {some[0]!r})" for what, some in problems.items() if some]
        if found:
            raise FormatError(
                f"predictions do not match the {len(ids)} references: {', '.join(found)} ids; "
                "unmatched='wrong' (--unmatched wrong) counts such items as wrong",
                field="question_id",
            )
    return [texts[i][0] if len(texts.get(i, ())) == 1 else None for i in ids], len(surplus)


def is_open(item: Mapping[str, Any]) -> bool | None:
    """Whether an item's answer type is open or closed; None: neither, and evaluations skip it."""
    answer_type = str(item.get("answer_type", "")).strip().casefold()
    if answer_type in _OPEN_TYPES:
        return True
    return False if answer_type in _CLOSED_TYPES else None


def answer_of(item_id: Any, item: Mapping[str, Any]) -> str:
    """The reference answer of an item, which `item_id` names in errors. Raises FormatError."""
    turns = item.get("conversations", item.get("conversatons"))
    if turns is not None and len(turns) > 1 and "value" in turns[1]:
        return str(turns[1]["value"])
    if turns is None and "answer" in item:
        return str(item["answer"])
    raise FormatError(
        f"reference {item_id!r}: no answer, want a second turn in 'conversations', or 'answer'", field="conversations"
    )


def _candidates(candidates: Sequence[Any] | Mapping[str, Sequence[Any]] | None) -> list[str] | None:
    if candidates is None:
        return None
    answers = candidates.get("0") if isinstance(candidates, Mapping) else candidates
    if not answers:
        raise FormatError("candidates: want a list of answers, or an object with one under key '0'", field="0")
    return [normalize_word(str(answer)) for answer in answers]


def _score(
    item_id: Any,
    is_open: bool,
    reference: str,
    prediction: str | None,
    metric_set: str,
    candidates: Sequence[str] | None,
) -> VqaItem:
    dot_limit = 0 if metric_set == "strict" else DOT_LIMIT
    reference_text = normalize_word(reference.lower(), dot_limit)
    text = normalize_word((prediction or "").lower(), dot_limit)
    values: Values
    if metric_set == "strict":
        values = strict_values(is_open, text, reference_text)
    else:
        values = compat_values(is_open, text, reference_text, candidates)
    if prediction is None:
        values = dict.fromkeys(values, 0.0)
    return VqaItem(item_id, is_open, reference, prediction, reference_text, text, values)


def _corpus(items: Sequence[VqaItem], table: Mapping[str, tuple[bool, str]]) -> dict[str, float | None]:
    """Row -> mean over its items as a fraction, None without items; rows whose metric was not computed are absent."""
    result: dict[str, float | None] = {}
    for row, (is_open, metric) in table.items():
        of_kind = [item.values for item in items if item.is_open == is_open]
        values = [value[metric] for value in of_kind if metric in value]
        if values or not of_kind:
            result[row] = _mean([value for value in values if value is not None])
    return result


def _mean(values: Sequence[float]) -> float | None:
    # Left to right as the scripts ran it: sum() of Python 3.12 and later compensates rounding, the last bit differs.
    return functools.reduce(operator.add, values, 0.0) / len(values) if values else None
