"""The frame of all commands: how they are declared and run, and how errors are shown."""

from __future__ import annotations

import functools
import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_lora_cli.output import Answer, complain, speaking

TRACEBACK = "KERAS_LORA_TRACEBACK"

app = typer.Typer(
    name="keras-lora",
    help="LoRA adapters of Keras models: inspect, merge, convert, compare and export them.\n\n"
    "Exit codes: 0 all is well, 1 the answer is no (diff: they differ; check: a server cannot run "
    f"it), 2 an error. With {TRACEBACK}=1 an error has its traceback.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
EXAMPLES: dict[str, Sequence[str]] = {}


def command(*examples: str) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Make a function a command; its docstring and the examples are the help."""

    def decorate(function: Callable[..., Answer]) -> Callable[..., None]:
        name = function.__name__.replace("_", "-")
        EXAMPLES[name] = examples

        @functools.wraps(function)
        def run_it(**values: Any) -> None:
            _show(functools.partial(function, **values), values["as_json"])

        listed = "\n".join(f"  $ {example}" for example in examples)
        text = f"{function.__doc__}\n\n\b\nExamples:\n{listed}".replace("[", r"\[")
        app.command(name, help=text)(run_it)
        return run_it

    return decorate


def _show(function: Callable[[], Answer], as_json: bool) -> None:
    try:
        with speaking():
            answer = function()
        answer.show(as_json)
    except BrokenPipeError:  # from `| head`, for example; typer ends quietly
        raise
    except Exception as error:  # Keras and its backend may raise any class
        if os.environ.get(TRACEBACK):
            raise
        known = isinstance(error, ValueError | OSError | ImportError)
        complain("error", error if known else f"{type(error).__name__}: {error}")
        raise typer.Exit(2) from error
    if answer.negative:
        raise typer.Exit(1)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    try:
        return app(list(arguments), prog_name="keras-lora", standalone_mode=False) or 0
    except typer.TyperException as error:
        if error.format_message():  # empty if the help was shown
            complain("error", error.format_message())
        return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        # The library need not be installed, and its import takes seconds.
        file = Path(__file__).parent.parent / "keras_lora" / "version.py"
        print(runpy.run_path(str(file))["__version__"])
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """The command without a subcommand: its options alone."""
