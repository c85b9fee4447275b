"""Rows of an embedding matrix that an adapter trains in full, and has values of its own of.

    E[i] = R[i] for the tokens i of the adapter        E[i] = W0[i] for all others

`R` is `(tokens, dim)`, and the matrix stays `W0`, so no gradient has the size of the matrix. Of a
token that several active adapters have, `E[i] = W0[i] + sum_j (R_j[i] - W0[i])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.layers.adapter import LayerAdapter
from keras_lora.layers.factors import protected, read, write
from keras_lora.layers.groups import in_group
from keras_lora.lowrank.equations import Shape, Tensor

_PADDING = 2**31 - 1  # the id of no token, behind all others


@dataclass(eq=False)
class TokenRows:
    """What a slot has for adapters with rows: `R` and, sorted, the tokens that its rows belong to.

    An adapter with fewer tokens than the slot has rows is padded with the id of no token.
    """

    values: keras.Variable
    ids: keras.Variable

    @classmethod
    def make(cls, new: Any, suffix: str, adapter: LayerAdapter, shape: Shape) -> TokenRows:
        """Make variables with `new`, as `Slot.make` does; `shape` is that of `R`."""
        rows, ids = adapter.tokens, _padded(adapter.spec.train_tokens, shape[0])
        start = "zeros" if rows is None else rows.initializer(shape)
        # TensorFlow keeps integers of 32 bits in the host's memory, out of the reach of XLA.
        dtype = "int64" if keras.backend.backend() == "tensorflow" else "int32"

        def given(_: Shape, dtype: str) -> Tensor:
            return ops.convert_to_tensor(ids, dtype)

        values = in_group(new(f"lora_tokens{suffix}", shape, start, True), "tokens")
        variable = new(f"lora_token_ids{suffix}", shape[:1], given, False, dtype=dtype)
        return cls(values, protected(variable))

    @property
    def size(self) -> int:
        return self.values.shape[0]

    def refresh(self, tokens: Sequence[int]) -> None:
        """Take the tokens of another adapter; of none, all rows are padding."""
        ids = _padded(tokens, self.size).astype(self.ids.dtype)
        if not np.array_equal(read(self.ids), ids):
            write(self.ids, ids)

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """For each token the row that may be its own, and whether it is."""
        ids = ops.convert_to_tensor(self.ids)
        tokens = ops.cast(tokens, ids.dtype)
        found = ops.searchsorted(ids, ops.reshape(tokens, (-1,)))
        position = ops.minimum(ops.reshape(found, ops.shape(tokens)), self.size - 1)
        return position, ops.equal(ops.take(ids, position), tokens)

    def columns(self, inputs: Tensor, matrix: Tensor, wide: str) -> Tensor:
        """`h (E - W0)^T`, `(..., vocabulary)`; only the columns of the tokens are products."""
        ids, count = ops.convert_to_tensor(self.ids), matrix.shape[0]
        known, first = ops.less(ids, count), ops.minimum(ids, count - 1)
        change = ops.cast(self.values, wide) - ops.cast(ops.take(matrix, first, axis=0), wide)
        product = ops.matmul(inputs, ops.cast(ops.transpose(change), inputs.dtype))
        position, hit = self.find(ops.arange(count, dtype=ids.dtype))

        @ops.custom_gradient
        def placed(product: Tensor) -> Any:
            # The gradient that is derived otherwise adds up all columns, not those of the tokens.
            def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor]:
                dy = args[0] if upstream is None else upstream
                return (ops.where(known, ops.take(dy, first, axis=-1), ops.zeros((), dy.dtype)),)

            zero = ops.zeros((), product.dtype)
            return ops.where(hit, ops.take(product, position, axis=-1), zero), gradient

        return placed(product)


def replaced(rows: Sequence[TokenRows], tokens: Tensor, found: Tensor) -> Tensor:
    """`E` of these tokens, from the rows `found` `(..., dim)` that `W0` has for them.

    With one adapter `0 * W0[i] + R[i]`, which is `R[i]` to the last bit.
    """
    kept: Tensor = 1
    added: Tensor = 0
    for each in rows:
        position, hit = each.find(tokens)
        mask = ops.expand_dims(ops.cast(hit, found.dtype), -1)
        values = ops.cast(ops.take(each.values, position, axis=0), found.dtype)
        kept, added = kept - mask, added + mask * values
    return found * kept + added if rows else found


def _padded(tokens: Sequence[int], size: int) -> np.ndarray:
    return np.array([*tokens, *[_PADDING] * (size - len(tokens))], "int64")
