"""Two models around one encoder, each with its adapter and its optimizer."""

from __future__ import annotations

import keras
import numpy as np
from support.adapters import factors
from support.cases import numpy_of

import keras_lora as kl

RNG = np.random.default_rng(17)


def test_two_models_around_one_encoder_have_a_task_each() -> None:
    inputs = keras.Input((5,))
    encoder = keras.Model(inputs, keras.layers.Dense(7, activation="gelu", name="up")(inputs))
    tasks = {
        name: keras.Model(inputs, keras.layers.Dense(units, name="head")(encoder(inputs)))
        for name, units in [("two", 2), ("four", 4)]
    }
    x = RNG.normal(size=(6, 5)).astype("float32")
    expected = {}
    for name, model in tasks.items():
        kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]), name=name)
        model.compile("adam", "mse")
        model.fit(x, np.ones((6, model.output_shape[-1])), epochs=3, verbose=0)
        expected[name] = numpy_of(model.predict(x, verbose=0))
    for name in ["two", "four", "two"]:
        kl.set_adapter(tasks[name], name)
        np.testing.assert_array_equal(numpy_of(tasks[name].predict(x, verbose=0)), expected[name])


def test_each_of_two_models_around_an_encoder_keeps_its_optimizer() -> None:
    def run(turns: str) -> keras.Model:
        keras.utils.set_random_seed(6)
        inputs = keras.Input((5,))
        encoder = keras.Model(inputs, keras.layers.Dense(7, activation="gelu", name="up")(inputs))
        x = np.random.default_rng(2).normal(size=(6, 5)).astype("float32")
        models = {
            name: keras.Model(inputs, keras.layers.Dense(units, name="head")(encoder(inputs)))
            for name, units in [("a", 2), ("b", 4)]
        }
        for name, model in models.items():
            kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]), name=name)
            model.compile("adam", "mse")
        for name in turns:
            kl.set_adapter(models[name], name)
            models[name].fit(x, np.ones((6, models[name].output_shape[-1])), verbose=0)
        return models["a"]

    turns, unbroken = run("aba"), run("aa")
    kl.set_adapter(turns, "a")
    received, expected = (list(factors(m, "a").values()) for m in (turns, unbroken))
    assert received == expected
    assert int(turns.optimizer.iterations) == 2
