"""Models that were made in the scope of a `tf.distribute` strategy, and verbs called outside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.broken_runs import BreakAfter, BrokenError, adapted, assert_same, fit
from support.broken_runs import trained as trained_values
from support.cases import numpy_of
from support.models import CONFIG, data, functional, state
from support.replicas import mirrored

import keras_lora as kl

HEAD = kl.LoRAConfig(rank=3, targets=["up"], layers_to_save=["head"])


STRATEGIES: dict[str, Callable[[], tf.distribute.Strategy]] = {
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "mirrored": lambda: mirrored(2),
}


def replaced(model: keras.Model, path: Path) -> None:
    kl.save_adapter(model, path, "one")
    kl.set_adapter(model, "two")
    kl.load_adapter(model, path, "two", replace=True, allow_other_base=True)


def combined(model: keras.Model, _: Path) -> None:
    kl.combine_adapters(model, {"one": 0.5, "two": 0.5}, "both")
    kl.set_adapter(model, ["one", "both"])


def in_contexts(model: keras.Model, _: Path) -> None:
    x = data(model)[0]
    with kl.disable_adapter(model):
        model.predict(x, verbose=0)
    with kl.merged(model):
        model.predict(x, verbose=0)


STEPS: dict[str, Callable[[keras.Model, Path], Any]] = {
    "off": lambda model, _: kl.set_adapter(model, None),
    "on": lambda model, _: kl.set_adapter(model, "one"),
    "a second one": lambda model, _: kl.apply_lora(model, CONFIG, name="two"),
    "replaced": replaced,
    "combined": combined,
    "in contexts": in_contexts,
    "a head": lambda model, _: kl.apply_lora(model, HEAD, name="head"),
}


def trained(scope: contextlib.AbstractContextManager[Any], path: Path) -> list[np.ndarray]:
    """The outputs after each of the steps, with a step of training behind it."""
    keras.utils.set_random_seed(4)
    with scope:
        model = functional()
        optimizer = keras.optimizers.AdamW(0.001, weight_decay=0.1)
        model.compile(kl.set_rates(optimizer, b=3, heads=2), "mse")
    kl.apply_lora(model, CONFIG, name="one")
    x, y = data(model, 12)
    outputs = []
    for name, step in STEPS.items():
        step(model, path)
        if name in ["on", "replaced", "combined", "a head"]:
            model.fit(x, y, batch_size=len(x), verbose=0)
        outputs.append(numpy_of(model.predict(x, verbose=0)))
    return outputs


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> list[np.ndarray]:
    return trained(contextlib.nullcontext(), tmp_path_factory.mktemp("none"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_verb_outside_the_scope_does_what_it_does_without_a_strategy(
    strategy: str, expected: list[np.ndarray], tmp_path: Path
) -> None:
    received = trained(STRATEGIES[strategy]().scope(), tmp_path)
    for name, outputs, right in zip(STEPS, received, expected, strict=True):
        np.testing.assert_allclose(outputs, right, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_base_made_outside_is_not_adapted_in_a_scope(strategy: str) -> None:
    model = functional()
    before = state(model)
    with STRATEGIES[strategy]().scope():
        with pytest.raises(ValueError, match=r"Strategy, for 'mlp', which was made in no scope"):
            kl.apply_lora(model, CONFIG)
        assert state(model) == before
    kl.apply_lora(model, CONFIG)


def test_verbs_are_refused_in_the_scope_of_another_strategy() -> None:
    with STRATEGIES["one device"]().scope():
        model = kl.apply_lora(functional(), CONFIG)
    before = state(model)
    verbs: list[Callable[[], Any]] = [
        lambda: kl.set_adapter(model, None),
        lambda: kl.apply_lora(model, CONFIG, name="two"),
        lambda: kl.merge_lora(model),
        lambda: kl.unload_lora(model),
    ]
    with STRATEGIES["mirrored"]().scope():
        for verb in verbs:
            with pytest.raises(ValueError, match="a MirroredStrategy, .* of a OneDeviceStrategy"):
                verb()
    assert state(model) == before


OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "init": "pissa"},
    "head": {"layers_to_save": ["head"], "bias": "lora_only"},
}


def after_five_steps(
    scope: contextlib.AbstractContextManager[Any], options: dict[str, Any], inside: bool
) -> list[np.ndarray]:
    keras.utils.set_random_seed(4)
    with scope:
        model = functional()
        if inside:
            kl.apply_lora(model, kl.LoRAConfig(rank=2, **options))
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    if not inside:
        kl.apply_lora(model, kl.LoRAConfig(rank=2, **options))
    x, y = data(model, 60)
    model.fit(x, y, batch_size=12, verbose=0, shuffle=False)
    return [numpy_of(v) for v in model.variables]


@pytest.mark.parametrize("options", OPTIONS)
def test_five_steps_give_the_weights_of_one_device(options: str) -> None:
    expected = after_five_steps(contextlib.nullcontext(), OPTIONS[options], False)
    for replicas, inside in [(2, True), (4, False)]:
        received = after_five_steps(mirrored(replicas).scope(), OPTIONS[options], inside)
        for one, other in zip(received, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_broken_run_goes_on_under_a_strategy(tmp_path: Path) -> None:
    strategy = mirrored(2)

    def made(seed: int) -> keras.Model:
        with strategy.scope():
            return adapted(functional, seed)

    unbroken, model = made(1), made(2)
    fit(unbroken)
    with pytest.raises(BrokenError):
        fit(made(1), kl.AdapterCheckpoint(tmp_path, save_freq=2), BreakAfter(9))
    fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=2))
    assert_same(trained_values(model), trained_values(unbroken))


def test_a_copy_is_made_in_the_strategy_of_its_original() -> None:
    strategy = mirrored(2)
    with strategy.scope():
        model = functional()
    copy = kl.apply_lora(model, CONFIG, inplace=False)
    assert copy.distribute_strategy is strategy
    assert type(copy.get_layer("up").base_kernel.value) is type(model.get_layer("up").kernel.value)


def test_parameter_servers_are_refused_by_name() -> None:
    model = functional()
    model._distribute_strategy = object.__new__(tf.distribute.ParameterServerStrategy)
    with pytest.raises(ValueError, match="Received: 'mlp', made in that of a ParameterServerStr"):
        kl.apply_lora(model, CONFIG)
