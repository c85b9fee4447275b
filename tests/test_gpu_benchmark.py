"""The benchmark for a GPU runs, with small shapes on the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.processes import ROOT


@pytest.mark.slow
def test_it_prints_a_row_for_each_run() -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--steps", "1", "--backends", "torch"]
    rows = ["keras_lora, blocks, chunks", "PEFT, gradient checkpointing"]
    run = subprocess.run(
        [*command, "--variants", *rows], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "A training step on CPU" in run.stdout
    printed = [line for line in run.stdout.splitlines() if "torch" in line]
    assert [row in line for row, line in zip(rows, printed, strict=True)] == [True, True]
    trained = {line.split("│")[6].strip() for line in printed}
    assert len(trained) == 1, "both train the same factors"
