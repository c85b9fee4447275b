"""What `chunk_logits` refuses, and the private names that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from support.language_models import DIM, LOSS, X, Y, compiled, untied

import keras_lora as kl


class OwnStep(keras.Model):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def ends_in(*layers: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((None, DIM)), keras.layers.Dense(DIM), *layers])


def own_step() -> keras.Model:
    model = untied()
    return OwnStep(model.input, model.output)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "tokens": (lambda: kl.chunk_logits(untied(), 0), "tokens=512"),
    "no head": (lambda: kl.chunk_logits(ends_in(keras.layers.LSTM(5))), "a head, a Dense"),
    "tokens that see each other": (
        lambda: kl.chunk_logits(ends_in(keras.layers.Dense(7), keras.layers.Softmax(axis=1))),
        "depend on other tokens",
    ),
    "no sequence": (
        lambda: kl.chunk_logits(keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)])),
        "logits of 'dense",
    ),
    "activity": (
        lambda: kl.chunk_logits(ends_in(keras.layers.Dense(7, activity_regularizer="l2"))),
        "activity regularizer",
    ),
    "an own step": (lambda: kl.chunk_logits(own_step()), "own compute_loss"),
    "a loss": (lambda: compiled(kl.chunk_logits(untied()), "mse"), "SparseCategoricalCrossentropy"),
    "a loss before": (lambda: kl.chunk_logits(compiled(untied(), "mse")), "Received: loss='mse'"),
    "a metric": (
        lambda: compiled(kl.chunk_logits(untied()), metrics=[keras.metrics.AUC()]),
        "metrics of single tokens",
    ),
    "a metric before": (
        lambda: kl.chunk_logits(compiled(untied(), weighted_metrics=["mse"])),
        "metrics of single tokens",
    ),
    "loss weights": (
        lambda: compiled(kl.chunk_logits(untied()), loss_weights=[2.0]),
        "loss_weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_call_changes_nothing() -> None:
    model = compiled(untied(), "mse")
    before = dict(vars(model))
    with pytest.raises(ValueError, match="SparseCategoricalCrossentropy"):
        kl.chunk_logits(model)
    assert vars(model) == before


def test_the_metrics_of_a_compiled_model() -> None:
    model = compiled(untied(), metrics=["accuracy"], weighted_metrics=["accuracy", "acc"])
    model.evaluate(X, Y, verbose=0)
    given = model._compile_metrics
    assert (given._user_metrics, given._user_weighted_metrics) == (
        ["accuracy"],
        ["accuracy", "acc"],
    )
    assert [len(given._flat_metrics[0].metrics), len(given._flat_weighted_metrics[0].metrics)] == [
        1,
        2,
    ]
    assert given.built
    metric = keras.metrics.SparseTopKCategoricalAccuracy(k=3)
    assert metric._fn is keras.metrics.sparse_top_k_categorical_accuracy
    assert metric._fn_kwargs["k"] == 3
    assert LOSS(axis=1)._fn_kwargs["axis"] == 1


def test_what_is_added_to_a_loss() -> None:
    assert float(keras.Model()._aggregate_additional_loss(np.ones(3, "float32"))) == 3


def test_the_mask_of_a_graph_and_the_key_of_a_slice() -> None:
    tokens = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(7, 5, mask_zero=True)(tokens)
    assert embedded._keras_mask.shape == (None, None)
    part = embedded[:, 2:, :]
    assert getattr(part, "_keras_mask", None) is None
    (node,) = part._keras_history.operation._inbound_nodes
    assert type(node.operation).__name__ == "GetItem"
    key = (slice(None), slice(2, None), slice(None))
    assert node.arguments.args[1] == key
    assert node.arguments.fill_in({id(embedded): 3}) == ((3, key), {})
