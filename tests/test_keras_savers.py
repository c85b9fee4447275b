"""Each way in which Keras writes a model to files: exact, or refused before a file is opened."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from support.models import composite, data, functional, randomize_adapters

import keras_lora as kl

# An outer model that is made after its inner one was adapted, and knows nothing of adapters.
OUTER: dict[str, Callable[[keras.Model], keras.Model]] = {
    "the model itself": lambda inner: inner,
    "functional": lambda inner: keras.Model(inner.input, inner(inner.input)),
    "sequential": lambda inner: keras.Sequential([inner, keras.layers.Dense(2, name="fresh")]),
    "a sequential in a functional": lambda inner: keras.Model(
        inner.input, keras.Sequential([inner])(inner.input)
    ),
}


def checkpointed(model: keras.Model, file: Path) -> None:
    callback = keras.callbacks.ModelCheckpoint(file)
    callback.set_model(model)
    callback.on_epoch_end(0, {})


WRITERS: dict[str, tuple[str, Callable[[keras.Model, Path], Any]]] = {
    "Model.save": ("m.keras", lambda model, file: model.save(file)),
    "saving.save_model": ("m.keras", keras.saving.save_model),
    "models.save_model": ("m.keras", keras.models.save_model),
    "a directory": ("m", lambda model, file: model.save(file, zipped=False)),
    "legacy": ("m.h5", lambda model, file: model.save(file)),
    "ModelCheckpoint": ("m.keras", checkpointed),
}


def contents(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("outer", OUTER)
def test_a_refused_file_is_as_it_was(outer: str, tmp_path: Path) -> None:
    inner = composite(1)
    model = OUTER[outer](inner)
    model(data(inner, 1)[0])
    for key, (name, write) in WRITERS.items():
        (tmp_path / key).mkdir()
        write(model, tmp_path / key / name)
    before = contents(tmp_path)
    kl.apply_lora(inner, kl.LoRAConfig(rank=2))
    for key, (name, write) in WRITERS.items():
        with pytest.raises(ValueError, match=r"adapters that no.*merge_lora\(model, inplace=Fal"):
            write(model, tmp_path / key / name)
    assert contents(tmp_path) == before
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="adapters that no"):
            duplicate(model)
    kl.unload_lora(inner)
    model.save(tmp_path / "plain.keras")


def test_an_outer_model_of_plain_layers_continues_exactly(tmp_path: Path) -> None:
    x, _ = data(functional())
    inner = kl.apply_lora(functional(), kl.LoRAConfig(rank=2))
    randomize_adapters(inner)
    for key, outer in OUTER.items():
        model = outer(inner)
        model(x)
        model.save(tmp_path / "m.keras")
        loaded = keras.saving.load_model(tmp_path / "m.keras")
        expected, again = ([v.shape for v in m.trainable_variables] for m in (model, loaded))
        assert expected == again, key
        np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_layers_that_are_made_by_hand_are_as_their_model_makes_them(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("tests")
    class ByHand(keras.layers.Layer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.up = kl.LoRADense(7, rank=2)

        def build(self, input_shape: Any) -> None:
            self.up.build(input_shape)

        def call(self, inputs: Any) -> Any:
            return self.up(inputs)

    model = keras.Sequential([keras.Input((5,)), ByHand()])
    randomize_adapters(model)
    x = np.ones((2, 5))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(model.predict(x, verbose=0), loaded.predict(x, verbose=0))


MAKERS: dict[str, Callable[[keras.Model], Any]] = {
    "clone_model": keras.models.clone_model,
    "clone_model by name": lambda model: keras.models.clone_model(model=model),
    "to_json": lambda model: keras.models.model_from_json(model.to_json()),
}


def backbone() -> keras.Model:
    return keras_hub.models.GPT2Backbone(
        vocabulary_size=31, num_layers=1, num_heads=3, hidden_dim=24, intermediate_dim=37
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_a_clone_has_all_adapters_or_is_refused(maker: str) -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2))
    kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["up"]), name="fr")
    clone = MAKERS[maker](model)
    found, expected = (
        {path: {n: a.spec for n, a in layer.adapters.items()} for path, layer in layers.items()}
        for layers in map(kl.lora_layers, (clone, model))
    )
    assert found == expected
    for make in (composite, backbone):
        model = make()
        MAKERS[maker](model)
        kl.apply_lora(model, kl.LoRAConfig(rank=2))
        with pytest.raises(ValueError, match="JSON or clone could bring back"):
            MAKERS[maker](model)
        MAKERS[maker](kl.unload_lora(model))
