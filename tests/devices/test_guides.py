"""What readers run on 8 devices: the port of Gemma's guide, and the blocks of the page."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import assets
import distributed_gemma
import keras
import numpy as np
import pytest
from support.processes import ROOT
from support.virtual_devices import use_eight_devices

use_eight_devices()

LETTERS = list("abcdefghijklmnopqrstuvwxyz ")  # enough of them for the vocabulary


@pytest.fixture(autouse=True)
def _in_no_distribution() -> Iterator[None]:
    yield
    keras.distribution.set_distribution(None)


@pytest.fixture
def _reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the form of the real one."""
    rng = np.random.default_rng(0)
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "text", "label"])
        for _ in range(40):
            writer.writerow(["imdb", "".join(rng.choice(LETTERS, 200)), 1])
    monkeypatch.setattr(assets, "_fetched", lambda name: tmp_path)


@pytest.mark.usefixtures("_reviews")
def test_distributed_gemma(capsys: pytest.CaptureFixture[str]) -> None:
    assert distributed_gemma.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    layouts = dict(re.findall(r"^decoder_block_1/(\S+) .*?\)\s+\w+(\(.*\))$", printed, re.M))
    assert layouts["attention/query/kernel"] == "('model', 'batch', None)"
    assert layouts["attention/query/lora_a"] == "('batch', None)"
    assert layouts["attention/query/lora_b"] == "(None, 'model', None)"
    assert layouts["ffw_linear/kernel"] == "('model', 'batch')"
    assert layouts["ffw_linear/lora_a"] == "('model', None)"
    assert layouts["ffw_linear/lora_b"] == "(None, 'batch')"
    assert "trains 21,504 of 169,280 parameters" in printed
    assert re.search(r"^Before:$.*^Loss: .* after 3 steps.*^After:$", printed, re.M | re.S)


def test_the_blocks_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "distribution.md").read_text()
    (section,) = re.findall(r"^## JAX.*?(?=^## )", page, flags=re.S | re.M)
    blocks = re.findall(r"^```py\n(.*?)^```", section, flags=re.S | re.M)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})
    assert "(None, 'model')" in capsys.readouterr().out
