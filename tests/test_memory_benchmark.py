"""The benchmark of memory runs, with a small model, and says what a row came to."""

from __future__ import annotations

from pathlib import Path

import memory
import pytest
from resident import MIB

SMALL = ["--tiny", "--billion", "--width", "256", "--quantized", "int8"]


@pytest.mark.slow
def test_a_quantized_model_is_merged_as_it_was_trained(tmp_path: Path) -> None:
    args = memory.arguments([*SMALL, "--folder", str(tmp_path)])
    trained = memory.STAGES["adapt, train, save"](args)
    merged = memory.merged(args)
    assert trained["weights"] < merged["weights"], "layers in floating point"
    assert merged["loss"] < 0.1, "merged: as adapted"


def test_a_row_that_comes_to_too_much_is_stopped_and_counts_as_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = memory.arguments(["--most", "0.001", "--folder", ""])
    stopped = memory.measured(args, "enable_lora")
    assert stopped == {"stopped": True, "peak": 0.001 * 1024 * MIB}
    fine = {"weights": MIB, "peak": MIB / 8, "seconds": 1.0, "loss": 1.0}
    rows = {"int4, blocks, chunks": fine, "enable_lora": stopped}
    ((value, _, highest),) = memory.bars(args, rows).values()
    assert value == pytest.approx(0.125 / 1.024)
    assert highest == 0.20
    memory.print_rows(rows, "")
    assert "stopped at 1" in capsys.readouterr().out
