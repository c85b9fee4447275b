"""The base stays frozen, whoever sets flags, and is as it was once its adapters have gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.models import CONFIG, data, every_model, functional, randomize_adapters

import keras_lora as kl


def trainable(model: keras.Model) -> set[str]:
    return {v.path for v in model.trainable_variables}


def toggle(model: keras.Model) -> None:
    model.trainable = False
    model.trainable = True


def thaw_layers(model: keras.Model) -> None:
    for layer in model.layers:
        layer.trainable = True


def thaw_variables(model: keras.Model) -> None:
    for variable in model.variables:
        variable.trainable = True


@pytest.mark.filterwarnings("ignore:Variables of the base trained")
@every_model
def test_a_switch_freezes_what_others_thawed(make: Callable[[], keras.Model]) -> None:
    model = kl.apply_lora(make(), kl.LoRAConfig(rank=2, bias="lora_only"), name="a")
    kl.apply_lora(model, CONFIG, name="b")
    flags = {}
    for name in ["a", None, "b"]:
        kl.set_adapter(model, name)
        flags[name] = trainable(model), [layer.trainable for layer in model._flatten_layers()]
    for others in [toggle, thaw_layers, thaw_variables]:
        for name, expected in flags.items():
            others(model)
            kl.set_adapter(model, name)
            layers = [layer.trainable for layer in model._flatten_layers()]
            assert (trainable(model), layers) == expected


@pytest.mark.parametrize("compiled_after", [False, True])
def test_fit_freezes_what_others_thawed(compiled_after: bool) -> None:
    model = kl.apply_lora(functional(), CONFIG)
    x, y = data(model)
    if not compiled_after:
        model.compile("adam", "mse")
    expected, norm = trainable(model), model.get_layer("norm")
    before = [np.array(v) for v in norm.variables]
    toggle(model)
    if compiled_after:
        model.compile("adam", "mse")
    with pytest.warns(UserWarning, match=r"'norm/gamma', 'norm/beta'.*`layers_to_save`"):
        model.fit(x, y, verbose=0)
    assert trainable(model) == expected
    for value, variable in zip(before, norm.variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_an_adapted_layer_is_frozen_again_by_itself() -> None:
    config = kl.LoRAConfig(rank=2, targets=["up", "middle", "head"], bias="lora_only")
    model = kl.apply_lora(functional(), config)
    expected = trainable(model)
    toggle(model)
    assert trainable(model) - expected == {"norm/gamma", "norm/beta"}
    with pytest.warns(UserWarning, match=r"'norm/gamma', 'norm/beta'.*`layers_to_save`"):
        kl.set_adapter(model, "default")
    assert trainable(model) == expected


def test_a_layer_made_by_hand_trains_its_adapters_and_the_bias_that_was_asked_for() -> None:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            kl.LoRADense(7, rank=2, train_bias=True, name="up"),
            kl.LoRADense(3, rank=2, name="out"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    expected = trainable(model)
    assert {p.split("/", 1)[1] for p in expected} == {
        *("up/bias", "up/lora_a", "up/lora_b", "out/lora_a", "out/lora_b"),
        *("head/kernel", "head/bias"),
    }
    toggle(model)
    assert trainable(model) == expected
    kl.set_adapter(model, "default")
    assert trainable(model) == expected


def nested() -> tuple[keras.Model, keras.Model]:
    """A model around an encoder, and the encoder."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    encoder = keras.Model(inputs, keras.layers.Dense(7, name="up")(inputs), name="encoder")
    x = keras.layers.Dense(11, name="middle")(encoder(inputs))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="outer"), encoder


VERBS: dict[str, Callable[[keras.Model], Any]] = {
    "merge_lora": kl.merge_lora,
    "unload_lora": kl.unload_lora,
    "delete_adapter": lambda model: kl.delete_adapter(model, "default"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_around_has_no_trace_of_adapters_that_a_part_of_it_lost(
    verb: str, tmp_path: Path
) -> None:
    outer, encoder = nested()
    base = [numpy_of(v) for v in outer.weights]
    flags = [v.trainable for v in outer.weights]
    x, _ = data(outer)
    config = kl.LoRAConfig(
        rank=2, targets=["up"], layers_to_save=["head"], bias="all", exclude=["middle"]
    )
    kl.apply_lora(outer, config)
    randomize_adapters(outer)
    head = outer.get_layer("head")
    head.kernel.assign(head.kernel + 1)
    adapted = numpy_of(outer(x))
    VERBS[verb](encoder)
    assert [v.trainable for v in outer.weights] == flags
    if verb == "merge_lora":
        np.testing.assert_allclose(numpy_of(outer(x)), adapted, rtol=1e-5, atol=1e-5)
    else:
        for variable, value in zip(outer.weights, base, strict=True):
            np.testing.assert_array_equal(numpy_of(variable), value)
    outer.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(outer(x)))


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_keeps_adapters_stays_frozen_until_they_go(verb: str) -> None:
    outer, encoder = nested()
    flags = [v.trainable for v in outer.weights]
    kl.apply_lora(outer, CONFIG)
    VERBS[verb](encoder)
    assert list(kl.lora_layers(outer)) == ["middle"]
    assert trainable(outer) == {"middle/lora_a", "middle/lora_b"}
    kl.set_adapter(outer, "default")
    assert trainable(outer) == {"middle/lora_a", "middle/lora_b"}
    kl.unload_lora(outer)
    assert [v.trainable for v in outer.weights] == flags


def test_a_second_model_around_the_encoder_is_free_too() -> None:
    first, encoder = nested()
    second = keras.Sequential([encoder, keras.layers.Dense(2, name="other")])
    second.build((None, 5))
    flags = [[v.trainable for v in m.weights] for m in (first, second)]
    for name, model, head in [("a", first, "head"), ("b", second, "other")]:
        config = kl.LoRAConfig(rank=2, targets=["up"], layers_to_save=[head])
        kl.apply_lora(model, config, name=name)
    kl.delete_adapter(encoder, "a")
    assert not [v for v in first.variables if "_lora_owned" in vars(v)]
    kl.unload_lora(first)
    assert [[v.trainable for v in m.weights] for m in (first, second)] == flags


@pytest.mark.parametrize("compiled_before", [True, False])
def test_the_base_does_not_train_while_adapters_are_disabled(compiled_before: bool) -> None:
    model = functional()
    x, y = data(model)
    base = [numpy_of(v) for v in model.weights]
    outer = keras.Sequential([keras.Input((5,)), model])
    kl.apply_lora(outer, kl.LoRAConfig(rank=2, targets=["up"], layers_to_save=["head"]))
    for trained in (model, outer):
        trained.compile("adam", "mse")
        if compiled_before:
            trained.fit(x, y, verbose=0)
    adapted = numpy_of(model(x))
    with kl.disable_adapter(model):
        for trained in (model, outer):
            with pytest.raises(ValueError, match=r"set_adapter\(model, None\)"):
                trained.fit(x, y, verbose=0)
            with pytest.raises(ValueError, match=r"set_adapter\(model, None\)"):
                trained.train_on_batch(x, y)
        loss = model.evaluate(x, y, verbose=0)
    np.testing.assert_array_equal(numpy_of(model(x)), adapted)
    assert np.isfinite(loss)
    for trained in (model, outer):
        trained.fit(x, y, verbose=0)
    assert (numpy_of(model(x)) != adapted).any()
    kl.unload_lora(outer)
    for variable, value in zip(model.weights, base, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)
