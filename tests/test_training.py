"""`fit` in every mode, and what compiling leaves behind; on every backend."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import keras
import numpy as np
import pytest
from support.models import composite, data, functional, randomize_adapters, state

import keras_lora as kl

CONFIG = kl.LoRAConfig(rank=2, alpha=3)
TENSORFLOW = keras.backend.backend() == "tensorflow"
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "jit": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "steps per execution": {"steps_per_execution": 2},
    "gradient accumulation": {
        "optimizer": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)
    },
}
if keras.backend.backend() == "torch":
    # torch.compile wants a C++ compiler at run time; Keras has no steps_per_execution on torch.
    del MODES["jit"], MODES["steps per execution"]


def numpy_of(value: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(value))


def snapshot(variables: Any) -> dict[str, bytes]:
    return {v.path: numpy_of(v).tobytes() for v in variables}


def compile_(model: keras.Model, optimizer: Any = None, **options: Any) -> None:
    made = keras.optimizers.Adam(0.01) if optimizer is None else optimizer()
    model.compile(made, "mse", **options)


def fit(model: keras.Model, epochs: int = 1) -> list[float]:
    x, y = data(model)
    y = y.astype("float32")
    return list(
        model.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0).history["loss"]
    )


@pytest.mark.parametrize("mode", list(MODES))
def test_every_mode_trains_the_adapters_alone(mode: str) -> None:
    model = kl.apply_lora(composite(1), CONFIG)
    compile_(model, **MODES[mode])
    frozen = snapshot(v for v in model.weights if not v.trainable)
    start = snapshot(model.trainable_variables)
    losses = fit(model, epochs=6)
    assert losses[-1] < losses[0]
    assert snapshot(v for v in model.weights if not v.trainable) == frozen
    assert all(value != start[path] for path, value in snapshot(model.trainable_variables).items())


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_float32_adapters(policy: str) -> None:
    model = kl.apply_lora(functional(dtype=policy), CONFIG)
    assert {str(v.dtype) for v in model.trainable_variables} == {"float32"}
    start = snapshot(model.trainable_variables)
    compile_(model)
    if policy == "mixed_float16":
        compile_(model, lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)))
    losses = fit(model, epochs=6)
    assert losses[-1] < losses[0]
    assert all(value != start[path] for path, value in snapshot(model.trainable_variables).items())


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_a_low_precision_step_follows_the_float32_one(policy: str) -> None:
    """Gradients of A and B against those of a float32 model with the same weights."""

    def step(dtype: str) -> list[np.ndarray]:
        model = functional(dtype=dtype)
        rng = np.random.default_rng(0)
        for variable in model.trainable_variables:
            variable.assign(rng.normal(scale=0.5, size=variable.shape))
        kl.apply_lora(model, CONFIG)
        randomize_adapters(model)
        start = [numpy_of(v) for v in model.trainable_variables]
        model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=TENSORFLOW)
        x, y = data(model)
        model.train_on_batch(x, y.astype("float32"))
        return [numpy_of(v) - s for v, s in zip(model.trainable_variables, start, strict=True)]

    for low, full in zip(step(policy), step("float32"), strict=True):
        assert np.linalg.norm(low - full) <= 0.05 * np.linalg.norm(full)


def test_compiled_functions_follow_every_change() -> None:
    model = functional()
    x, y = data(model)
    compile_(model)

    def predict() -> np.ndarray:
        return np.array(model.predict(x, verbose=0))

    base = predict()
    model.evaluate(x, y, verbose=0)
    kl.apply_lora(model, CONFIG)
    randomize_adapters(model)
    adapted = predict()
    assert np.abs(adapted - base).max() > 0.01
    with kl.disable_adapter(model):
        np.testing.assert_allclose(predict(), base, rtol=1e-5, atol=1e-6)
    with kl.merged(model):
        np.testing.assert_allclose(predict(), adapted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(predict(), adapted)
    kl.set_adapter(model, None)
    np.testing.assert_allclose(predict(), base, rtol=1e-5, atol=1e-6)
    kl.set_adapter(model, "default")
    kl.merge_lora(model)
    np.testing.assert_allclose(predict(), adapted, rtol=1e-4, atol=1e-5)


def test_models_around_and_inside_follow_too() -> None:
    inner = functional()
    inputs = keras.Input((5,))
    outer = keras.Model(inputs, keras.layers.Dense(2, name="top")(inner(inputs)))
    x, _ = data(inner)
    base = [m.predict(x, verbose=0) for m in (inner, outer)]
    kl.apply_lora(inner, CONFIG)
    randomize_adapters(inner)
    moved = [m.predict(x, verbose=0) for m in (inner, outer)]
    assert all(np.abs(new - old).max() > 0.01 for new, old in zip(moved, base, strict=True))
    kl.unload_lora(outer)
    for model, expected in zip((inner, outer), base, strict=True):
        np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


def test_the_search_for_outer_models_keeps_none_alive() -> None:
    inner = functional()
    inputs = keras.Input((5,))
    outer = weakref.ref(keras.Model(inputs, inner(inputs)))
    kl.apply_lora(inner, CONFIG)
    del inputs
    keras.backend.clear_session()
    inner._inbound_nodes.clear()
    gc.collect()
    assert outer() is None


def test_a_model_that_was_trained_goes_on_with_a_fresh_optimizer_of_the_same_settings() -> None:
    model = functional()
    compile_(model, lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1, clipnorm=1.0))
    fit(model)
    old = model.optimizer
    old.learning_rate = 0.005
    kl.apply_lora(model, CONFIG)
    assert model.optimizer is not old
    expected = old.get_config() | {"learning_rate": 0.005}
    received = model.optimizer.get_config()
    assert received.pop("learning_rate") == pytest.approx(expected.pop("learning_rate"))
    assert received == expected
    frozen = snapshot(v for v in model.weights if not v.trainable)
    fit(model)
    assert snapshot(v for v in model.weights if not v.trainable) == frozen
    slots = [v for v in model.optimizer.variables if "momentum" in v.path or "velocity" in v.path]
    assert len(slots) == 2 * len(model.trainable_variables)
    kl.merge_lora(model)
    before = snapshot(model.weights)
    fit(model)
    after = snapshot(model.weights)
    assert all(after[path] != before[path] for path in before)


def test_merged_within_training_keeps_the_optimizer() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    compile_(model)
    fit(model)
    optimizer, iterations = model.optimizer, int(model.optimizer.iterations)
    with kl.merged(model):
        pass
    fit(model)
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 2 * iterations


def test_an_optimizer_that_cannot_be_made_anew_is_refused() -> None:
    class Handmade(keras.optimizers.SGD):
        def __init__(self, secret: object) -> None:
            super().__init__(0.1)
            self.secret = secret

    model = functional()
    compile_(model, lambda: Handmade(object()))
    fit(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"Handmade, which cannot.*model\.optimizer = None"):
        kl.apply_lora(model, CONFIG)
    assert state(model) == before
    model.optimizer = None
    kl.apply_lora(model, CONFIG)


def test_a_copy_does_not_share_the_memory_of_a_model_that_trains_on() -> None:
    model = functional()
    compile_(model)
    fit(model)
    kl.apply_lora(model, CONFIG)
    copy = kl.merge_lora(model, inplace=False)
    before = snapshot(copy.weights)
    kl.unload_lora(model)
    fit(model)
    assert snapshot(copy.weights) == before
