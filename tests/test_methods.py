"""The benchmark of methods: it goes on where it was, and its table is of the rate that is best."""

from __future__ import annotations

import json
from pathlib import Path

import method_tasks
import method_ways
import methods
import pytest
from method_table import UNTRAINED, markdown, read
from methods import Results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Expected the lowest loss")  # of random rows in a few steps
def test_a_run_that_is_in_the_file_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results" / "methods.jsonl"
    names = ["auto", "rank 16"]
    options = ["--tiny", "--results", str(path), "--methods"]
    methods.main([*options, *names])
    lines = path.read_text()
    monkeypatch.setattr(methods.Runner, "trainee", None)
    methods.main([*options, *names])
    assert path.read_text() == lines
    found = {(x["method"], x.get("part")): x for x in map(json.loads, lines.splitlines())}
    small = found["rank 16, shrunk to 95% of its energy", "test"]
    assert small["trained"] < found["rank 16", "test"]["trained"]
    assert small["trained_as"] == "rank 16"
    assert found["auto", "test"]["rate"] == found["auto", "rate"]["rate"]
    assert found["auto", "rate"]["settled"][0].startswith("rank 8: ")
    capsys.readouterr()
    methods.main(["--table", "--results", str(path)])
    table = capsys.readouterr().out
    assert [row.split(" | ")[0] for row in table.splitlines()[4:]] == [
        *("| auto", "| rank 16", "| rank 16, shrunk to 95% of its energy"),
    ]


def test_a_way_leaves_the_heads_and_its_adapters_to_train() -> None:
    task = method_tasks.tiny()
    heads = 22 * 22 + 22 + 2 * 22 + 2
    for name in ("head only", "enable_lora, rank 8"):
        model = task.base()
        method_ways.WAYS[name].prepare(model, None)
        trained = {v.name for v in model.trainable_variables}
        assert ("lora_kernel_a" in trained) == (name != "head only")
        assert {"kernel", "bias"} <= trained
        own = sum(v.shape.num_elements() for v in model.trainable_variables if "lora" not in v.name)
        assert own == heads


def test_the_table_is_of_the_rate_that_is_best_on_validation_rows(tmp_path: Path) -> None:
    results = Results(tmp_path / "methods.jsonl")
    same = {"task": "T", "step_ms": 3.0, "peak_mib": 5.0, "bytes": 10**6}
    same |= {"trained": 1234, "found_again": 0.25}
    results.add({"task": "T", "method": UNTRAINED, "found_again": 0.5})
    for method, better in (("full fine-tuning", 0.03), ("rank 8", 0.0)):
        for rate, score in ((1e-3, 0.7), (2e-3, 0.8)):
            line = {**same, "method": method, "rate": rate}
            results.add({**line, "part": "validation", "seed": 0, "score": score})
            for seed in range(3):
                score_of_seed = 0.6 + rate + seed / 100 + better
                results.add({**line, "part": "test", "seed": seed, "score": score_of_seed})
    *_, full, row = markdown(read(results.path)).splitlines()
    rest = "0.002 of 2 | 1,234 | 3 | 5 | 1.00 | +25.0 |"
    assert full == f"| full fine-tuning | 64.20 ± 1.00 | 3 |  | {rest}"
    assert row == f"| rank 8 | 61.20 ± 1.00 | 3 | -3.00 ± 0.00 | {rest}"
