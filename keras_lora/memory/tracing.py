"""A training step of a twin, traced for one shape of batch and never run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_lora.chunks import chunked_tokens
from keras_lora.memory.liveness import Alive, peak_of
from keras_lora.memory.twin import nowhere

LOGITS, GRADIENTS, ACTIVATIONS = "logits", "gradients", "activations"


@dataclass
class _Noted:
    """Tensors of the step that is being traced.

    Attributes:
        gradients: The gradients of the variables that train.
        outputs: What the loss is computed of; none where logits are in chunks.
    """

    gradients: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


def step_memory(tf: Any, graph: Any, twin: keras.Model, inputs: Any, targets: Any) -> Alive:
    """The moment of a training step at which most is alive, apart from values of variables.

    Args:
        tf: TensorFlow.
        graph: The graph of the twin.
        twin: A compiled model without values.
        inputs: Shapes and dtypes of the inputs, as `tf.TensorSpec`.
        targets: The same of the targets.
    """
    noted = _Noted()

    def step(x: Any, y: Any) -> Any:
        with _noting(twin, noted):
            twin.train_step((x, y))

    with nowhere(graph):
        function = tf.function(step, autograph=False)
        traced = function.get_concrete_function(inputs, targets).graph
    kinds = _Kinds(traced, noted)
    inner = ACTIVATIONS if chunked_tokens(twin) is None else LOGITS
    return peak_of(traced, traced.outputs, kinds.of, inner)


class _noting:  # noqa: N801  (a context)
    """Within it a model's step notes its outputs and its gradients."""

    def __init__(self, twin: keras.Model, noted: _Noted) -> None:
        self._twin, self._noted = twin, noted

    def __enter__(self) -> None:
        twin, noted = self._twin, self._noted
        loss, apply = twin.compute_loss, twin.optimizer.apply

        def compute_loss(x: Any, y: Any, y_pred: Any, *others: Any, **options: Any) -> Any:
            if chunked_tokens(twin) is None:
                noted.outputs += keras.tree.flatten(y_pred)
            return loss(x, y, y_pred, *others, **options)

        def applied(gradients: Sequence[Any], variables: Any = None) -> Any:
            noted.gradients += [g for g in gradients if g is not None]
            return apply(gradients, variables)

        self._before = vars(twin).get("compute_loss")
        vars(twin)["compute_loss"] = compute_loss
        vars(twin.optimizer)["apply"] = applied

    def __exit__(self, *_: Any) -> None:
        del vars(self._twin.optimizer)["apply"]
        del vars(self._twin)["compute_loss"]
        if self._before is not None:
            vars(self._twin)["compute_loss"] = self._before


class _Kinds:
    """What the tensors of a traced step are."""

    def __init__(self, graph: Any, noted: _Noted) -> None:
        order = {id(t): i for i, op in enumerate(graph.get_operations()) for t in op.outputs}
        self._order = order
        self._gradients = {id(t) for g in noted.gradients for t in _sources(g)}
        outputs = [t for t in noted.outputs if t.shape.rank]
        self._widths = {t.shape[-1] for t in outputs}
        firsts = [order[id(s)] for t in outputs for s in _sources(t)]
        self._first = min(firsts, default=0)

    def of(self, tensor: Any) -> str:
        if id(tensor) in self._gradients:
            return GRADIENTS
        shape = tensor.shape
        late = self._order.get(id(tensor), -1) >= self._first
        wide = shape.rank and shape.rank > 1 and shape[-1] in self._widths
        return LOGITS if late and wide else ACTIVATIONS


def _sources(tensor: Any) -> list[Any]:
    """A tensor and those that it is a view of."""
    found = [tensor]
    while found[-1].op.type in ("Reshape", "Identity", "ExpandDims") and found[-1].op.inputs:
        found.append(found[-1].op.inputs[0])
    return found
