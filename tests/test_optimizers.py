"""Every optimizer of Keras: made anew, with adapters in turns, and in slots of higher ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import counted, fit
from support.cases import numpy_of
from support.optimizers import (
    CLASSES,
    MIDDLE,
    OUT,
    WIDTH,
    adapt,
    base,
    compile_,
    optimizer,
    parts,
    scheduled_by_group,
    steps,
    values,
)

import keras_lora as kl
from keras_lora.layers import goes_by_element

every_optimizer = pytest.mark.parametrize("name", list(CLASSES))


@every_optimizer
def test_an_optimizer_made_anew_excludes_the_same_variables_from_weight_decay(name: str) -> None:
    def made(variables: Any) -> Any:
        found = optimizer(name, weight_decay=0.9)
        for part in parts(found):
            part.exclude_from_weight_decay(variables, ["bias"])
        return found

    model = base()
    head = model.get_layer("head")
    model.compile(made([head.kernel]), "mse")
    model.optimizer.build(model.trainable_variables)
    options: Any = {"bias": "all", "layers_to_save": ["head"]}
    adapt(model, "a", **options)
    trained = model.trainable_variables
    assert {v.name for v in trained} == {"lora_a", "lora_b", "bias", "kernel"}
    for variable in trained:
        variable.assign(np.ones(variable.shape))
    copies = [keras.Variable(np.ones(v.shape, "float32"), name=v.name) for v in trained]
    expected = made([v for v in copies if v.name == "kernel"])
    for found, variables in ((model.optimizer, trained), (expected, copies)):
        found.build(variables)
        found.apply([keras.ops.zeros(v.shape) for v in variables], variables)
    for variable, copy in zip(trained, copies, strict=True):
        np.testing.assert_allclose(numpy_of(variable), numpy_of(copy), rtol=1e-6)
    decayed = {v.name for v in copies if abs(numpy_of(v) - 1).max() > 0.01}
    # These two compute a variable from their own state alone, whatever decayed.
    assert name in ("Ftrl", "ScheduleFreeAdamW") or decayed == {"lora_a", "lora_b"}


def test_what_is_excluded_by_variable_is_excluded_in_a_larger_slot() -> None:
    model = base()
    adapt(model, "a")
    made = keras.optimizers.SGD(0.05, weight_decay=0.9)
    made.exclude_from_weight_decay([model.trainable_variables[1]])
    compile_(model, made)
    for _ in ("not built", "built"):
        adapt(model, f"b{_}", rank=3 + (_ == "built"))
        found = model.optimizer
        found.build(model.trainable_variables)
        decays = {v.name: found._use_weight_decay(v) for v in model.trainable_variables}
        assert decays == {"lora_a": True, "lora_b": False}


def test_a_copy_excludes_the_same_variables_from_weight_decay() -> None:
    model, made = base(), keras.optimizers.AdamW(0.05)
    made.exclude_from_weight_decay([model.get_layer("head").kernel], ["bias"])
    compile_(model, made)
    adapt(model, "a")
    copy = kl.merge_lora(model, inplace=False)
    decays = {v.path: copy.optimizer._use_weight_decay(v) for v in copy.weights}
    assert decays == {
        "up/kernel": True,
        "up/bias": False,
        "head/kernel": False,
        "head/bias": False,
    }


def test_settings_from_after_the_constructor_are_kept() -> None:
    class Doubled(keras.optimizers.SGD):
        doubled = False

    chosen = {"kernel": keras.optimizers.Adam(0.02), "other": Doubled(lambda: 0.03)}
    chosen["other"].doubled = True
    model = base()
    model.compile(
        keras.optimizers.MultiOptimizer(
            lambda v: chosen["kernel" if v.name == "kernel" else "other"]
        )
    )
    model.optimizer.build(model.trainable_variables)
    adapt(model, "a", layers_to_save=["head"], bias="all")
    model.optimizer.build(model.trainable_variables)
    adam, doubled = sorted(model.optimizer.optimizers, key=lambda x: type(x).__name__)
    assert adam is not chosen["kernel"]
    assert float(adam.learning_rate) == pytest.approx(0.02)
    assert doubled is not chosen["other"]
    assert doubled.doubled
    assert doubled.learning_rate == 0.03


def a_third(model: keras.Model) -> None:
    adapt(model, "bb", rank=5)
    steps(model, 1)
    adapt(model, "ccc", rank=7)


BETWEEN: dict[str, Callable[[keras.Model], None]] = {
    "equal rank": lambda m: adapt(m, "bb"),
    "higher rank": lambda m: adapt(m, "bb", rank=5),
    "lower rank": lambda m: adapt(m, "bb", rank=1),
    "DoRA": lambda m: adapt(m, "bb", use_dora=True),
    "a head": lambda m: adapt(m, "bb", layers_to_save=["head"]),
    "another layer": lambda m: adapt(m, "bb", targets=["head"]),
    "more layers": lambda m: adapt(m, "bb", targets=["up", "head"], rank=3),
    "none": lambda m: kl.set_adapter(m, None),
    "not trainable": lambda m: kl.set_adapter(m, "a", trainable=False),
    "a third": a_third,
}


TURNS: dict[str, Callable[[], Any]] = {
    "a schedule": scheduled_by_group,
    "accumulated gradients": lambda: optimizer("Nadam", gradient_accumulation_steps=3),
    **{
        name: partial(optimizer, name)
        for name in ("Adafactor", "ScheduleFreeAdamW", "MultiOptimizer", "LossScaleOptimizer")
    },
}
UNBROKEN: dict[str, list[np.ndarray]] = {}


def unbroken(kind: str) -> list[np.ndarray]:
    if kind not in UNBROKEN:
        model = base()
        adapt(model, "a")
        compile_(model, TURNS[kind]())
        steps(model, 4)
        UNBROKEN[kind] = values(model, "a")
    return UNBROKEN[kind]


@pytest.mark.parametrize(
    ("kind", "between"),
    [
        *itertools.product(["a schedule"], BETWEEN),
        *itertools.product(list(TURNS)[1:], ["higher rank", "a head"]),
    ],
)
def test_training_in_turns_is_training_without_a_break(kind: str, between: str) -> None:
    model = base()
    adapt(model, "a")
    compile_(model, TURNS[kind]())
    steps(model, 2)
    BETWEEN[between](model)
    if model.trainable_variables:
        steps(model, 3)
    kl.set_adapter(model, "a")
    steps(model, 2)
    for found, expected in zip(values(model, "a"), unbroken(kind), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_adapters_that_are_active_together_go_on_from_the_longer_training() -> None:
    model = base()
    adapt(model, "a")
    compile_(model, keras.optimizers.AdamW(0.05, use_ema=True))
    steps(model, 3)
    adapt(model, "bb", rank=3)
    assert int(model.optimizer.iterations) == 0
    steps(model, 1)
    kl.set_adapter(model, ["a", "bb"])
    kl.set_adapter(model, "bb")  # no step was made: nothing changes
    assert int(model.optimizer.iterations) == 1
    kl.set_adapter(model, ["a", "bb"])
    assert int(model.optimizer.iterations) == 3
    steps(model, 2)
    kl.set_adapter(model, "a")
    assert int(model.optimizer.iterations) == 5
    adapt(model, "ccc")
    kl.set_adapter(model, ["ccc", "a"])
    before = values(model, "ccc")
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for found, expected in zip(values(model, "ccc"), before, strict=True):
        np.testing.assert_allclose(found, expected)


def test_an_optimizer_with_other_state_says_that_the_state_is_lost() -> None:
    class ByName(keras.optimizers.SGD):
        def build(self, variables: Any) -> None:
            super().build(variables)
            self.last = {v.path: self.add_variable(v.shape, name="last") for v in variables}

    model = base()
    adapt(model, "a")
    compile_(model, ByName(0.05))
    steps(model, 1)
    adapt(model, "bb", layers_to_save=["head"])
    steps(model, 1)
    with pytest.warns(UserWarning, match="lists with an entry for each variable.*ByName"):
        kl.set_adapter(model, ["a", "bb"])


@every_optimizer
def test_what_goes_by_element_is_measured(name: str) -> None:
    """Two steps on a matrix, and on the matrix among values that get no gradient."""
    rng = np.random.default_rng(0)
    value, gradients = rng.normal(size=(3, 2)), rng.normal(size=(2, 3, 2))
    found = []
    for width in (2, 5):
        whole = rng.normal(size=(3, width))
        whole[:, :2] = value
        variable, made = keras.Variable(whole.astype("float32")), optimizer(name)
        for gradient in gradients:
            padded = np.pad(gradient, ((0, 0), (0, width - 2))).astype("float32")
            made.apply([keras.ops.convert_to_tensor(padded)], [variable])
        found.append(numpy_of(variable)[:, :2])
    same = np.allclose(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert same == goes_by_element(optimizer(name))


CLIPPED = [
    (name, {clip: 0.1}) for name in ("Adam", "SGD") for clip in ("clipnorm", "global_clipnorm")
]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in CLASSES), *CLIPPED], ids=str
)
def test_an_adapter_after_one_of_a_higher_rank_trains_as_alone(
    name: str, options: dict[str, float]
) -> None:
    def trained(higher: bool, compiled_first: bool = False) -> list[np.ndarray]:
        model = base()
        made = optimizer(name, **options)
        if higher:
            adapt(model, "higher", rank=5, targets=["up", "head"], use_dora=True)
        if compiled_first:
            compile_(model, made)
        adapt(model, "a")
        if not compiled_first:
            compile_(model, made)
        steps(model, 2)
        return values(model, "a")

    expected = trained(False)
    for compiled_first in (False,) if goes_by_element(optimizer(name)) else (False, True):
        for found, value in zip(trained(True, compiled_first), expected, strict=True):
            np.testing.assert_allclose(found, value, rtol=2e-4, atol=1e-5)


def test_equal_ranks_share_a_slot_whatever_the_optimizer() -> None:
    model, counter = counted()
    for name, rank in {"a": 2, "b": 2, "c": 3}.items():
        kl.apply_lora(model, kl.LoRAConfig(rank=rank, targets=["up"]), name=name)
    model.compile("adafactor", "mse")
    kl.set_adapter(model, "a")
    fit(model)
    traced = counter.calls
    for name in ("b", "a"):
        kl.set_adapter(model, name)
        fit(model)
    if keras.backend.backend() != "torch":  # torch runs the layer's Python in each step
        assert counter.calls == traced
    kl.set_adapter(model, "c")
    fit(model)
    assert counter.calls > traced
    assert [slot.rank for slot in kl.lora_layers(model)["up"].slots] == [3]


def test_an_outer_model_asks_for_slots_of_the_right_rank() -> None:
    model = base()
    adapt(model, "higher", rank=5)
    adapt(model, "a")
    outer = keras.Sequential([keras.Input((WIDTH,)), model])
    compile_(outer, keras.optimizers.Adafactor(0.05))
    with pytest.raises(ValueError, match="own ranks, since Adafactor does not go by element"):
        steps(outer, 1)
    kl.set_adapter(outer, "a")
    steps(outer, 1)
    (layer,) = kl.lora_layers(outer).values()
    assert [slot.rank for slot in layer.slots] == [2]


def noise(model: keras.Model) -> None:
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.normal(size=w.shape) for w in model.get_weights()])


def weights_of_another(model: keras.Model) -> None:
    kl.set_adapter(model, "higher")
    weights = model.get_weights()
    kl.set_adapter(model, "a")
    model.set_weights(weights)


def padding(model: keras.Model) -> None:
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))


@pytest.mark.parametrize("write", [noise, weights_of_another, padding])
@pytest.mark.filterwarnings("ignore:Expected the scale")
def test_what_is_written_into_padding_does_not_act(
    write: Callable[[keras.Model], None],
) -> None:
    model = base()
    adapt(model, "higher", rank=7, alpha=5)
    adapt(model, "a", alpha=3)
    write(model)
    (layer,) = kl.lora_layers(model).values()
    a, b = (np.array(f, "float64") for f in layer.adapters["a"].factors)
    head = model.get_layer("head")
    w, bias, v, c = (
        numpy_of(x).astype("float64")
        for x in (layer.base_kernel, layer.bias, head.kernel, head.bias)
    )
    x = np.random.default_rng(2).normal(size=(3, WIDTH))
    expected = np.tanh(x @ (w + 3 / 2 * a @ b) + bias) @ v + c
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-4)
    assert a.shape == (WIDTH, 2)
    assert expected.shape == (3, OUT)
    assert b.shape == (2, MIDDLE)


def test_values_that_follow_from_the_adapter_are_not_assigned() -> None:
    model = base()
    adapt(model, "a", alpha=3)
    weights = model.get_weights()
    model.set_weights(weights)  # the same: no warning
    with pytest.warns(UserWarning, match="which are left out"):
        model.set_weights([w + 1 for w in weights])
    (slot,) = kl.lora_layers(model)["up"].slots
    np.testing.assert_allclose(numpy_of(slot.scaling).ravel(), [1.5, 1.5])
