"""The promises of adapting that hold for every model, as one check."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_lora as kl
from keras_lora.walker import walk
from support.cases import numpy_of, randomize, snapshot

Targets = str | list[str]


# --- What holds for every model -----------------------------------------------------------------


def check_adapting(
    model: keras.Model,
    inputs: Any,
    targets: Targets = "all-linear",
    rounding: float = 1e-6,
    training: bool = True,
) -> Any:
    """Adapt, train a step, give A and B random values, merge. Returns the merged model's outputs.

    `training=False` takes the step in inference mode.
    """
    # One flag differs from the others, so that restoring all flags is tested.
    next(layer for layer in model.layers if layer.weights).trainable = False
    flags, base = trainable_flags(model), model(inputs, training=False)

    kl.apply_lora(model, kl.LoRAConfig(rank=2, alpha=4, targets=targets))
    assert difference(model(inputs, training=False), base) <= rounding
    check_step(model, inputs, training)

    banks = [b for layer in kl.lora_layers(model).values() for b in layer.banks.values()]
    randomize(f for b in banks for adapter in b.adapters.values() for f in adapter.factors)
    adapted = model(inputs, training=False)
    assert difference(adapted, base) >= 1e-3

    assert kl.merge_lora(model) is model
    merged = model(inputs, training=False)
    assert difference(merged, adapted) <= 1e-4
    assert kl.lora_layers(model) == {}
    assert trainable_flags(model) == flags
    return merged


def check_step(model: keras.Model, inputs: Any, training: bool) -> None:
    """After a step of gradient descent only the adapters have changed."""
    slots = [slot for layer in kl.lora_layers(model).values() for slot in layer.slots]
    factors = {id(v) for slot in slots for v in slot.factors}
    assert {id(v) for v in model.trainable_variables} == factors
    others = [v for v in model.weights if id(v) not in factors]
    zeros = [next(v for v in slot.factors if not np.any(numpy_of(v))) for slot in slots]
    before, gradients = snapshot(others), step(model, inputs, training)
    assert snapshot(others) == before

    moved = [bool(np.any(numpy_of(v))) for v in zeros]
    pulled = [bool(np.any(gradients.get(id(v), 0))) for v in zeros]
    assert moved == pulled
    # Half of them is enough: in some random backbones some layers do not reach an output.
    assert 2 * sum(moved) >= len(moved)


def step(model: keras.Model, inputs: Any, training: bool) -> dict[int, np.ndarray]:
    """One step of SGD. Returns the gradients that there are, by the id of their variable."""
    with tf.GradientTape() as tape:
        loss = sum(weighted_square(y) for y in floating(model(inputs, training=training)))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    pairs = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
    keras.optimizers.SGD(0.1).apply_gradients(pairs)
    return {id(v): numpy_of(tf.convert_to_tensor(g)) for g, v in pairs}


def weighted_square(y: Any) -> Any:
    """A weighted sum of squares. An unweighted one of a normalised output would be constant."""
    flat = ops.reshape(y, (-1,))
    return ops.sum((1 + ops.arange(flat.shape[0], dtype=flat.dtype) / flat.shape[0]) * flat**2)


def floating(outputs: Any) -> list[Any]:
    leaves = keras.tree.flatten(outputs)
    return [y for y in leaves if "float" in keras.backend.standardize_dtype(y.dtype)]


def difference(received: Any, expected: Any) -> float:
    """The largest difference over all outputs, each relative to its largest value."""
    pairs = zip(keras.tree.flatten(received), keras.tree.flatten(expected), strict=True)
    return max(_difference(numpy_of(r), numpy_of(e)) for r, e in pairs)


def _difference(received: np.ndarray, expected: np.ndarray) -> float:
    assert received.shape == expected.shape
    assert np.isfinite(received).all()
    return float(np.abs(received - expected).max() / max(np.abs(expected).max(), 1e-9))


def trainable_flags(model: keras.Model) -> list[bool]:
    return [x.trainable for x in (*model.variables, *(node.layer for node in walk(model)))]


def projections(*prefixes: str) -> list[str]:
    names = ("query", "key", "value", "attention_output")
    return [f"{prefix}/{name}" for prefix in prefixes for name in names]


def paths(model: keras.Model, targets: Targets = "all-linear") -> list[str]:
    return [target.path for target in kl.find_targets(model, targets)]
