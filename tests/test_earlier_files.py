"""Files that version 0.1.0 wrote: read bit for bit, and the models compute what they did."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from support.earlier_files import (
    ADAPTERS,
    EPOCHS,
    FIXTURES,
    KERAS,
    LORA_H5,
    PEFT,
    TRAINING,
    WEIGHTS,
    Values,
    factors,
    seeds,
    trained,
    values,
)

import keras_lora as kl

# A warning of Keras for functional models with lists of layers, not only in old files.
pytestmark = pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")


def expected(folder: str, name: str) -> tuple[Path, Values]:
    """The file without its ending, and what version 0.1.0 read from it."""
    path = FIXTURES / folder / name.replace(" ", "_")
    with np.load(path.with_suffix(".npz")) as stored:
        return path, dict(stored)


def assert_reads(received: Values, stored: Values) -> None:
    assert received.keys() == stored.keys()
    for key, value in stored.items():
        if key.endswith("/outputs"):
            np.testing.assert_allclose(received[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(received[key], value, err_msg=key, strict=True)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(name: str, tmp_path: Path) -> None:
    path, stored = expected("adapters", name)
    model = ADAPTERS[name].make()
    kl.load_adapter(model, path)
    assert_reads(values(model), stored)
    kl.save_adapter(model, tmp_path / "again", **ADAPTERS[name].options)
    ours, theirs = (kl.read_adapter_files(folder) for folder in (tmp_path / "again", path))
    assert ours.config == theirs.config
    assert_reads(ours.tensors, theirs.tensors)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weights_file(name: str) -> None:
    path, stored = expected("weights", name)
    model = WEIGHTS[name].untrained()
    model.load_weights(path.with_suffix(".weights.h5"))
    assert_reads(seeds(model) | values(model), stored)


@pytest.mark.parametrize("name", KERAS)
def test_a_keras_file(name: str) -> None:
    path, stored = expected("keras", name)
    model = keras.models.load_model(path.with_suffix(".keras"))
    assert_reads(seeds(model) | values(model), stored)


@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_for_peft(name: str, tmp_path: Path) -> None:
    path, stored = expected("peft", name)
    model = PEFT[name].make()
    kl.load_peft_adapter(model, path)
    assert_reads(values(model), stored)
    kl.save_peft_adapter(model, tmp_path / "again", prefix="")
    for file in path.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", LORA_H5)
def test_a_file_of_keras_hub(name: str) -> None:
    path, stored = expected("lora_h5", name)
    model = LORA_H5[name].make()
    kl.load_keras_hub_lora(model, path.with_suffix(".lora.h5"))
    assert_reads(values(model), stored)


def test_a_checkpoint_goes_on(tmp_path: Path) -> None:
    _, stored = expected("", "checkpoint")
    shutil.copytree(FIXTURES / "checkpoint", tmp_path / "checkpoint")
    checkpoint = kl.AdapterCheckpoint(tmp_path / "checkpoint", monitor="loss")
    model = trained(TRAINING.untrained(), checkpoint, EPOCHS)
    received = factors(model, "default")
    assert received.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_allclose(received[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
