"""Recomputes the `metrics` case from `inputs.json` alone (and `normalise.json` from its first column)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stllava.evaluate import VqaItem, VqaReport, evaluate_vqa, normalize_word

_SCRIPTS = {"run_eval": "run_eval", "run_eval_batch": "batch", "run_eval_pvqa": "pvqa"}


def replay_metrics(case_dir: Path | str) -> dict[str, Any]:
    """{"items", "corpus_percent", "n_open", "n_closed"} as in expected.json, and "normalise": rows of three columns."""
    case_dir = Path(case_dir)
    inputs = json.loads((case_dir / "inputs.json").read_text(encoding="utf-8"))
    references, predictions, candidates = (inputs[key] for key in ("ground_truth", "predictions", "candidates"))
    reports: dict[str, VqaReport] = {
        script: evaluate_vqa(references, predictions, "compat", variant, candidates=candidates)
        for script, variant in _SCRIPTS.items()
    }
    batch = reports["run_eval_batch"]
    rows = json.loads((case_dir / "normalise.json").read_text(encoding="utf-8"))["rows"]
    return {
        "items": [_item(item) for item in batch.items],
        "corpus_percent": {script: report.percent for script, report in reports.items()},
        "n_open": batch.n_open,
        "n_closed": batch.n_closed,
        "normalise": [[row[0], normalize_word(row[0]), normalize_word(normalize_word(row[0]))] for row in rows],
    }


def _item(item: VqaItem) -> dict[str, Any]:
    values = {name: "left out" if value is None else value for name, value in item.values.items()}
    return {
        "id": item.id,
        "answer_type": "OPEN" if item.is_open else "CLOSED",
        "gt": item.reference,
        "pred": item.prediction,
        "gt_normalised": item.reference_normalised,
        "pred_normalised": item.prediction_normalised,
        **values,
    }
