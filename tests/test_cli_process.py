"""The command line as a process: its help, what it imports, and its streams."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer.main
from support import processes
from support.command_line import REVIEWS, Run

import keras_lora as kl
from keras_lora_cli.app import EXAMPLES, app

pytest_plugins = ["support.command_line"]


# --- Help, and the command as it is installed -------------------------------------------------


def test_every_command_has_help_with_its_examples(run: Run) -> None:
    group: Any = typer.main.get_command(app)
    assert set(EXAMPLES) == set(group.commands)
    for name, examples in EXAMPLES.items():
        shown = " ".join(run(name, "--help").out.split())
        assert examples
        for example in examples:
            assert " ".join(example.split()) in shown
            program, command, *arguments = shlex.split(example)
            assert (program, command) == ("keras-lora", name)
            group.commands[name].make_context(name, arguments)  # raises if the example is wrong
        assert not run(name, "--help").err


def test_help_lists_the_exit_codes(run: Run) -> None:
    assert "Exit codes: 0 all is well" in " ".join(run("--help").out.split())
    assert run().code == 2
    assert run("--version").out == f"{kl.__version__}\n"


HEAVY = ("tensorflow", "keras", "keras_lora", "keras_hub", "numpy", "torch")
CALL = "import sys, keras_lora_cli; sys.exit(keras_lora_cli.main(sys.argv[1:]))"


def test_help_and_the_errors_of_typing_do_not_import_tensorflow() -> None:
    assert "Usage: keras-lora" in processes.run(CALL, "--help", block=HEAVY)
    assert "Examples:" in processes.run(CALL, "merge", "--help", block=HEAVY)
    failing = CALL.replace("sys.exit(", "assert 2 == (")
    assert "No such option" in processes.run(failing, "merge", "--nope", block=HEAVY)


def test_without_typer_the_command_says_what_to_install() -> None:
    failing = CALL.replace("sys.exit(", "assert 2 == (")
    output = processes.run(failing, "--help", block=("typer",))
    assert output.startswith('keras-lora: error: typer is needed: pip install "keras-lora[cli]"')
    assert output.count("\n") == 1


def command(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(processes.ROOT)}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [sys.executable, "-c", CALL, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        check=False,
        **settings,
    )


def read_all(terminal: int) -> str:
    """What is written to a terminal until its other end is closed."""
    parts = []
    with contextlib.suppress(OSError):  # Linux reports the closed end as an error
        while part := os.read(terminal, 2**16):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


@pytest.mark.slow
def test_a_process_answers_in_json_alone_beside_a_bar(files: Path) -> None:
    """Standard error is a terminal, and standard output a pipe."""
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, ours)
        done = command(files, "diff", REVIEWS, "adapters/style", "--json", stderr=theirs)
        os.close(theirs)
        bar = reading.result()
    assert done.returncode == 1
    assert json.loads(done.stdout)["formats"] == ["native", "native"]
    assert "starting Keras" in bar
    assert "oneDNN" not in bar


@pytest.mark.slow
def test_a_process_fails_with_one_line(files: Path) -> None:
    done = command(files, "check", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("keras-lora: error: Invalid 'nowhere'")


def test_the_package_is_the_command_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["keras_lora", "--version"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("keras_lora", run_name="__main__")
    assert (done.value.code, capsys.readouterr().out) == (0, f"{kl.__version__}\n")
