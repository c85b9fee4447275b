"""Interleaved timing: on a shared machine only the ratios of medians mean anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Seconds(NamedTuple):
    """The wall time of a step, and its CPU time, summed over all processors.

    Work of other processes may double the wall time and hardly changes the CPU time. But the CPU
    time does not show how well a step uses several processors.
    """

    wall: float
    cpu: float


Step = Callable[[], Seconds | None]
Times = dict[str, list[Seconds]]
Bars = dict[str, tuple[float, float, float]]


def interleaved(steps: Mapping[str, Step], rounds: int, warmups: int = 2) -> Times:
    """The times of every step: `A B C A B C ...`, so that other work slows all alike.

    Every second round runs backwards, so that no step always follows the same other one. If a
    step returns its time, that time is taken.
    """
    times: Times = {name: [] for name in steps}
    for index in range(-warmups, rounds):
        for name in list(steps)[:: 1 if index % 2 == 0 else -1]:
            seconds = _timed(steps[name])
            if index >= 0:
                times[name].append(seconds)
    return times


def ratio(times: Times, name: str, other: str) -> float:
    """Ratio of medians of wall time."""
    return _median(times[name]).wall / _median(times[other]).wall


def print_times(title: str, times: Times, subject: str) -> None:
    """Print medians and spreads, and the ratio of the subject's median to each of the others."""
    table = Table("", "wall s", "min", "max", "CPU s", title=title)
    table.add_column(f"{subject} / it, wall")
    table.add_column("CPU")
    own = _median(times[subject])
    for name, seconds in times.items():
        middle, walls = _median(seconds), [s.wall for s in seconds]
        quotients = (own.wall / middle.wall, own.cpu / middle.cpu)
        cells = [f"{s:.3f}" for s in (middle.wall, min(walls), max(walls), middle.cpu)]
        table.add_row(name, *cells, *("" if name == subject else f"{q:.3f}" for q in quotients))
    Console().print(table)


def print_bars(bars: Bars) -> bool:
    """Print each bar `{what: (value, lowest, highest)}`; returns whether all are met."""
    met = {what: low <= value <= high for what, (value, low, high) in bars.items()}
    table = Table("bar", "value", "from", "to", "")
    for what, (value, low, high) in bars.items():
        table.add_row(
            what, f"{value:.3f}", f"{low:g}", f"{high:g}", "met" if met[what] else "MISSED"
        )
    Console().print(table)
    return all(met.values())


def _median(seconds: list[Seconds]) -> Seconds:
    return Seconds(median(s.wall for s in seconds), median(s.cpu for s in seconds))


def _timed(step: Step) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    own = step()
    return own or Seconds(time.perf_counter() - wall, time.process_time() - cpu)
