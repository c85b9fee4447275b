"""The command `keras-lora`.

A package of its own, since `keras_lora` imports Keras and its backend, which take seconds: help,
completion and typing errors are shown at once, and each command imports what it needs when it runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from keras_lora_cli.quiet import lower_log_level


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `keras-lora`; by default the words of this process.

    Returns:
        The exit code: 0 if all is well, 1 for a negative answer, 2 for an error.
    """
    lower_log_level()
    try:
        importlib.import_module("typer")
    except ImportError as error:
        advice = 'pip install "keras-lora[cli]"'
        print(f"keras-lora: error: typer is needed: {advice} ({error})", file=sys.stderr)
        return 2
    from keras_lora_cli import adapter_commands, app, model_commands  # noqa: F401

    return app.run(sys.argv[1:] if arguments is None else list(arguments))
