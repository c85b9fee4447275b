"""Interleaved timing: on a shared machine only the ratios of medians mean anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

from rich.console import Console
from rich.table import Table

Step = Callable[[], float | None]
Times = dict[str, list[float]]
Bars = dict[str, tuple[float, float, float]]


def interleaved(steps: Mapping[str, Step], rounds: int, warmups: int = 2) -> Times:
    """Seconds of every step: `A B C A B C ...`, so that load from elsewhere falls on all alike.

    Every second round runs backwards, so that no step always follows the same other one. A step
    that returns a number has timed itself.
    """
    times: Times = {name: [] for name in steps}
    for index in range(-warmups, rounds):
        order = list(steps)[:: 1 if index % 2 == 0 else -1]
        for name in order:
            seconds = _timed(steps[name])
            if index >= 0:
                times[name].append(seconds)
    return times


def ratio(times: Times, name: str, other: str) -> float:
    """Ratio of medians."""
    return median(times[name]) / median(times[other])


def print_times(title: str, times: Times, subject: str) -> None:
    """A table of medians and spreads, and of the subject's median over each of the others."""
    table = Table("", "median s", "min s", "max s", f"{subject} / it", title=title)
    for name, seconds in times.items():
        spread = (median(seconds), min(seconds), max(seconds))
        quotient = "" if name == subject else f"{ratio(times, subject, name):.3f}"
        table.add_row(name, *(f"{s:.3f}" for s in spread), quotient)
    Console().print(table)


def print_bars(bars: Bars) -> bool:
    """Print each bar `{what: (value, lowest, highest)}`; whether all are met."""
    met = {what: low <= value <= high for what, (value, low, high) in bars.items()}
    table = Table("bar", "value", "from", "to", "")
    for what, (value, low, high) in bars.items():
        table.add_row(
            what, f"{value:.3f}", f"{low:g}", f"{high:g}", "met" if met[what] else "MISSED"
        )
    Console().print(table)
    return all(met.values())


def _timed(step: Step) -> float:
    start = time.perf_counter()
    own = step()
    return time.perf_counter() - start if own is None else own
