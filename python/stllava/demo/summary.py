"""The demo's numbers as one object: results.json, its digest, the bars it has to meet, and the table in the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .questions import CLOSED, OPEN, STRUCTURES

__all__ = ["Bar", "bars", "print_summary", "table_sha256"]

COLUMNS = (("evaluation", "base", "base"), ("evaluation", "sft", "after SFT"), ("evaluation", "dpo", "after DPO"),
           ("baselines", "majority", "majority"), ("baselines", "no_image", "no image"), ("baselines", "shuffled_image", "shuffled image"))
TABLE_KEYS = ("seed", "evaluation", "baselines", "self_training", "dpo")


@dataclass(frozen=True, slots=True)
class Bar:
    """One demand of the demo and what this run gave. `wanted` is a text such as ">= 0.93"."""

    name: str
    value: float
    wanted: str
    met: bool


def table_sha256(results: Mapping[str, Any]) -> str:
    """Digest of every number that is a result, in canonical JSON: no times, no thread counts."""
    text = json.dumps({key: results[key] for key in TABLE_KEYS}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def bars(results: Mapping[str, Any], margin_growth: float) -> list[Bar]:
    """Every bar but run time. margin_growth: mean reward margin of the last quarter of the DPO updates minus that of the first."""
    base, sft = results["evaluation"]["base"], results["evaluation"]["sft"]
    asked, dpo = results["self_training"], results["dpo"]
    image_free = max(results["baselines"][name]["closed_accuracy"] for name in ("majority", "no_image"))
    closed_counts = [row["n"] for kind, row in sft["by_type"].items() if kind in CLOSED]

    def least(name: str, value: float, low: float) -> Bar:
        return Bar(name, value, f">= {low:g}", value >= low)

    return [
        least("question types in the test", len(sft["by_type"]), 9), least("closed test items", sft["n_closed"], 900),
        least("smallest closed type, share of closed items", min(closed_counts) / sft["n_closed"], 0.08),
        least("base: open recall", base["open_recall"], 0.93),
        Bar("base: cerebellum + ventricles", structures(base), "< 0.35", structures(base) < 0.35),
        least("after SFT: open recall", sft["open_recall"], 0.91), least("after SFT: closed accuracy", sft["closed_accuracy"], 0.83),
        least("after SFT: closed above image-free baselines", sft["closed_accuracy"] - image_free, 0.25),
        least("after SFT: cerebellum + ventricles", structures(sft), 0.63),
        least("self-questions well-formed", asked["well_formed_share"], 0.95),
        least("self-questions judgeable", asked["judgeable_share"], 0.90), least("pairs after balancing", asked["pairs"], 300),
        least("DPO: reward accuracy in training", dpo["reward_accuracy"], 0.68),
        least("DPO: reward accuracy on held-out pairs", dpo["heldout_reward_accuracy"], 0.60),
        Bar("DPO: growth of the reward margin", margin_growth, "> 0", margin_growth > 0),
        least("DPO - SFT: open recall", dpo["delta_open"]["mean"], -0.015),
        least("DPO - SFT: closed accuracy", dpo["delta_closed"]["mean"], -0.015)]


def structures(row: Mapping[str, Any]) -> float:
    """Accuracy over all items of the question types that the base model's training never asked."""
    types = [row["by_type"][kind] for kind in STRUCTURES if kind in row["by_type"]]
    n = sum(kind["n"] for kind in types)
    return sum(kind["value"] * kind["n"] for kind in types) / n if n else 0.0


def score_groups(results: Mapping[str, Any]) -> list[list[tuple[str, int, list[str]]]]:
    """The table of scores in three groups, over all items, closed types, open types: (label, items, per cent by column)."""
    columns = [results[group][name] for group, name, _ in COLUMNS]
    totals = [(label, columns[0][count], [f"{100 * column[key]:.1f}" for column in columns]) for label, key, count in (
        ("closed accuracy", "closed_accuracy", "n_closed"), ("open recall", "open_recall", "n_open"), ("open token F1", "token_f1", "n_open"))]
    types = columns[0]["by_type"]
    return [totals, *([(kind, types[kind]["n"], [f"{100 * column['by_type'][kind]['value']:.1f}" for column in columns])
                       for kind in kinds if kind in types] for kinds in (CLOSED, OPEN))]


def delta_text(delta: Mapping[str, float]) -> str:
    """A change in points with its interval."""
    mean, low, high = (100 * delta[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} points (95 % interval {low:+.2f} … {high:+.2f})"


def print_summary(results: Mapping[str, Any], console: Console) -> None:
    """Table, change by DPO, self-training counts, seconds, and the bars as a checklist."""
    table = Table(title="Greedy answers to held-out images, per cent (strict metrics)", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("")
    table.add_column("items", justify="right")
    for _, _, title in COLUMNS:
        table.add_column(title.replace(" ", "\n"), justify="right", vertical="bottom")
    for group in score_groups(results):
        for label, n, cells in group:
            table.add_row(label, str(n), *cells)
        table.add_section()
    console.print(table)
    asked, dpo = results["self_training"], results["dpo"]
    console.print(f"DPO - SFT: open recall     {delta_text(dpo['delta_open'])}\n           closed accuracy {delta_text(dpo['delta_closed'])}")
    dropped = ", ".join(f"{n} {reason}" for reason, n in asked["dropped"].items() if n)
    console.print(f"self-training: {asked['questions']} questions asked, {100 * asked['well_formed_share']:.1f} % well-formed, "
                  f"{100 * asked['judgeable_share']:.1f} % judgeable, {asked['pairs']} pairs; dropped: {dropped}")
    console.print(f"DPO: reward accuracy {dpo['reward_accuracy']:.3f} in training, {dpo['heldout_reward_accuracy']:.3f} on held-out pairs; "
                  f"margin {dpo['margin']:.3f}")
    console.print("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in results["seconds"].items())
                  + f"; {sum(results['seconds'].values()):.1f} in all on {results['threads']} threads")
    found = results["details"]["bars"]
    checklist = Table(box=None, show_header=False)
    for bar in found:
        checklist.add_row("[green]met" if bar["met"] else "[bold red]NOT MET", bar["name"], f"{bar['value']:.4g}", f"want {bar['wanted']}")
    console.print(checklist)
    missed = sum(not bar["met"] for bar in found)
    console.print(f"[bold red]{missed} of {len(found)} bars are not met" if missed else f"[green]all {len(found)} bars are met")
    if results["details"]["quick"]:
        console.print("This was a quick run on a tenth of the data; the bars are for the full one.")
