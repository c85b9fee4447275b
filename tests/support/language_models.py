"""Small language models, of each form of head, and their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_lora as kl
from support.cases import numpy_of
from support.models import randomize_adapters

VOCABULARY, DIM, BATCH, LENGTH, CHUNK = 61, 5, 3, 7, 4
RNG = np.random.default_rng(2)
X = RNG.integers(1, VOCABULARY, (BATCH, LENGTH))
Y = RNG.integers(0, VOCABULARY, (BATCH, LENGTH))
WEIGHTS = RNG.integers(0, 2, (BATCH, LENGTH)).astype("float32")
LOSS = keras.losses.SparseCategoricalCrossentropy


def tied(cap: float | None = None, **options: Any) -> keras.Model:
    tokens = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY, DIM, logit_soft_cap=cap, name="tokens", **options
    )
    x = keras.layers.Dense(DIM, activation="tanh", name="up", **options)(embedding(tokens))
    return keras.Model(tokens, embedding(x, reverse=True), name="tied")


def untied(mask: bool = False, bias: bool = True, **options: Any) -> keras.Model:
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, DIM, mask_zero=mask, name="tokens", **options)(tokens)
    x = keras.layers.Dense(DIM, activation="tanh", name="up", **options)(x)
    x = keras.layers.Dense(VOCABULARY, use_bias=bias, name="head", **options)(x)
    return keras.Model(tokens, keras.layers.Activation("linear", dtype="float32")(x), name="untied")


def capped() -> keras.Model:
    """As Gemma 4: the cap comes after the layer, and only the last tokens have logits."""
    tokens = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(VOCABULARY, DIM, name="tokens")
    logits = embedding(embedding(tokens), reverse=True)
    return keras.Model(tokens, (ops.tanh(logits / 3.0) * 3.0)[:, 2:, :], name="capped")


def adapted(make: Callable[..., keras.Model], **options: Any) -> Callable[[], keras.Model]:
    def made() -> keras.Model:
        model = make()
        kl.apply_lora(model, kl.LoRAConfig(rank=2, **{"targets": "all", **options}))
        randomize_adapters(model)
        return model

    return made


def einsum() -> keras.Model:
    """Made for one length."""
    states = keras.Input((LENGTH, DIM))
    head = keras.layers.EinsumDense("btd,dv->btv", (None, VOCABULARY), bias_axes="v", name="head")
    return keras.Model(states, head(keras.layers.LayerNormalization()(states)))


HEADS: dict[str, Callable[[], keras.Model]] = {
    "tied": tied,
    "a cap in the layer": lambda: tied(3.0),
    "a cap after the layer, and a part of the tokens": capped,
    "untied": untied,
    "without bias, with a mask": lambda: untied(mask=True, bias=False),
    "einsum": einsum,
    "tied, adapted": adapted(lambda: tied(3.0)),
    "tied, the adapters elsewhere": adapted(tied, targets=["up"]),
    "untied, DoRA and dropout": adapted(
        untied, targets=["up", "head"], use_dora=True, dropout=0.5, bias="lora_only"
    ),
    "the head saved with the adapter": adapted(untied, targets=["up"], layers_to_save=["head"]),
}


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {f"{i} {v.name}": numpy_of(v) for i, v in enumerate(model.weights)}


def compiled(model: keras.Model, loss: Any = None, **options: Any) -> keras.Model:
    given = {"run_eagerly": True, **options}
    model.compile(keras.optimizers.SGD(0.5), loss or LOSS(from_logits=True), **given)
    return model


def trained(
    make: Callable[[], keras.Model], tokens: int | None, /, *, steps: int = 1, **options: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """What a step reports, and what each variable is then."""
    keras.utils.set_random_seed(3)
    model = make()
    x = X if model.inputs[0].dtype == "int32" else np.random.default_rng(1).normal(size=(3, 7, DIM))
    if tokens is not None:
        kl.chunk_logits(model, tokens)
    compiled(model, **options)
    y, weights = (v[:, -model(x).shape[1] :] for v in (Y, WEIGHTS))
    for _ in range(steps):
        logs = model.train_on_batch(x, y, weights, return_dict=True)
    return logs, values(model)


def check_same(received: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(received, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_allclose(
                ours[key], value, rtol=tolerance, atol=tolerance, err_msg=key
            )
