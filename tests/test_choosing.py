"""Contexts within a step that is traced: the computation is chosen, and no value moves."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.models import data, state
from support.switched import CONFIG, two_adapters

import keras_lora as kl

STEPS = 2


class Penalized(keras.Model):
    """Trains a policy whose outputs are drawn to those of a reference."""

    def __init__(self, policy: keras.Model, reference: Callable[[Any], Any]) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference

    def call(self, inputs: Any) -> Any:
        return self.policy(inputs)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any
    ) -> Any:
        far = y_pred - ops.stop_gradient(self.reference(x))
        return ops.mean((y_pred - y) ** 2) + ops.mean(far**2)


def policy(active: Any) -> keras.Model:
    random.seed(5)  # Keras draws the seeds of its initializers from here: all have one base
    model = two_adapters()
    kl.set_adapter(model, active)
    return model


def fitted(model: keras.Model, reference: Callable[[Any], Any], eager: bool) -> Any:
    """The losses of some steps, and the factors after them."""
    trainer = Penalized(model, reference)
    trainer.compile(keras.optimizers.SGD(0.1), run_eagerly=eager, jit_compile=False)
    x, y = data(model)
    losses = trainer.fit(x, y, batch_size=len(x), epochs=STEPS, verbose=0).history["loss"]
    layers = kl.lora_layers(model).values()
    factors = [np.array(f) for layer in layers for a in layer.adapters.values() for f in a.factors]
    return losses, factors


def base(model: keras.Model) -> Callable[[Any], Any]:
    def reference(x: Any) -> Any:
        with kl.disable_adapter(model):
            return model(x)

    return reference


def half(model: keras.Model) -> Callable[[Any], Any]:
    def reference(x: Any) -> Any:
        with kl.scale_adapter(model, "fr", 0.5):
            return model(x)

    return reference


def one(model: keras.Model) -> Callable[[Any], Any]:
    def reference(x: Any) -> Any:
        with kl.use_adapter(model, "de"):
            return model(x)

    return reference


def nested(model: keras.Model) -> Callable[[Any], Any]:
    def reference(x: Any) -> Any:
        with kl.use_adapter(model, "de"), kl.scale_adapter(model, "de", 2):
            return model(x)

    return reference


def twice(model: keras.Model) -> None:
    kl.set_adapter(model, "de")
    kl.scale_adapter(model, "de", 2)


# What is active, the reference within the step, and how a frozen copy is to compute it.
REFERENCES: dict[str, tuple[Any, Callable[..., Any], Callable[[keras.Model], object]]] = {
    "base": ("fr", base, lambda m: kl.set_adapter(m, None)),
    "half": ("fr", half, lambda m: kl.scale_adapter(m, "fr", 0.5)),
    "one of two": (["fr", "de"], one, lambda m: kl.set_adapter(m, "de")),
    "nested": (["fr", "de"], nested, twice),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("which", REFERENCES)
def test_a_step_with_a_context_trains_as_with_a_second_model(which: str, eager: bool) -> None:
    """The first step; later the reference moves, where adapters that train are in it."""
    active, reference, prepare = REFERENCES[which]
    model, other, second = policy(active), policy(active), policy(active)
    prepare(second)
    losses, factors = fitted(model, reference(model), eager)
    # Not the model itself, which would train as a part of the trainer.
    expected, expected_factors = fitted(other, partial(second.__call__), eager)
    steps = STEPS if which == "base" else 1
    np.testing.assert_allclose(losses[:steps], expected[:steps], rtol=1e-5)
    if which == "base":
        for value, other_value in zip(factors, expected_factors, strict=True):
            np.testing.assert_allclose(value, other_value, rtol=1e-5, atol=1e-6)


def test_what_was_traced_by_name_is_traced_again_once_others_are_active() -> None:
    model = policy(["fr", "de"])
    x, y = data(model)
    trainer = Penalized(model, one(model))
    trainer.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    before = trainer.evaluate(x, y, verbose=0)
    kl.set_adapter(model, ["de", "fr"])
    np.testing.assert_allclose(trainer.evaluate(x, y, verbose=0), before, rtol=1e-5)


REFUSED: dict[str, Callable[[keras.Model], Any]] = {
    "set_adapter": lambda m: kl.set_adapter(m, "de"),
    "apply_lora": lambda m: kl.apply_lora(m, CONFIG, name="it"),
    "delete_adapter": lambda m: kl.delete_adapter(m, "de"),
    "combine_adapters": lambda m: kl.combine_adapters(m, {"fr": 1}, "it"),
    "merge_lora": kl.merge_lora,
    "unload_lora": kl.unload_lora,
    "merged": lambda m: kl.merged(m).__enter__(),
    "save_adapter": lambda m: kl.save_adapter(m, "unwritten", "fr"),
    "load_adapter": lambda m: kl.load_adapter(m, "unread", "it"),
}


def traced(work: Callable[[], Any]) -> Callable[[], Any]:
    """A function that runs `work` while it is traced."""

    def function() -> Any:
        work()
        return ops.zeros(())

    if keras.backend.backend() == "tensorflow":
        return importlib.import_module("tensorflow").function(function)
    return importlib.import_module("jax").jit(function)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch traces nothing")
@pytest.mark.parametrize("verb", REFUSED)
def test_within_a_trace_what_moves_values_is_refused_by_name(verb: str) -> None:
    model = policy("fr")
    before = state(model)
    with pytest.raises(ValueError, match=f"{verb}: expected a call outside compiled functions"):
        traced(partial(REFUSED[verb], model))()
    assert state(model) == before


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch traces nothing")
def test_within_a_trace_adapters_that_wait_or_own_a_head_are_refused() -> None:
    model = policy("fr")
    x, _ = data(model)
    with pytest.raises(ValueError, match="active adapters"):
        traced(partial(one(model), x))()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"], layers_to_save=["head"]), name="it")
    with pytest.raises(ValueError, match="(?s)values of their own for .*head"):
        traced(partial(base(model), x))()
