"""Evaluation: answer normalisation, VQA metrics, reports."""

from stllava.evaluate.normalize import normalize_word
from stllava.evaluate.report import VqaItem, VqaReport, is_attainable, paired_bootstrap, print_report, report_table
from stllava.evaluate.vqa import evaluate_vqa

__all__ = [
    "VqaItem",
    "VqaReport",
    "evaluate_vqa",
    "is_attainable",
    "normalize_word",
    "paired_bootstrap",
    "print_report",
    "report_table",
]
