"""What the command line prints on a terminal: paths in narrow columns, and colour."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support import processes
from support.command_line import REVIEWS, Run

from keras_lora_cli.output import facts, table

pytest_plugins = ["support.command_line"]

PATHS = [
    "base_model.model.encoder.layer.11.attention.self.query",
    "llama3_backbone/transformer_layer_29/self_attention/attention_output",
    "/home/somebody/adapters of mine/reviews",
]


def lines(view: object, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(view)
    return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_a_path_breaks_between_its_words(path: str, width: int) -> None:
    printed = lines(facts({"path": path}), width)
    assert all(len(line) <= width for line in printed)
    ends = [line.removeprefix("path").strip() for line in printed]
    assert "".join(ends).replace(" ", "") == path.replace(" ", "")
    assert all(end.endswith(("/", ".")) or f"{end} " in path for end in ends[:-1])


def test_a_word_that_is_wider_than_its_column_is_folded() -> None:
    printed = lines(facts({"a": "b" * 20 + "/c"}), 13)
    assert [line[3:] for line in printed] == ["b" * 10, "b" * 10, "/", "c"]


def test_a_table_shortens_the_columns_of_paths() -> None:
    printed = lines(table("Layers", ["layer", "rank"], [[path, 8] for path in PATHS]), 40)
    cells = [line.split("│")[1].strip() for line in printed if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == "".join(PATHS).replace(" ", "")
    assert "attention_output" in cells


def test_a_terminal_has_colour(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for forced in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", forced)
        refused, found = run("check", "nowhere"), run("inspect", REVIEWS)
        assert refused.err.startswith("\x1b[1;31mkeras-lora: error:" if forced else "keras-lora:")
        assert ("\x1b[36m" in found.out) is bool(forced)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in run("inspect", REVIEWS).out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-m", "keras_lora", "check", "nowhere"], 2),
        (["examples/text_classification.py", "--help"], 0),
    ],
)
def test_a_process_says_nothing_of_processors(arguments: list[str], code: int) -> None:
    unset = {"TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = str(processes.ROOT)
    root = Path(processes.ROOT)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = "keras-lora: error: Invalid 'nowhere'" if code else ""
    assert done.returncode == code
    assert done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == bool(code)
