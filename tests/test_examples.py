"""The examples of other domains run, on small data in the form of the real files."""

from __future__ import annotations

import gzip
from pathlib import Path

import assets
import diffusion
import find_the_rank
import image_classification
import image_generation
import keras
import method_tasks
import numpy as np
import pytest
import time_series

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as they are after the downloads; returns the folder for what an example writes."""
    monkeypatch.setenv("KERAS_LORA_ASSETS", str(tmp_path))
    monkeypatch.setattr(assets, "_fetched", lambda name: tmp_path)
    rng = np.random.default_rng(0)
    folder = tmp_path / assets.FASHION_PACKAGE
    folder.mkdir()
    for part in ("train", "t10k"):
        pixels = rng.integers(256, size=(200, 28, 28)).astype("uint8").tobytes()
        labels = np.arange(200, dtype="uint8") % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes(8) + labels.tobytes())
        )
    for name in ("portugal.csv", "victoria.csv"):
        hours = "".join(f"x,{5 + np.sin(hour / 4):.3f}\n" for hour in range(22 * 168))
        (tmp_path / name).write_text(f"ds,y\n{hours}")
    return tmp_path / "out"


def dogs(path: Path) -> None:
    """Write a classifier of dogs with few convolutions, one of them frozen."""
    image = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(16, 3, strides=2, trainable=False)(image)
    x = keras.layers.BatchNormalization()(keras.layers.DepthwiseConv2D(3)(x))
    network = keras.Model(image, x, name="network")
    whole = keras.Input((32, 32, 3))
    features = keras.layers.GlobalAveragePooling2D()(network(whole))
    keras.Model(whole, keras.layers.Dense(3)(features)).save(path)


def test_time_series(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert time_series.main(["--quick", "--out", str(files)]) == 0
    printed = capsys.readouterr().out
    for row in ("as a week before", "before training", "LoRA", "full fine-tuning", "head only"):
        assert f"│ {row}" in printed


def test_image_classification(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dogs(files.with_name("mobilenet.h5"))
    assert image_classification.main(["--quick", "--out", str(files)]) == 0
    printed = capsys.readouterr().out
    assert "DepthwiseConv2D" in printed
    assert "│ head only" in printed
    network = image_classification.network()
    statistics = [v for v in network.weights if v.name.startswith("moving_")]
    assert len(network.trainable_variables) == len(network.weights) - len(statistics) == 6


def test_image_generation(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert image_generation.main(["--quick", "--out", str(files)]) == 0
    assert "│ other real bags" in capsys.readouterr().out
    assert (files / "image_generation.png").read_bytes().startswith(b"\x89PNG")


def test_find_the_rank(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = method_tasks.tiny()
    monkeypatch.setattr(find_the_rank, "classifier", lambda _: task.base())
    monkeypatch.setattr(find_the_rank, "rows", lambda: (task.train, task.validation, task.test))
    monkeypatch.setattr(find_the_rank, "HIGHEST", 8)
    assert find_the_rank.main(["--quick", "--out", str(files)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("chosen") == 1
    assert "Left to the library: rank 8" in printed
    for picture in ("ranks.png", "find_the_rank.png"):
        assert (files / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("accuracies", "rank"),
    [
        ((0.8, 0.8, 0.8), 16),
        ((0.8, 0.796, 0.79), 32),
        ((0.8, 0.79, 0.8), 64),
        ((0.7, 0.9, 0.696), 16),
    ],
)
def test_the_rank_that_suffices_is_before_the_first_that_loses(
    accuracies: tuple[float, ...], rank: int
) -> None:
    ranks = zip((64, 32, 16), accuracies, strict=True)
    assert find_the_rank.chosen([find_the_rank.Size(r, 0, x) for r, x in ranks]).rank == rank


def test_a_distance_is_that_of_two_normal_distributions() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=(20000, 2)) * [1, 3] + [0, 2]
    second = rng.normal(size=(20000, 2)) * [2, 3] + [4, 2]
    distance = diffusion.frechet(first, second)
    assert distance == pytest.approx(4**2 + (1 - 2) ** 2, rel=0.02)
