"""The examples of other domains run, on small data in the form of the real files."""

from __future__ import annotations

import gzip
from pathlib import Path

import assets
import diffusion
import image_classification
import image_generation
import keras
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


def test_a_distance_is_that_of_two_normal_distributions() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(size=(20000, 2)) * [1, 3] + [0, 2]
    second = rng.normal(size=(20000, 2)) * [2, 3] + [4, 2]
    distance = diffusion.frechet(first, second)
    assert distance == pytest.approx(4**2 + (1 - 2) ** 2, rel=0.02)
