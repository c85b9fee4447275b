"""Adapting, merging, unloading and copying whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.models import (
    CONFIG,
    Subclassed,
    composite,
    data,
    every_model,
    functional,
    names,
    randomize_adapters,
    state,
    subclassed,
)

import keras_lora as kl


@every_model
def test_round_trip_of_apply_and_unload(make: Callable[[], keras.Model]) -> None:
    model = make()
    model.layers[-1].trainable = False
    before = state(model)
    kl.apply_lora(model, CONFIG)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    assert kl.unload_lora(model) is model
    assert state(model) == before


@every_model
def test_merged_copy_leaves_the_adapted_model_alone(make: Callable[[], keras.Model]) -> None:
    model = make()
    x, _ = data(model)
    kl.apply_lora(model, CONFIG)
    randomize_adapters(model)
    if make is subclassed:
        with pytest.raises(ValueError, match=r"get_config\(\).*Subclassed.*inplace=True"):
            kl.merge_lora(model, inplace=False)
        return
    before, expected = state(model), numpy_of(model(x))
    merged = kl.merge_lora(model, inplace=False)
    assert state(model) == before
    assert not kl.lora_layers(merged)
    assert all(v.trainable for v in merged.weights if "moving" not in v.name)
    np.testing.assert_allclose(numpy_of(merged(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [functional, composite])
def test_adapting_a_copy_leaves_the_model_alone(make: Callable[[], keras.Model]) -> None:
    model = make()
    model.compile("adam", "mse")
    x, y = data(model)
    before, expected = state(model), numpy_of(model(x))
    copy = kl.apply_lora(model, CONFIG, inplace=False)
    assert copy is not model
    assert len(kl.lora_layers(copy)) == len(kl.find_targets(model))
    np.testing.assert_allclose(numpy_of(copy(x)), expected, rtol=1e-5, atol=1e-6)
    copy.fit(x, y, verbose=0)
    assert state(model) == before


def test_a_config_that_forgets_variables_is_refused() -> None:
    @keras.saving.register_keras_serializable("tests")
    class Forgetful(keras.Model):
        def __init__(self, width: int = 5, **options: Any) -> None:
            super().__init__(**options)
            self.dense = keras.layers.Dense(width, name="dense")
            self.head = keras.layers.Dense(3, name="head")

        def call(self, inputs: Any) -> Any:
            return self.head(self.dense(inputs))

        def get_config(self) -> dict[str, Any]:
            return {"name": self.name}

    model = Forgetful(width=7)
    model(np.zeros((1, 5), "float32"))
    before = state(model)
    with pytest.raises(ValueError, match="get_config is incomplete"):
        kl.apply_lora(model, CONFIG, inplace=False)
    assert state(model) == before


def test_bias_and_layers_to_save_select_what_else_trains() -> None:
    def trained(**options: Any) -> list[str]:
        model = composite(1)
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "query"], **options))
        return sorted(
            f"{node}/{v.name}"
            for node in ["up", "query", "key", "norm", "head"]
            for v in _layer(model, node).trainable_variables
            if "lora" not in v.name
        )

    assert trained() == []
    assert trained(bias="lora_only") == ["query/bias", "up/bias"]
    assert trained(bias="all") == ["head/bias", "key/bias", "query/bias", "up/bias"]
    assert trained(layers_to_save=["head", "norm"]) == [
        "head/bias",
        "head/kernel",
        "norm/beta",
        "norm/gamma",
    ]


def _layer(model: keras.Model, name: str) -> keras.layers.Layer:
    return next(layer for layer in model._flatten_layers() if layer.name == name)


def test_patterns_give_layers_their_own_rank_and_alpha() -> None:
    model = kl.apply_lora(
        composite(),
        kl.LoRAConfig(
            rank=2,
            alpha=3,
            targets=["query", "up"],
            rank_pattern={"block_1/up": 4, "up": 1},
            alpha_pattern={"re:.*/query": 8},
        ),
    )
    specs = {path: layer.adapters["default"].spec for path, layer in kl.lora_layers(model).items()}
    assert {path: (spec.rank, spec.alpha) for path, spec in specs.items()} == {
        "block_0/attention/query": (2, 8),
        "block_1/attention/query": (2, 8),
        "block_0/up": (1, 3),
        "block_1/up": (4, 3),
    }


def test_a_layer_in_layers_to_save_takes_no_adapter() -> None:
    model = kl.apply_lora(composite(), kl.LoRAConfig(rank=2, layers_to_save=["block_0"]))
    assert not [path for path in kl.lora_layers(model) if path.startswith("block_0")]


def test_a_frozen_model_trains_its_adapters_and_is_frozen_again_afterwards() -> None:
    model = composite()
    model.trainable = False
    before = state(model)
    kl.apply_lora(model, CONFIG)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    x, y = data(model)
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    kl.unload_lora(model)
    assert state(model) == before


def test_statistics_of_a_frozen_batch_normalization_do_not_move() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    x, y = data(model)
    norm = model.get_layer("norm")
    before = [numpy_of(v) for v in norm.weights]
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    for variable, value in zip(norm.weights, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)


def test_a_shared_layer_is_adapted_once() -> None:
    shared = keras.layers.Dense(5, name="shared")
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(shared(shared(inputs))))
    x, _ = data(model)
    kl.apply_lora(model, CONFIG)
    assert list(kl.lora_layers(model)) == ["shared"]
    randomize_adapters(model)
    expected = numpy_of(model(x))
    np.testing.assert_allclose(numpy_of(kl.merge_lora(model)(x)), expected, rtol=1e-4)


def test_a_second_adapter_acts_alone_and_can_be_switched() -> None:
    model = functional()
    x, _ = data(model)
    base = numpy_of(model(x))
    kl.apply_lora(model, CONFIG, name="one")
    randomize_adapters(model)
    one = numpy_of(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=["middle"]), name="two")
    np.testing.assert_allclose(numpy_of(model(x)), base, rtol=1e-5, atol=1e-6)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    kl.set_adapter(model, "one")
    np.testing.assert_array_equal(numpy_of(model(x)), one)
    assert names(model.trainable_variables) == ["lora_a", "lora_b"]
    kl.set_adapter(model, None)
    np.testing.assert_allclose(numpy_of(model(x)), base, rtol=1e-5, atol=1e-6)
    assert not model.trainable_variables
    with pytest.raises(ValueError, match="names among"):
        kl.set_adapter(model, ["one", "three"])
    with pytest.raises(ValueError, match="all inactive"):
        kl.merge_lora(model)
    kl.set_adapter(model, "one")
    with pytest.warns(UserWarning, match=r"drops the adapters that are not active: \['two'\]"):
        kl.merge_lora(model)


def test_a_high_rank_is_allowed_with_one_warning_that_names_the_layers() -> None:
    with pytest.warns(UserWarning, match=r"above the smaller side.*\['up'\]") as caught:
        kl.apply_lora(functional(), kl.LoRAConfig(rank=6, targets=["up", "middle"]))
    assert len(caught) == 1


def test_subclassed_models_keep_working_through_attributes_and_lists() -> None:
    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(2, 5)).astype("float32")
    model(x)
    kl.apply_lora(model, CONFIG)
    assert isinstance(model.blocks[1], kl.LoRADense)
    randomize_adapters(model)
    expected = numpy_of(model(x))
    kl.merge_lora(model)
    assert type(model.blocks[1]) is keras.layers.Dense
    np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-4, atol=1e-5)
