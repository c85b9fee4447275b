"""Learning rates by group: each variable moves as by a plain optimizer with a rate of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.optimizers import (
    CLASSES,
    MIDDLE,
    WIDTH,
    WRAPPERS,
    adapt,
    base,
    compile_,
    steps,
)
from support.rates import EVERYTHING, FACTORS, RATE, RATES, everything, place, rated

import keras_lora as kl
from keras_lora.layers import group_of


def made(name: str, factor: float, options: dict[str, Any]) -> Any:
    if name not in WRAPPERS:
        return CLASSES[name](RATE * factor, **options)
    inner = [x(RATE * factor, **options) for x in (keras.optimizers.Adam, keras.optimizers.SGD)]
    return WRAPPERS[name](*inner)


def step(found: Any, gradients: list[Any], variables: list[Any]) -> None:
    if keras.backend.backend() != "jax":
        found.apply(gradients, variables)
        return
    values = [[v.value for v in each] for each in (found.variables, variables)]
    after = found.stateless_apply(values[0], gradients, values[1])
    for each, new in zip((variables, found.variables), after, strict=True):
        for variable, value in zip(each, new, strict=True):
            variable.assign(value)


def moved(found: Any, variables: Sequence[Any], gradients: Sequence[Any]) -> list[np.ndarray]:
    found.build(list(variables))
    for each in gradients:
        step(found, [keras.ops.convert_to_tensor(g) for g in each], list(variables))
    return [numpy_of(v) for v in variables]


def assert_moves_by_rates(name: str, options: dict[str, Any]) -> None:
    """Compare with a run of the plain optimizer for each variable alone."""
    variables = everything().trainable_variables
    rng = np.random.default_rng(2)
    gradients = [[rng.normal(size=v.shape).astype("float32") for v in variables] for _ in range(3)]
    copies = [keras.Variable(numpy_of(v), dtype="float32", name=v.name) for v in variables]
    received = moved(kl.set_rates(made(name, 1, options), **RATES), variables, gradients)
    for index, (variable, twin) in enumerate(zip(variables, copies, strict=True)):
        plain = made(name, FACTORS[place(variable)], options)
        (expected,) = moved(plain, [twin], [[each[index]] for each in gradients])
        np.testing.assert_allclose(
            received[index], expected, rtol=2e-5, atol=1e-6, err_msg=variable.path
        )


AVERAGED = {"weight_decay": 0.3, "use_ema": True, "ema_overwrite_frequency": 2}
OPTIONS = [
    ("SGD", {"momentum": 0.9, "nesterov": True, "clipvalue": 0.5}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "clipnorm": 0.5}),
    ("Adam", {"amsgrad": True, "gradient_accumulation_steps": 2, "weight_decay": 0.3}),
    ("Nadam", {"gradient_accumulation_steps": 2}),
    ("AdamW", {"loss_scale_factor": 8.0}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, AVERAGED) for name in CLASSES), *OPTIONS], ids=str
)
def test_each_variable_moves_as_by_the_plain_optimizer_at_its_own_rate(
    name: str, options: dict[str, Any]
) -> None:
    assert_moves_by_rates(name, options)


def scheduled(factor: float) -> Any:
    return keras.optimizers.schedules.ExponentialDecay(RATE * factor, 2, 0.5)


def computed(factor: float) -> Any:
    return lambda: RATE * factor


@pytest.mark.parametrize("rate", [scheduled, computed])
def test_schedules_are_multiplied(rate: Callable[[float], Any], monkeypatch: Any) -> None:
    monkeypatch.setitem(CLASSES, "AdamW", lambda x, **y: keras.optimizers.AdamW(rate(x / RATE)))
    assert_moves_by_rates("AdamW", {})


def test_clipping_by_the_norm_of_all_gradients_is_as_without_rates() -> None:
    variables = everything().trainable_variables
    before = [numpy_of(v) for v in variables]
    rng = np.random.default_rng(3)
    gradients = [rng.normal(size=v.shape) for v in variables]
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    found = kl.set_rates(keras.optimizers.SGD(RATE, global_clipnorm=0.5), **RATES)
    after = moved(found, variables, [[g.astype("float32") for g in gradients]])
    for variable, x, g, received in zip(variables, before, gradients, after, strict=True):
        expected = x - FACTORS[place(variable)] * RATE * 0.5 / norm * g
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def by_path(name: str) -> Any:
    """Plain optimizers of Keras with the rates of `FACTORS`, by path."""
    rates = {f".*{path}": CLASSES[name](RATE * factor) for path, factor in FACTORS.items()}
    return keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(CLASSES[name](RATE), rates)
    )


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    model = everything()
    compile_(model, by_path("Adam"))
    steps(model, 3)
    return [numpy_of(v) for v in model.trainable_variables]


def first_compiled() -> keras.Model:
    model = base()
    compile_(model, rated())
    return model


def first_trained() -> keras.Model:
    model = first_compiled()
    steps(model, 1)
    model.set_weights(base().get_weights())
    return model


@pytest.mark.parametrize("first", [first_compiled, first_trained])
def test_a_model_may_be_adapted_after_it_is_compiled(
    first: Callable[[], keras.Model], expected: list[np.ndarray]
) -> None:
    model = first()
    adapt(model, "a", **EVERYTHING)
    for variable, other in zip(
        model.trainable_variables, everything().trainable_variables, strict=True
    ):
        variable.assign(other)
    steps(model, 3)
    for variable, right in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(numpy_of(variable), right, rtol=1e-4, atol=1e-5)


WRAPPED: dict[str, Callable[[], Any]] = {
    "alone": rated,
    "within a loss scale": lambda: keras.optimizers.LossScaleOptimizer(rated()),
    "around a loss scale": lambda: kl.set_rates(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(RATE)), **RATES
    ),
    "within a map": lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(rated(), {".*head/.*": rated()})
    ),
    "made by a function": lambda: keras.optimizers.MultiOptimizer(lambda _: rated()),
    "read from its config": lambda: keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(rated())
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_fit_moves_each_group_at_its_rate(kind: str, expected: list[np.ndarray]) -> None:
    model = everything()
    model.compile(WRAPPED[kind](), "mse", run_eagerly=False)
    steps(model, 3)
    for variable, right in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(
            numpy_of(variable), right, rtol=1e-4, atol=1e-5, err_msg=variable.path
        )


GROUPS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "all biases": ({"bias": "all"}, {"up/bias": "biases", "head/bias": "biases"}),
    "its own bias": ({"bias": "lora_only"}, {"up/bias": "biases"}),
    "a head": ({"layers_to_save": ["head"]}, {"head/kernel": "heads", "head/bias": "heads"}),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_what_trains_of_the_base_is_a_head_or_a_bias(kind: str) -> None:
    options, groups = GROUPS[kind]
    model = base()
    adapt(model, "head", layers_to_save=["head"])  # owns the head's bias too, but is not active
    adapt(model, "a", **options)
    found = {place(v): group_of(v) for v in model.trainable_variables}
    assert found == {"up/lora_a": "a", "up/lora_b": "b", **groups}


def test_what_no_adapter_owns_moves_at_the_optimizers_rate() -> None:
    layers = [kl.LoRADense(MIDDLE, rank=2, name="up"), keras.layers.Dense(2, name="lora_b")]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    groups = {place(v): group_of(v) for v in model.trainable_variables}
    assert groups == {
        "up/lora_a": "a",
        "up/lora_b": "b",
        "lora_b/kernel": None,
        "lora_b/bias": None,
    }
