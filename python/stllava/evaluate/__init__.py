"""Evaluation of answers to VQA test sets.

    normalize, metrics, bleu   texts -> values of an item          vqa, report     joined by id -> VqaReport
    definitions, scoring       every metric, intervals, tests      statistics      bootstrap, McNemar, attainable shares
    evaluation                 all that is said, as one object     breakdown, refusals, published, baselines    parts of it
    answers, pictures, runs    a model answers, into files         predictions     anybody's answers            render/    for readers
"""

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
