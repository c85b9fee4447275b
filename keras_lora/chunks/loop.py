"""A function of each token, computed over chunks of tokens one after the other.

The backward pass computes each chunk again, so that at any moment one chunk's intermediate values
are alive. On JAX and torch that is `keras.remat` within a loop. On TensorFlow it would also form
the gradients of frozen variables, since a frozen variable of Keras trains for TensorFlow: so the
backward pass is written out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_lora.lowrank.equations import Tensor

# From hidden states `(n, d)` and targets `(n,)` of tokens to values `(n,)`. The first of the values
# has a gradient.
PerToken: TypeAlias = Callable[[Tensor, Tensor], Sequence[Tensor]]


def by_chunks(
    function: PerToken,
    hidden: Tensor,
    targets: Tensor,
    tokens: int,
    trained: Sequence[Any],
) -> list[Tensor]:
    """The values of a function of each token.

    Args:
        function: Called with at most `tokens` tokens at once.
        hidden: Hidden states `(n, d)`.
        targets: Token ids `(n,)`.
        tokens: The size of a chunk.
        trained: The TensorFlow variables that the function has a gradient for, besides `hidden`.

    Returns:
        The values, each `(n,)`.
    """
    count = ops.shape(hidden)[0]  # not static where a batch may be smaller than the others
    chunks = _ceiling(count, tokens)
    size = _ceiling(count, chunks)
    padding = chunks * size - count
    hidden, targets = (
        ops.reshape(_padded(x, padding), (chunks, size, *x.shape[1:])) for x in (hidden, targets)
    )
    if keras.backend.backend() == "tensorflow":
        values = _on_tensorflow(function, hidden, targets, trained)
    else:
        again = keras.remat(function)
        values = ops.map(lambda chunk: again(*chunk), (hidden, targets))
    return [ops.reshape(x, (-1,))[:count] for x in values]


def tensorflow_variables(variables: Sequence[keras.Variable]) -> list[Any]:
    """TensorFlow's variables for those of Keras, where the backend needs them.

    Called outside the model: within it, the value of a variable may be a cast.
    """
    ours = keras.backend.backend() == "tensorflow"
    return [variable.value for variable in variables] if ours else []


def _ceiling(count: Any, by: Any) -> Any:
    return -(-count // by)


def _padded(x: Tensor, count: Any) -> Tensor:
    if isinstance(count, int) and count == 0:
        return x
    return ops.concatenate([x, ops.zeros((count, *x.shape[1:]), x.dtype)])


def _on_tensorflow(
    function: PerToken, hidden: Tensor, targets: Tensor, trained: Sequence[Any]
) -> Sequence[Tensor]:
    tf = importlib.import_module("tensorflow")
    wanted = set(map(id, trained))

    @tf.custom_gradient
    def values(hidden: Tensor) -> Any:
        found = _one_after_the_other(tf, function, (hidden, targets))

        def gradient(first: Tensor, *_: Any, variables: Sequence[Any] = ()) -> Any:
            own = [variable for variable in variables if id(variable) in wanted]
            # Nothing else waits for the values, which could come when most memory is taken.
            with tf.control_dependencies(found):
                first = tf.identity(first)
            of_hidden, of_own = _gradients(tf, function, (hidden, targets, first), own)
            by_id = {id(v): g for v, g in zip(own, of_own, strict=True)}
            return of_hidden, [by_id.get(id(variable)) for variable in variables]

        return found, gradient

    return values(hidden)


def _one_after_the_other(
    tf: Any, function: PerToken, stacked: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """The values of all chunks. `ops.map` lets TensorFlow compute ten of them side by side."""
    first = function(*(x[0] for x in stacked))  # for dtypes and shapes; nothing reads its values
    values: tuple[Tensor, ...] = tf.map_fn(
        lambda chunk: tuple(function(*chunk)),
        stacked,
        parallel_iterations=1,
        fn_output_signature=tuple(map(tf.TensorSpec.from_tensor, first)),
    )
    return values


def _gradients(
    tf: Any, function: PerToken, stacked: Sequence[Tensor], variables: Sequence[Any]
) -> tuple[Tensor, Sequence[Tensor]]:
    """The gradients of the hidden states and, summed over the chunks, of the variables."""
    hidden, targets, upstream = stacked
    chunks = ops.shape(hidden)[0]

    def add(index: Tensor, of_hidden: Any, sums: Sequence[Tensor]) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            chunk = hidden[index]
            tape.watch([chunk, *variables])
            value = function(chunk, targets[index])[0]
        own, *others = tape.gradient(
            value,
            [chunk, *variables],
            upstream[index],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        new = [total + tf.cast(g, total.dtype) for total, g in zip(sums, others, strict=True)]
        return index + 1, of_hidden.write(index, own), new

    start = tf.TensorArray(hidden.dtype, chunks, element_shape=hidden.shape[1:])
    zeros = [tf.zeros(variable.shape, _wide(variable.dtype.name)) for variable in variables]
    _, of_hidden, sums = tf.while_loop(
        lambda index, *_: index < chunks,
        add,
        (0, start, zeros),
        parallel_iterations=1,
    )
    casts = [tf.cast(total, v.dtype) for total, v in zip(sums, variables, strict=True)]
    return of_hidden.stack(), casts


def _wide(dtype: str) -> str:
    """A dtype in which small gradients of many chunks can be added."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype
