"""Logits in chunks: equal to whole ones, and never whole in what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from support.cases import numpy_of
from support.language_models import (
    BATCH,
    CHUNK,
    HEADS,
    LENGTH,
    LOSS,
    VOCABULARY,
    WEIGHTS,
    X,
    Y,
    adapted,
    check_same,
    compiled,
    tied,
    trained,
    untied,
    values,
)
from support.models import randomize_adapters
from support.shapes import graph_of_a_step, operations_before, shapes_of_a_step

import keras_lora as kl
from keras_lora.chunks import chunked_tokens

BACKEND = keras.backend.backend()
NOT_ON_TORCH = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras's masked losses change weights in place, before the metrics"
)


@pytest.mark.parametrize("name", HEADS)
def test_a_step_is_that_of_whole_logits(name: str) -> None:
    """With dropout in the head a single chunk draws what the whole does."""
    tokens = BATCH * LENGTH if "dropout" in name else CHUNK
    check_same(trained(HEADS[name], tokens), trained(HEADS[name], None))


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_float16"])
def test_a_step_in_another_dtype(dtype: str) -> None:
    """Loss scaling too, by Keras's default for mixed float16."""
    tolerance = {"mixed_float16": 4e-3, "bfloat16": 3e-2}[dtype]

    def make() -> keras.Model:
        with_policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(dtype)
        try:
            return adapted(tied)()
        finally:
            keras.config.set_dtype_policy(with_policy)

    check_same(trained(make, CHUNK), trained(make, None), tolerance)


@pytest.mark.parametrize(
    "jit",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(BACKEND == "torch", reason="the same code")),
    ],
)
def test_a_compiled_step(jit: bool) -> None:
    options = {"run_eagerly": False, "jit_compile": jit, "steps": 2}
    make = adapted(untied)
    check_same(trained(make, CHUNK, **options), trained(make, None, **options))


def test_the_loss_is_that_of_float64() -> None:
    logs, _ = trained(untied, CHUNK)
    keras.utils.set_random_seed(3)
    logits = numpy_of(untied()(X)).astype("float64")
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = -np.log(np.take_along_axis(p, Y[..., None], -1)[..., 0])
    np.testing.assert_allclose(logs["loss"], (losses * WEIGHTS).mean(), rtol=1e-6)


METRICS: dict[str, Callable[[], Any]] = {
    "a string": lambda: "accuracy",
    "a function": lambda: keras.metrics.sparse_top_k_categorical_accuracy,
    "accuracy": keras.metrics.SparseCategoricalAccuracy,
    "top k": lambda: keras.metrics.SparseTopKCategoricalAccuracy(k=20),
    "cross entropy": lambda: keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
    "perplexity": lambda: keras_hub.metrics.Perplexity(from_logits=True),
    "a mask": lambda: keras_hub.metrics.Perplexity(from_logits=True, mask_token_id=int(Y[0, 0])),
}


@pytest.mark.parametrize("mask", [False, pytest.param(True, marks=NOT_ON_TORCH)])
def test_metrics_are_those_of_whole_logits(mask: bool) -> None:
    results = []
    for chunks in (False, True):
        keras.utils.set_random_seed(3)
        model = untied(mask)
        if chunks:
            kl.chunk_logits(model, CHUNK)
        metrics, weighted = ([make() for make in METRICS.values()] for _ in range(2))
        compiled(model, metrics=metrics, weighted_metrics=weighted)
        x = np.where(X % 3 == 0, 0, X)
        results.append(model.evaluate(x, Y, 2, 0, WEIGHTS, return_dict=True))
    assert len(results[0]) == 1 + 2 * len(METRICS)
    check_same(results[1:], results[:1])


