"""The losses and metrics of Keras that are sums of values of tokens, and so need no whole logits.

Private Keras API in this file, and why (`tests/test_chunks_refused.py` watches each):
    `_fn`, `_fn_kwargs`: the function of a metric that is the mean of a function's values, and the
        axis of a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_lora.checks import invalid
from keras_lora.lowrank.equations import Tensor

_CROSS_ENTROPY = keras.losses.sparse_categorical_crossentropy
_FUNCTIONS = (
    keras.metrics.sparse_categorical_accuracy,
    keras.metrics.sparse_top_k_categorical_accuracy,
    _CROSS_ENTROPY,
)
_MEANS = (
    keras.metrics.MeanMetricWrapper,
    keras.metrics.SparseCategoricalAccuracy,
    keras.metrics.SparseTopKCategoricalAccuracy,
    keras.metrics.SparseCategoricalCrossentropy,
)
_PERPLEXITY = "keras_hub.src.metrics.perplexity.Perplexity"
_LOSS = "SparseCategoricalCrossentropy(from_logits=True), the loss of causal language models"
_METRICS = (
    "metrics of single tokens: SparseCategoricalAccuracy, SparseTopKCategoricalAccuracy, "
    "SparseCategoricalCrossentropy or keras_hub.metrics.Perplexity"
)


@dataclass(frozen=True)
class Statistic:
    """A value of each token: a function of targets and logits with its options."""

    function: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...] = ()

    def of(self, targets: Tensor, logits: Tensor) -> Tensor:
        """From targets `(n,)` and logits `(n, vocabulary)` to `(n,)`."""
        return self.function(targets, logits, **dict(self.options))


class TokenLoss(keras.losses.Loss):
    """Sums values of tokens as a loss of Keras does: weights, masks, reduction, replicas."""

    def __init__(self, loss: keras.losses.SparseCategoricalCrossentropy) -> None:
        super().__init__(loss.name, loss.reduction, loss.dtype)
        options = {"from_logits": loss.from_logits, "ignore_class": loss.ignore_class}
        self.ignored = loss.ignore_class
        self.statistic = Statistic(_CROSS_ENTROPY, _options(options))

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:  # noqa: ARG002
        return y_pred

    def of(self, y: Tensor, values: Tensor, mask: Tensor | None, weights: Any) -> Tensor:
        """The loss of targets `y` whose values `(batch, tokens)` the statistic has found."""
        if self.ignored is not None:
            valid = ops.not_equal(_flat_as(y, values), self.ignored)
            mask = valid if mask is None else ops.logical_and(mask, valid)
        if mask is not None and self.reduction in ("mean", "sum_over_batch_size"):
            count = ops.sum(ops.cast(mask, self.dtype))
            size = ops.cast(ops.size(mask), self.dtype)
            mask = ops.cast(mask, self.dtype) * ops.divide_no_nan(size, count)
        return self(y, values, _masked(weights, mask, self.dtype))


def loss_of(given: Any) -> TokenLoss:
    """
    Raises:
        ValueError: another loss than the sparse cross entropy over the last axis.
    """
    one, *others = keras.tree.flatten(given) or [None]
    names = ("crossentropy", "ce")  # by which Keras means this loss if targets are token ids
    loss = _CROSS_ENTROPY if one in names else one and keras.losses.get(one)
    if loss is _CROSS_ENTROPY:
        loss = keras.losses.SparseCategoricalCrossentropy()
    known = type(loss) is keras.losses.SparseCategoricalCrossentropy
    if others or not known or loss._fn_kwargs.get("axis", -1) != -1:
        raise invalid("loss", _LOSS, given, "compile with it, or call unchunk_logits(model) before")
    return TokenLoss(loss)


def check_metrics(given: Any) -> None:
    """
    Raises:
        ValueError: a metric that is no mean over tokens.
    """
    for one in keras.tree.flatten(given):
        if one not in (None, "accuracy", "acc"):
            metric = keras.metrics.get(one)
            whole = isinstance(metric, keras.metrics.Metric)
            statistic_of(metric if whole else keras.metrics.MeanMetricWrapper(metric))


def statistic_of(metric: keras.metrics.Metric) -> Statistic:
    """What a metric needs to know of each token.

    Raises:
        ValueError: a metric that is no mean over tokens.
    """
    if is_perplexity(metric):
        options = {"from_logits": metric.from_logits, "ignore_class": None}
        return Statistic(_CROSS_ENTROPY, _options(options))
    if type(metric) not in _MEANS or metric._fn not in _FUNCTIONS:
        fix = "leave it out, or call unchunk_logits(model) before"
        raise invalid("metrics", _METRICS, getattr(metric, "name", metric), fix)
    return Statistic(metric._fn, _options(metric._fn_kwargs))


def is_perplexity(metric: keras.metrics.Metric) -> bool:
    """Whether this is KerasHub's perplexity, told by name so that KerasHub is not imported."""
    return f"{type(metric).__module__}.{type(metric).__name__}" == _PERPLEXITY


def update(
    metric: keras.metrics.Metric, y: Tensor, values: Tensor, mask: Tensor | None, weights: Any
) -> None:
    """Update a metric by the values of its statistic, as `metric.update_state` does by logits."""
    if is_perplexity(metric):
        _update_perplexity(
            metric, _flat_as(y, values), _masked(values, mask, values.dtype), weights
        )
    else:
        keras.metrics.Mean.update_state(metric, values, _masked(weights, mask, metric.dtype))


def _update_perplexity(metric: Any, y: Tensor, values: Tensor, weights: Any) -> None:
    """As KerasHub, which counts the tokens of a mask that comes with the logits."""
    total, count = metric.variables
    weights = ops.ones_like(values) if weights is None else ops.cast(weights, values.dtype)
    if metric.mask_token_id is not None:
        weights = weights * ops.cast(ops.not_equal(y, metric.mask_token_id), values.dtype)
    total.assign_add(ops.sum(ops.cast(values * weights, metric.dtype)))
    count.assign_add(ops.sum(ops.cast(weights, metric.dtype)))


def _masked(weights: Any, mask: Tensor | None, dtype: str) -> Any:
    """The weights of tokens, without those that a mask leaves out."""
    if mask is None:
        return weights
    mask = ops.cast(mask, dtype)
    if weights is None:
        return mask
    weights = _flat_as(ops.cast(weights, dtype), mask)
    return mask * (weights[..., None] if len(weights.shape) < len(mask.shape) else weights)


def _flat_as(x: Any, like: Tensor) -> Tensor:
    """Without a last axis of one that `like` does not have."""
    x = ops.convert_to_tensor(x)
    return ops.squeeze(x, -1) if len(x.shape) == len(like.shape) + 1 else x


def _options(options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))
