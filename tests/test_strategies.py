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
from support.cases import numpy_of
from support.models import CONFIG, data, functional, state

import keras_lora as kl

HEAD = kl.LoRAConfig(rank=3, targets=["up"], layers_to_save=["head"])


def mirrored() -> tf.distribute.Strategy:
    # Two logical CPUs, so that there are two replicas.
    devices = tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


STRATEGIES: dict[str, Callable[[], tf.distribute.Strategy]] = {
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
    "mirrored": mirrored,
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
    x, y = data(model)
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
