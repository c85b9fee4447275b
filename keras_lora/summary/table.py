"""The tables of a model's adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.console import RenderableType
from rich.text import Text

from keras_lora.summary.paths import PathCell, joined, template
from keras_lora.tables import new_table

# With the headings and the lines below, a screen of 24 lines.
_ROWS = 12
_HEADINGS = 4  # lines above the rows of a table
_NAMES = 3
_LEFT = ("layer", "kind")
# What is the same in all rows of a table stands in its title.
_SHARED = ("rank", "scale")


@dataclass(frozen=True)
class SummaryRow:
    """One adapter of one layer. `parameters` counts `A`, `B` and DoRA's magnitude."""

    path: str
    kind: str
    adapter: str
    rank: int
    scaling: float
    active: bool
    parameters: int
    kernel_parameters: int


# Rows that are one line of a table.
Line: TypeAlias = tuple[SummaryRow, ...]


def adapter_tables(rows: Sequence[SummaryRow], whole: bool) -> Iterator[RenderableType]:
    """A table for each adapter; adapters of the same layers, ranks and scales share one.

    Unless they are to be whole, layers that repeat are one line, and the tables fit on a screen.
    """
    left, hidden = len(rows) if whole else _ROWS, 0
    for lines, names in _sections(rows, whole).items():
        shown, left = lines[: max(left, 0)], left - len(lines) - (0 if whole else _HEADINGS)
        hidden += len(lines) - len(shown)
        if shown:
            yield from _titled_table(shown, names)
    if hidden:
        yield Text(f"and {hidden} more rows: lora_summary(model, whole=True)", style="italic")


def _sections(rows: Sequence[SummaryRow], whole: bool) -> dict[tuple[Line, ...], list[str]]:
    """The names of the adapters that have the same lines, by these lines without a name."""
    sections: dict[tuple[Line, ...], list[str]] = {}
    for name in dict.fromkeys(row.adapter for row in rows):
        own = [dataclasses.replace(row, adapter="") for row in rows if row.adapter == name]
        lines = tuple((row,) for row in own) if whole else _repeated(own)
        sections.setdefault(lines, []).append(name)
    return sections


def _repeated(rows: Sequence[SummaryRow]) -> tuple[Line, ...]:
    """Rows that are the same but for the numbers in their paths are one line."""
    lines: dict[SummaryRow, list[SummaryRow]] = {}
    for row in rows:
        lines.setdefault(dataclasses.replace(row, path=template(row.path)), []).append(row)
    return tuple(map(tuple, lines.values()))


def _titled_table(lines: Sequence[Line], names: Sequence[str]) -> Iterator[RenderableType]:
    cells = list(map(_cells, lines))
    shared = {name: cells[0][name] for name in _SHARED if len({x[name] for x in cells}) == 1}
    if all(len(line) == 1 for line in lines):
        shared["layers"] = ""
    headings = [name for name in cells[0] if name not in shared]
    facts = [f"{name} {value}" for name, value in shared.items() if value]
    yield _title(names, lines[0][0].active, facts)
    table = new_table(pad_edge=False)
    for name in headings:
        justify: Any = "left" if name in _LEFT else "right"
        table.add_column(name, justify=justify, no_wrap=name != "layer")
    for line in cells:
        table.add_row(*(line[name] for name in headings))
    yield table


def _title(names: Sequence[str], active: bool, facts: Sequence[str]) -> Text:
    listed = ", ".join(names[:_NAMES])
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    title = f"{'Adapter' if len(names) == 1 else 'Adapters'} {listed}{more}"
    shown = title if active else f"{title} (inactive)"
    return Text(", ".join([shown, *facts]), style="bold")


def _cells(line: Line) -> Mapping[str, Any]:
    """The cells of a line by their headings."""
    row = line[0]
    return {
        "layer": PathCell(joined([row.path for row in line])),
        "layers": str(len(line)),
        "kind": row.kind,
        "rank": str(row.rank),
        "scale": f"{row.scaling:g}",
        "parameters": f"{len(line) * row.parameters:,}",
        "of kernel": f"{row.parameters / row.kernel_parameters:.2%}",
    }
