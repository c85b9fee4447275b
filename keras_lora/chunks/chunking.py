"""`chunk_logits` and its inverse, and the steps of training that go between them.

Within a step of `fit` or `evaluate` the model's output is not its logits. It is the values of each
token that the loss and the metrics are made of, computed by chunks. Everywhere else the model is as
it was. The methods of a step are attributes of the model object; its class stays, so that files,
copies and exports are those of the plain model.

Private Keras API in this file, and why (`tests/test_chunks_refused.py` watches each):
    `_compile_metrics`, `_user_metrics`, `_user_weighted_metrics`, `_flat_metrics`,
        `_flat_weighted_metrics`: the metrics that `compile` was given, of which the public list
        does not say which are weighted.
    `_aggregate_additional_loss`: how a loss that a layer adds is summed, on several replicas too.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lora.checks import invalid
from keras_lora.chunks.head import Head, head_of
from keras_lora.chunks.loop import by_chunks, tensorflow_variables
from keras_lora.chunks.per_token import (
    Statistic,
    TokenLoss,
    check_metrics,
    loss_of,
    statistic_of,
    update,
)
from keras_lora.inject import refresh, turn
from keras_lora.lowrank.equations import Tensor

_OF_STEPS = ("train_step", "test_step", "compute_loss", "compute_metrics")
_METHODS = (*_OF_STEPS, "call", "compile")
_FUNCTIONS = ("train_function", "test_function")


def chunk_logits(model: keras.Model, tokens: int = 512) -> keras.Model:
    """Train a causal language model without ever having its logits whole in memory.

        loss = sum_i w_i l(y_i, head(h_i)) / n        for `tokens` tokens `i` at a time

    Logits, the loss and their gradients are computed chunk by chunk, one after the other, and each
    chunk once more in the backward pass: at any moment `tokens x vocabulary` logits are alive and
    not `batch x length x vocabulary`. Afterwards `compile`, `fit` and `evaluate` go on as before,
    with the same losses, gradients and metrics up to rounding. `predict`, `generate` and
    `model(x)` give logits as before, and files, exports and copies are those of the plain model.

    Args:
        model: A model whose graph ends in a head: a CausalLM of KerasHub, or one of your own with a
            `Dense`, `EinsumDense` or `ReversibleEmbedding` at the end, adapted or not. A second
            call sets another size.
        tokens: Tokens in a chunk. A chunk takes about `3 x 4 x tokens x vocabulary` bytes.

    Returns:
        `model`.

    Raises:
        ValueError: logits that no such head makes, a loss that is no sparse cross entropy, metrics
            that are no means over tokens, a training step of the model's own. The model is then as
            it was. `compile` raises too, from then on.

    Example:

    >>> import keras, keras_lora as kl
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> embedding = keras.layers.ReversibleEmbedding(17, 5)
    >>> model = keras.Model(tokens, embedding(embedding(tokens), reverse=True))
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> kl.chunk_logits(model, tokens=2).compile("sgd", loss)
    >>> x = keras.ops.ones((3, 4), "int32")
    >>> sorted(model.fit(x, x, verbose=0).history), tuple(model(x).shape)
    (['loss'], (3, 4, 17))

    Reference: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
    https://arxiv.org/abs/1604.06174, applied to the head alone.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, numbers.Integral) or tokens < 1:
        raise invalid("tokens", "a positive number of tokens", tokens, "try tokens=512")
    with turn(model, "chunk_logits") as tree:
        _check_steps(model)
        if getattr(model, "compiled", False):
            _check_compiled(model)
        chunks = _Chunks(model, head_of(tree), int(tokens))
        vars(model).update({name: getattr(chunks, name) for name in _METHODS})
        refresh([model], _FUNCTIONS)
    return model


def unchunk_logits(model: keras.Model) -> keras.Model:
    """Train with whole logits again: the inverse of `chunk_logits`.

    Args:
        model: A model that trains with logits in chunks.

    Returns:
        `model`.

    Raises:
        ValueError: the model trains with whole logits.

    Example:

    >>> import keras, keras_lora as kl
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> embedding = keras.layers.ReversibleEmbedding(17, 5)
    >>> model = keras.Model(tokens, embedding(embedding(tokens), reverse=True))
    >>> kl.unchunk_logits(kl.chunk_logits(model)) is model
    True
    """
    with turn(model, "unchunk_logits"):
        if chunked_tokens(model) is None:
            fix = "call chunk_logits(model) before"
            raise invalid("model", "a model with logits in chunks", model.name, fix)
        for name in _METHODS:
            del vars(model)[name]
        refresh([model], _FUNCTIONS)
    return model


def chunked_tokens(model: keras.Model) -> int | None:
    """The size of the chunks that a model's logits are in; None if they are whole."""
    chunks = _chunks_of(model)
    return None if chunks is None else chunks.tokens


def _chunks_of(model: keras.Model) -> _Chunks | None:
    owner = getattr(vars(model).get("train_step"), "__self__", None)
    return owner if isinstance(owner, _Chunks) else None


def _check_steps(model: keras.Model) -> None:
    ours = _METHODS if _chunks_of(model) is not None else ()
    other = [n for n in _OF_STEPS if getattr(type(model), n) is not getattr(keras.Model, n)]
    other += [n for n in _METHODS if n in vars(model) and n not in ours]
    if other:
        received = f"{type(model).__name__} with its own {', '.join(other)}, which may need logits"
        raise invalid("model", "a model that trains by Keras's steps", received)