LOSSES: dict[str, Any] = {
    "a string": "sparse_categorical_crossentropy",
    "in a list": [LOSS(from_logits=True)],
    "ignored targets": LOSS(from_logits=True, ignore_class=int(Y[0, 0]), reduction="mean"),
    "a sum": LOSS(from_logits=True, reduction="sum"),
    "weights in the mean": LOSS(from_logits=True, reduction="mean_with_sample_weight"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_with_another_form_of_the_loss(name: str) -> None:
    def make() -> keras.Model:
        if name != "a string":
            return untied(mask=True)
        model = untied()
        return keras.Model(model.input, keras.layers.Softmax()(model.output))

    options = {"loss": LOSSES[name]}
    check_same(trained(make, CHUNK, **options), trained(make, None, **options), 2e-5)


def test_losses_of_layers_are_added() -> None:
    def make() -> keras.Model:
        model = untied()
        model.get_layer("up").kernel_regularizer = keras.regularizers.L2(0.1)
        return model

    check_same(trained(make, CHUNK), trained(make, None))


def test_fit_with_accumulation_and_several_steps() -> None:
    """The last batch is smaller, the targets have an axis of one, and the model is compiled."""
    found = []
    for chunks in (False, True):
        keras.utils.set_random_seed(3)
        model = untied()
        optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
        steps = 1 if BACKEND == "torch" else 2  # Keras has one there
        model.compile(optimizer, LOSS(from_logits=True), steps_per_execution=steps)
        if chunks:
            kl.chunk_logits(model, CHUNK)
        history = model.fit(X, Y[..., None], 2, 2, 0, shuffle=False).history
        found.append(({"loss": history["loss"]}, values(model)))
    check_same(found[1], found[0], 1e-4)


def test_the_model_gives_logits_and_is_saved_as_it_was(tmp_path: Any) -> None:
    model = compiled(kl.chunk_logits(untied(), CHUNK), metrics=["accuracy"])
    expected = numpy_of(model(X))
    assert expected.shape == (BATCH, LENGTH, VOCABULARY)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is type(model) is type(untied())
    assert chunked_tokens(again) is None
    np.testing.assert_allclose(numpy_of(again(X)), model.predict(X, verbose=0), atol=1e-6)
    np.testing.assert_allclose(
        again.evaluate(X, Y, verbose=0), model.evaluate(X, Y, verbose=0), rtol=1e-5
    )


def test_adapters_come_and_go() -> None:
    """Adapted, trained and merged with chunks: as without them."""
    found = []
    for chunks in (False, True):
        keras.utils.set_random_seed(3)
        model = compiled(kl.chunk_logits(tied(), CHUNK) if chunks else tied())
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets="all"))
        randomize_adapters(model)
        compiled(model)
        model.train_on_batch(X, Y)
        kl.merge_lora(model)
        compiled(model)
        model.train_on_batch(X, Y)
        assert chunked_tokens(model) == (CHUNK if chunks else None)
        found.append(values(model))
    check_same(found[1:], found[:1])


def test_the_inverse_leaves_the_model_as_it_was() -> None:
    model = compiled(untied())
    before = dict(vars(model))
    kl.chunk_logits(model, 5)
    kl.chunk_logits(model, CHUNK)
    assert chunked_tokens(model) == CHUNK
    kl.unchunk_logits(model)
    assert vars(model).keys() == before.keys()
    with pytest.raises(ValueError, match="a model with logits in chunks"):
        kl.unchunk_logits(model)


def test_pickles_and_copies_train_with_whole_logits() -> None:
    copy = kl.apply_lora(kl.chunk_logits(untied()), kl.LoRAConfig(rank=2), inplace=False)
    assert chunked_tokens(copy) is None


@pytest.mark.parametrize("make", [adapted(tied), untied], ids=["adapted", "full"])
def test_no_logits_are_whole(make: Callable[[], keras.Model]) -> None:
    whole = BATCH * LENGTH * VOCABULARY
    for tokens, found in ((None, True), (CHUNK, False)):
        model = compiled(make(), run_eagerly=False, metrics=["accuracy"])
        if tokens is not None:
            kl.chunk_logits(model, tokens)
        model.train_on_batch(X, Y)
        sizes = [int(np.prod(s)) for s in shapes_of_a_step(model, X, Y) if VOCABULARY in s]
        assert (max(sizes) >= whole) is found, sizes
        assert max(sizes) >= min(tokens or LENGTH, LENGTH) * VOCABULARY


@pytest.mark.skipif(BACKEND != "tensorflow", reason="loops of TensorFlow's graphs")
def test_chunks_come_one_after_the_other() -> None:
    model = kl.chunk_logits(compiled(adapted(tied)(), run_eagerly=False), CHUNK)
    model.train_on_batch(X, Y)
    operations = graph_of_a_step(model, X, Y).get_operations()
    loops = [op for op in operations if op.type in ("While", "StatelessWhile")]
    assert [op.get_attr("parallel_iterations") for op in loops] == [1, 1]
    values, gradients = loops
    assert values in operations_before(gradients)
