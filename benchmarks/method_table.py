"""The table of `methods.py`, as Markdown, from the lines in its file of results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "methods.jsonl"
UNTRAINED, FULL = "before training", "full fine-tuning"
HEADINGS = (
    *("method", "test accuracy, %", "seeds", "against full", "rate", "trained", "step, ms"),
    *("peak, MiB", "saved, MB", "forgotten"),
)

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def markdown(lines: Sequence[Line]) -> str:
    """The tables, one for each task that has results; rows in the order of the runs."""
    parts = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        table = [list(HEADINGS), ["---"] * len(HEADINGS), *rows(own)]
        text = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
        parts.append(f"### {task}\n\n{text}")
    return "\n".join(parts)


def rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    """The cells of the table of a task, a row for each method that has test runs."""
    (before,) = [x["found_again"] for x in lines if x["method"] == UNTRAINED]
    methods = dict.fromkeys(x["method"] for x in lines if x.get("part") == "test")
    full = {x["seed"]: x["score"] for x in best_runs(lines, FULL)}
    for method in methods:
        runs = best_runs(lines, method)
        scores = [100 * x["score"] for x in runs]
        apart = [100 * (x["score"] - full[x["seed"]]) for x in runs if x["seed"] in full]
        lost = 100 * (before - statistics.mean(x["found_again"] for x in runs))
        middle = {k: statistics.median(x[k] for x in runs) for k in ("trained", "step_ms", "bytes")}
        yield [
            method,
            spread(scores, "{:.2f}"),
            f"{len(runs)}",
            spread(apart, "{:+.2f}") if apart and method != FULL else "",
            rate(lines, runs),
            f"{round(middle['trained']):,}",
            f"{middle['step_ms']:,.0f}",
            f"{min(x['peak_mib'] for x in runs):,.0f}",
            f"{middle['bytes'] / 1e6:,.2f}",
            f"{lost:+.1f}",
        ]


def spread(values: Sequence[float], form: str) -> str:
    """The mean and, of several values, their standard deviation."""
    more = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + more


def best_runs(lines: Sequence[Line], method: str) -> list[Line]:
    """The test runs of a method at the rate that was best on validation rows; else at the last."""
    runs = [x for x in lines if (x["method"], x.get("part")) == (method, "test")]
    tried = validated(lines, runs)
    chosen = max(tried, key=lambda x: x["score"]) if tried else None
    return [x for x in runs if x["rate"] == (chosen or runs[-1])["rate"]]


def validated(lines: Sequence[Line], runs: Sequence[Line]) -> list[Line]:
    names = {x.get("trained_as", x["method"]) for x in runs}
    return [x for x in lines if x.get("part") == "validation" and x["method"] in names]


def rate(lines: Sequence[Line], runs: Sequence[Line]) -> str:
    """The rate, and how many were tried on validation rows."""
    tried = len(validated(lines, runs))
    return f"{runs[0]['rate']:g}" + (f" of {tried}" if tried else "")