def _check_compiled(model: keras.Model) -> None:
    loss_of(model.loss)
    given = model._compile_metrics
    if given is not None:
        check_metrics([given._user_metrics, given._user_weighted_metrics])
    _check_loss_weights(model.get_compile_config()["loss_weights"])


def _check_loss_weights(given: Any) -> None:
    if given is not None:
        raise invalid("loss_weights", "None, since there is one loss", given)


@dataclass(frozen=True)
class _Step:
    """A step of a model.

    Attributes:
        model: The model.
        targets: Token ids `(batch x tokens,)`.
        loss: The loss.
        statistics: What is computed of each token: for the loss first, then for metrics.
        trained: The head's variables that train, as TensorFlow's; empty on other backends.
    """

    model: keras.Model
    targets: Tensor
    loss: TokenLoss
    statistics: Sequence[Statistic]
    trained: Sequence[Any]

    def found(self, statistic: Statistic, y_pred: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The values of a statistic and the mask, both `(batch, tokens)`, in a model's output."""
        count = len(self.statistics)
        mask = y_pred[count] if len(y_pred) > count else None
        return y_pred[self.statistics.index(statistic)], mask


# The step that this thread is in.
_STEP: ContextVar[_Step | None] = ContextVar("step", default=None)


@dataclass(frozen=True, eq=False)
class _Chunks:
    """The methods of a model with logits in chunks."""

    model: keras.Model
    head: Head
    tokens: int

    def train_step(self, *args: Any) -> Any:
        return self._step("train_step", args)

    def test_step(self, *args: Any) -> Any:
        return self._step("test_step", args)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As in Keras, once loss and metrics are known to be of single tokens."""
        given = inspect.signature(type(self.model).compile).bind(self.model, *args, **kwargs)
        options = {k: v for k, v in given.arguments.items() if v is not None}
        options |= options.pop("kwargs", {})
        if options.get("loss", "auto") != "auto":
            loss_of(options["loss"])
        for name in ("metrics", "weighted_metrics"):
            if options.get(name, "auto") != "auto":
                check_metrics(options[name])
        _check_loss_weights(options.get("loss_weights"))
        type(self.model).compile(self.model, *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """In a step of this model the values of each token; logits otherwise."""
        step = _STEP.get()
        if step is None or step.model is not self.model:
            return type(self.model).call(self.model, inputs, training=training, mask=mask)
        states = self.head.states(inputs, training=training, mask=mask)
        hidden, *masks = keras.tree.flatten(states)
        return [*self._values(step, hidden, training), *masks]

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        step = _STEP.get()
        if step is None or step.model is not self.model:
            return type(self.model).compute_loss(self.model, x, y, y_pred, sample_weight, training)
        own = step.loss.of(y, *step.found(step.loss.statistic, y_pred), sample_weight)
        others = [self.model._aggregate_additional_loss(loss) for loss in self.model.losses]
        return sum(others, start=ops.cast(own, keras.config.floatx()))

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        step = _STEP.get()
        if step is None or step.model is not self.model:
            return type(self.model).compute_metrics(self.model, x, y, y_pred, sample_weight)
        for metric, weighted in self._metrics():
            found = step.found(statistic_of(metric), y_pred)
            update(metric, y, *found, sample_weight if weighted else None)
        return self.model.get_metrics_result()

    def _step(self, name: str, args: Any) -> Any:
        _, y, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
        loss = loss_of(self.model.loss)
        targets = ops.reshape(y, (-1,))
        self._build_metrics(y)
        metrics = [statistic_of(metric) for metric, _ in self._metrics()]
        statistics = list(dict.fromkeys([loss.statistic, *metrics]))
        trained = tensorflow_variables(self.head.layer.trainable_variables)
        token = _STEP.set(_Step(self.model, targets, loss, statistics, trained))
        try:
            return getattr(type(self.model), name)(self.model, *args)
        finally:
            _STEP.reset(token)

    def _values(self, step: _Step, hidden: Tensor, training: bool | None) -> list[Tensor]:
        """The values of each statistic, `(batch, tokens)`."""
        with self.head.repeatable(training) as computations:

            def per_token(states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
                logits = ops.cast(self.head(states, computations), step.loss.dtype)
                found = [s.of(targets[None], logits)[0] for s in step.statistics]
                return found[0], *map(ops.stop_gradient, found[1:])

            flat = ops.reshape(hidden, (-1, hidden.shape[-1]))
            values = by_chunks(per_token, flat, step.targets, self.tokens, step.trained)
        return [ops.reshape(x, ops.shape(hidden)[:-1]) for x in values]

    def _build_metrics(self, y: Any) -> None:
        metrics = self.model._compile_metrics
        if metrics is not None and not metrics.built:
            metrics.build(y, keras.KerasTensor(self.model.output_shape))

    def _metrics(self) -> Iterator[tuple[keras.metrics.Metric, bool]]:
        """The metrics that `compile` was given, and whether each is weighted."""
        given = self.model._compile_metrics
        if given is not None:
            for flat, weighted in (
                (given._flat_metrics, False),
                (given._flat_weighted_metrics, True),
            ):
                yield from ((m, weighted) for one in flat if one for m in one.metrics)
