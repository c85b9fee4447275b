"""A causal language model in two: what makes hidden states, and what makes logits of them.

Private Keras API in this file, and why (`tests/test_chunks_refused.py` watches each):
    `_keras_history`, `_inbound_nodes`: the only way from a model's outputs back to the layer
        that made them.
    `_keras_mask`: the mask that a graph has for its logits.

A node's `arguments.fill_in` is how a graph of Keras is computed. `keras.Function` would want the
length that the graph was made for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.inject import are_without_values
from keras_lora.layers import LoRALayer, family_of, plain_class, supported_base
from keras_lora.layers.computation import computing
from keras_lora.lowrank.equations import Tensor
from keras_lora.walker import Layer, Tree, is_backbone

_TOKENS, _PART = 5, 2  # of the trial


@dataclass(frozen=True)
class Logits:
    """From hidden states to logits, for any number of tokens: nodes of a graph and their inputs."""

    steps: Sequence[tuple[Any, Any]]

    def __call__(self, x: Tensor) -> Tensor:
        for node, tensor in self.steps:
            args, kwargs = node.arguments.fill_in({id(tensor): x})
            x = node.operation(*args, **kwargs)
        return x


@dataclass(frozen=True)
class Head:
    """How a model makes logits.

    Attributes:
        states: The model up to its hidden states `(batch, tokens, width)` and, if its logits have a
            mask, that mask `(batch, tokens)`.
        logits: From hidden states to logits, token by token.
        layer: The layer that multiplies by the matrix.
    """

    states: keras.Model
    logits: Logits
    layer: Layer

    @contextlib.contextmanager
    def repeatable(self, training: bool | None) -> Iterator[dict[Any, Any]]:
        """What the layer's adapters compute with, the same in each pass: dropout is drawn once."""
        banks = self.layer.banks.values() if isinstance(self.layer, LoRALayer) else ()
        yield {bank: bank.computation.repeatable(training) for bank in banks}

    def __call__(self, hidden: Tensor, computations: dict[Any, Any]) -> Tensor:
        """From hidden states `(n, d)` to logits `(n, vocabulary)`."""
        with computing(computations):
            return self.logits(hidden[None])


def head_of(tree: Tree) -> Head:
    """
    Raises:
        ValueError: a model whose logits are not made token by token by a head at its end.
    """
    model = tree.root
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if len(outputs) != 1:
        _refuse(model, f"{len(outputs)} outputs of a graph of layers")
    (output,) = outputs
    logits, cut = _traced(model, output)
    (node, hidden), *_ = logits.steps
    (sequential,) = model.inputs if isinstance(model, keras.Sequential) else (None,)
    inputs = model.input if sequential is None else sequential
    mask = getattr(output, "_keras_mask", None)
    outputs = [hidden if cut is None else hidden[cut], *([] if mask is None else [mask])]
    states = keras.Model(inputs, outputs)
    if len(outputs[0].shape) != 3 or not _is_token_by_token(logits, hidden):
        _refuse(model, f"'{node.operation.name}', of which a token's logits depend on other tokens")
    return Head(states, logits, node.operation)


def _traced(model: keras.Model, output: Any) -> tuple[Logits, Any]:
    """Back from the output through operations without variables to the layer that is the head.

    Returns:
        The head and what follows it, and the key of a slice that ends the graph, or None.
    """
    steps: list[tuple[Any, Any]] = []
    cut, tensor = None, output
    while True:
        history = tensor._keras_history
        operation = history.operation
        nodes = operation._inbound_nodes
        node: Any = nodes[history.node_index] if nodes else None
        inputs: Any = node.input_tensors if nodes else ()
        if len(inputs) != 1:
            _refuse(model, f"logits that '{operation.name}' makes of {len(inputs)} inputs")
        (tensor,) = inputs
        if type(operation).__name__ == "GetItem" and not steps and cut is None:
            # Logits of a part of the tokens, as in PaliGemma: those of the part's hidden states.
            cut = node.arguments.args[1]
            continue
        steps.insert(0, (node, tensor))
        if isinstance(operation, keras.layers.Layer) and operation.variables:
            _check_head(model, operation, tensor)
            return Logits(steps), cut


def _check_head(model: keras.Model, layer: Layer, hidden: Any) -> None:
    known = supported_base(plain_class(layer)) and family_of(layer) in ("linear", "embedding")
    if is_backbone(layer) or not known or len(hidden.shape) != 3:
        _refuse(model, f"logits of '{layer.name}', a {type(layer).__name__}")
    if not keras.backend.is_float_dtype(hidden.dtype):
        _refuse(model, f"logits of '{layer.name}', whose input is no hidden state")
    if layer.activity_regularizer is not None:
        _refuse(model, f"'{layer.name}' with an activity regularizer, which needs all logits")


def _refuse(model: Any, received: str) -> NoReturn:
    raise invalid(
        "model",
        "a graph of layers that ends in a head, a Dense, EinsumDense or ReversibleEmbedding of "
        "hidden states (batch, tokens, width)",
        f"{type(model).__name__} '{model.name}' with {received}",
        "train it with whole logits",
    )


def _is_token_by_token(logits: Logits, hidden: Any) -> bool:
    """Whether logits of a few tokens are the same with and without the other tokens."""
    if are_without_values():
        return True  # which a model with values is asked
    width = (1, _TOKENS, hidden.shape[-1])
    x = ops.cast(np.random.default_rng(0).normal(size=width), hidden.dtype)
    try:
        whole = logits(x)
        parts = ops.concatenate([logits(x[:, :_PART]), logits(x[:, _PART:])], axis=1)
    except Exception:  # an operation may be made for one length
        return False
    if len(whole.shape) != 3 or whole.shape[1] != _TOKENS:
        return False
    difference, scale = (ops.max(ops.abs(ops.cast(v, "float32"))) for v in (whole - parts, whole))
    return bool(difference <= 0.02 * scale)
