"""The output of a command: its answer on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Table
from rich.text import Text

from keras_lora_cli.quiet import silenced
from keras_lora_cli.wrapping import Wrapped

# The width of lines in a pipe or a file, which have no width: enough for long paths.
_WIDTH = 240


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
        data: Plain values, which `--json` prints.
        views: The same result as tables, for people.
        negative: Whether the answer to the command's question is no; the exit code is then 1.
    """

    data: dict[str, Any]
    views: Sequence[RenderableType] = field(default=())
    negative: bool = False

    def show(self, as_json: bool) -> None:
        if as_json:
            print(json.dumps(self.data, indent=2, allow_nan=False))
            return
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        for view in self.views:
            console.print(view)


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain text, with columns of numbers on the right."""
    made = Table(title=Text(title), title_justify="left", header_style="cyan")
    for i, heading in enumerate(headings):
        numbers = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        made.add_column(heading, justify="right" if numbers else "left")
    for row in rows:
        made.add_row(*(Wrapped(shown(value)) for value in row))
    return made


def facts(values: Mapping[str, object]) -> Table:
    """Names and values, one to a line; a value of None is left out."""
    made = Table.grid(padding=(0, 2))
    for name, value in values.items():
        if value is not None:
            made.add_row(Text(name, style="bold"), Wrapped(shown(value)))
    return made


def shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def shown_shape(shape: Sequence[int | None] | None) -> str:
    """`(any, 3)`, or `any` if even the number of axes is free."""
    if shape is None:
        return "any"
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


class Steps:
    """The steps of a long command, as a bar on a terminal."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)

    @contextlib.contextmanager
    def step(self, description: str) -> Iterator[None]:
        self._bar.update(self._task, description=description)
        yield
        self._bar.advance(self._task)

    @contextlib.contextmanager
    def starting(self, *, tensorflow_for: str | None = None) -> Iterator[None]:
        """The step in which Keras and its backend are imported.

        It is silent, since TensorFlow's C++ code writes about the processors that it finds.

        Args:
            tensorflow_for: The name of a command that needs TensorFlow on every backend.

        Raises:
            ImportError: the command needs TensorFlow, which cannot be imported.
        """
        with self.step("starting Keras"), silenced():
            if tensorflow_for is not None:
                from keras_lora.export.on_first_use import check_tensorflow

                check_tensorflow(f"keras-lora {tensorflow_for}")
            yield


@contextlib.contextmanager
def steps(total: int) -> Iterator[Steps]:
    """A bar of `total` steps on standard error, which disappears after the last step."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    terminal = sys.stderr.isatty()
    with _own_stderr() if terminal else contextlib.nullcontext() as stream:
        console = Console(file=stream, stderr=True)
        hidden = not terminal
        with Progress(*columns, Elapsed(), console=console, transient=True, disable=hidden) as bar:
            yield Steps(bar, total)


@contextlib.contextmanager
def _own_stderr() -> Iterator[TextIO]:
    """A second descriptor of standard error, which stays open while `silenced` redirects it."""
    with os.fdopen(os.dup(2), "w") as stream:
        yield stream


def complain(kind: str, message: object) -> None:
    """One line on standard error; its beginning has a colour on a terminal."""
    beginning = f"keras-lora: {kind}:", "bold red" if kind == "error" else "bold yellow"
    text = Text.assemble(beginning, " ", " ".join(str(message).split()))
    Console(stderr=True).print(text, soft_wrap=True)


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Within the context a warning is one line, and libraries print to standard error."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: complain("warning", message)
        yield
