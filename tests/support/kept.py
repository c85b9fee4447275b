"""What a backward pass keeps of the forward pass, in bytes, without timing and on each backend."""

from __future__ import annotations

import importlib
import math
from typing import Any

import keras
import numpy as np


def kept_bytes(model: keras.Model, x: np.ndarray) -> int:
    """The bytes that the gradient of a model's outputs in its trainable variables needs."""
    kept = {"tensorflow": _in_a_graph, "jax": _residuals, "torch": _saved}
    return kept[keras.backend.backend()](model, x)


def _in_a_graph(model: keras.Model, x: np.ndarray) -> int:
    """Of the tensors that the operations of the gradient take from those before them."""
    tf = importlib.import_module("tensorflow")
    count = 0

    @tf.function
    def gradient(x: Any) -> Any:
        nonlocal count
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        count = len(tf.compat.v1.get_default_graph().get_operations())
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    operations = gradient.get_concrete_function(tf.constant(x)).graph.get_operations()
    before = set(operations[:count])
    taken = {t.ref(): t for op in operations[count:] for t in op.inputs if t.op in before}
    return sum(math.prod(t.shape) * t.dtype.size for t in taken.values() if t.shape.rank)


def _residuals(model: keras.Model, x: np.ndarray) -> int:
    jax = importlib.import_module("jax")
    others = [v.value for v in model.non_trainable_variables]

    def outputs(values: Any) -> Any:
        return model.stateless_call(values, others, x, training=True)[0]

    _, backward = jax.vjp(outputs, [v.value for v in model.trainable_variables])
    return sum(np.size(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def _saved(model: keras.Model, x: np.ndarray) -> int:
    torch = importlib.import_module("torch")
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(x, training=True)
    del outputs
    return sum(kept.values())
