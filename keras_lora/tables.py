"""The look of the tables that are printed."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def new_table(**options: Any) -> Table:
    """An empty table; the options are those of `rich.table.Table`."""
    return Table(header_style="cyan", box=box.SIMPLE_HEAD, **options)
