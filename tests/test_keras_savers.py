"""Each way in which Keras writes a model to files: exact, or refused before a file is opened."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
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


def adapted(options: dict[str, dict[str, Any]]) -> keras.Model:
    """A model with adapters of these names and options, compiled."""
    model = functional()
    model.compile("adam", "mse")
    for name, fields in options.items():
        kl.apply_lora(model, kl.LoRAConfig(**{"rank": 2, **fields}), name=name)
        model.optimizer.build(model.trainable_variables)
    randomize_adapters(model)
    return model


TWO: dict[str, dict[str, Any]] = {"a": {"rank": 3}, "b": {}}
Step = Callable[[keras.Model], Any]
# What a model went through before it is saved, beside what its adapters are.
HISTORIES: dict[str, tuple[dict[str, dict[str, Any]], list[Step]]] = {
    "none is active": ({"a": {"dropout": 0.1}}, [lambda m: kl.set_adapter(m, None)]),
    "dropout was active": ({"a": {"dropout": 0.1}, "b": {}}, []),
    "a higher rank was active": (TWO, []),
    "two were active": (
        TWO,
        [lambda m: kl.set_adapter(m, ["a", "b"]), lambda m: kl.set_adapter(m, "b")],
    ),
    "the first slot grew last": (
        {"a": {}, "b": {}, "c": {"rank": 3}},
        [lambda m: kl.set_adapter(m, ["a", "b"]), lambda m: kl.set_adapter(m, ["c", "a"])],
    ),
    "DoRA was active": ({"a": {"use_dora": True}, "b": {}}, []),
    "one was deleted": (
        {"a": {"dropout": 0.1, "rank": 3}, "b": {}},
        [lambda m: kl.delete_adapter(m, "a")],
    ),
    "it does not train": (TWO, [lambda m: kl.set_adapter(m, "a", trainable=False)]),
    "it is scaled": (TWO, [lambda m: kl.scale_adapter(m, "b", 0.5)]),
    "its head is its own": ({"a": {"layers_to_save": ["head"]}}, []),
}


def variables(model: keras.Model) -> list[tuple[str, bool, bytes]]:
    found = [*model.variables, *model.optimizer.variables]
    return [(v.name, v.trainable, np.array(v).tobytes()) for v in found]


@pytest.mark.parametrize("history", HISTORIES)
def test_a_keras_file_contains_what_follows_from_the_history(history: str, tmp_path: Path) -> None:
    options, steps = HISTORIES[history]
    model = adapted(options)
    for step in steps:
        step(model)
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(3)
    for variable in model.optimizer.variables[2:]:
        variable.assign(rng.normal(size=variable.shape))
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert variables(loaded) == variables(model)
    for path, layer in kl.lora_layers(model).items():
        assert layer.active_adapters == kl.lora_layers(loaded)[path].active_adapters
    names = [*kl.lora_layers(model)["up"].adapters]
    x, _ = data(model)
    for name in names:
        for each in (model, loaded):
            kl.set_adapter(each, name)
        np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))


def moments(model: keras.Model) -> list[np.ndarray]:
    return [np.array(v) for v in model.optimizer.variables]


def with_active(names: Any) -> keras.Model:
    """A model with two adapters, of which these are active, and a built optimizer."""
    keras.utils.set_random_seed(3)
    model = adapted({"a": {"dropout": 0.1}, "b": {}})
    kl.set_adapter(model, names)
    model.optimizer.build(model.trainable_variables)
    return model


ACTIVE: list[Any] = ["a", "b", ["a", "b"], None]


@pytest.mark.parametrize("active", ACTIVE, ids=str)
def test_the_adapters_that_act_in_a_weights_file_act_once_it_is_loaded(
    active: Any, tmp_path: Path
) -> None:
    file = tmp_path / "m.weights.h5"
    model = with_active(active)
    rng = np.random.default_rng(3)
    for variable in model.optimizer.variables[2:]:
        variable.assign(rng.uniform(size=variable.shape))
    model.save_weights(file)
    x, _ = data(model)
    for other in ACTIVE:
        loaded = with_active(other)
        with warnings.catch_warnings():
            if isinstance(other, list):  # Keras: the optimizer has moments for more slots
                warnings.simplefilter("ignore")
            loaded.load_weights(file)
        layer = kl.lora_layers(loaded)["up"]
        assert layer.active_adapters == kl.lora_layers(model)["up"].active_adapters
        np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))
        if not isinstance(other, list):
            for left, right in zip(moments(loaded), moments(model), strict=True):
                np.testing.assert_array_equal(left, right)


def test_a_weights_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = adapted({"a": {}, "b": {"rank": 3}})
    model.get_layer("middle").bias.assign(np.arange(11))
    model.save_weights(tmp_path / "m.weights.h5")
    other = adapted({"b": {}, "a": {}})
    before = variables(other)
    with pytest.raises(ValueError, match="could not be loaded"):
        other.load_weights(tmp_path / "m.weights.h5")
    assert variables(other) == before
    assert kl.lora_layers(other)["up"].active_adapters == ("a",)


def test_what_takes_variables_alone_is_exact_or_refused(tmp_path: Path) -> None:
    """The legacy format, and the state that `OrbaxCheckpoint` writes."""
    model = adapted({"a": {}, "b": {}})
    takers: list[Step] = [lambda m: m.save(tmp_path / "m.h5"), lambda m: m.get_state_tree()]
    for take in takers:
        with pytest.raises(ValueError, match=r"that wait, \['a'\].*save_weights_only=True"):
            take(model)
    assert not [*tmp_path.iterdir()]
    kl.set_adapter(model, ["a", "b"])
    for take in takers:
        take(model)
    loaded = keras.saving.load_model(tmp_path / "m.h5", compile=False)
    x, _ = data(model)
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(model(x)))
    other = with_active(["a", "b"])
    model = with_active(["a", "b"])
    randomize_adapters(model, 0.7)
    other.set_state_tree(model.get_state_tree(value_format="numpy_array"))
    np.testing.assert_array_equal(np.array(other(x)), np.array(model(x)))


def test_a_checkpoint_of_tensorflow_is_refused(tmp_path: Path) -> None:
    model = functional()
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "base"))
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    before, files = np.array(model.get_layer("up").base_kernel), contents(tmp_path)
    with pytest.raises(ValueError, match=r"tf.train.Checkpoint would contain none.*save_weights"):
        tf.train.Checkpoint(model=model).save(str(tmp_path / "base"))
    assert contents(tmp_path) == files
    with pytest.raises(ValueError, match=r"tf.train.Checkpoint would contain none.*save_weights"):
        tf.train.Checkpoint(model=model).restore(path)
    np.testing.assert_array_equal(np.array(model.get_layer("up").base_kernel), before)
    kl.unload_lora(model)
    model.get_layer("up").kernel.assign(0 * before)
    tf.train.Checkpoint(model=model).restore(path).assert_consumed()
    np.testing.assert_array_equal(np.array(model.get_layer("up").kernel), before)
