"""Evaluation: answer normalisation, VQA metrics, reports."""

from stllava.evaluate.normalize import normalize_word
from stllava.evaluate.report import VqaItem, VqaReport, print_report, report_table
from stllava.evaluate.statistics import is_attainable, mcnemar_exact, paired_bootstrap, paired_test
from stllava.evaluate.vqa import evaluate_vqa

__all__ = [
    "VqaItem",
    "VqaReport",
    "evaluate_vqa",
    "is_attainable",
    "mcnemar_exact",
    "normalize_word",
    "paired_bootstrap",
    "paired_test",
    "print_report",
    "report_table",
]
