"""The final classes of embeddings: `LoRAEmbedding` and `LoRAReversibleEmbedding`."""

from __future__ import annotations

import keras
from keras import ops

from keras_lora.layers.bank import Adapting
from keras_lora.layers.kinds import wide_dtype
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.lowrank.equations import Tensor, split_equation


def table_equation(layer: keras.layers.Layer) -> str:  # noqa: ARG001
    """The einsum of tokens as one-hot vectors, which are never formed, and a table."""
    return "...x,xy->...y"


class Lookup(Adapting, keras.layers.Embedding):
    """Abstract: an embedding that adds the rows of its adapters to those of its table.

    A final class has `LoRALayer` before it, and may have a subclass of `Embedding` between:
    what that calls as `super().call(inputs)` is this.
    """

    @property
    def embeddings(self) -> Tensor:
        """The effective table, `E + sum_i s_i A_i B_i`."""
        return self.kernel

    def call(self, inputs: Tensor) -> Tensor:
        return self.adapted_lookup(inputs)

    def adapted_lookup(self, inputs: Tensor) -> Tensor:
        """`E[i] + sum_i s_i A_i[i] B_i`: no row of `A B` is formed but those that are asked for."""
        if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        rows = self._rows(self.base_kernel, inputs)
        for slot in self.slots:
            b = ops.cast(slot.scaled_b(wide_dtype(self.base_kernel)), self.compute_dtype)
            rows = ops.add(rows, ops.matmul(self._rows(slot.a, inputs), b))  # (..., r) @ (r, dim)
        return rows

    def _rows(self, table: keras.Variable, inputs: Tensor) -> Tensor:
        return ops.cast(ops.take(table, inputs, axis=0), self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAEmbedding")
class LoRAEmbedding(LoRALayer, Lookup):
    """An `Embedding` layer with a frozen table and trainable low-rank adapters.

        h = E[i] + s A[i] B     E: (vocabulary, dim)   A: (vocabulary, r)   B: (r, dim)

    `A` starts at zero and `B` standard normal, as in PEFT, so a fresh layer computes what its
    base does. The gradient of `A` is one of the rows that were looked up. There is no dropout,
    as in PEFT: what `A` takes is the number of a token.

    Args:
        input_dim: Size of the vocabulary.
        output_dim: Size `dim` of a row.
        rank, alpha, use_rslora, adapters, active: See `LoRALayer`. Its `dropout`, `init` and
            `train_bias` say nothing here.
        **kwargs: Any argument of `keras.layers.Embedding` but `weights`.

    Input shape:
        `(batch, ...)`, of integers; not ragged.

    Output shape:
        `(batch, ..., dim)`.

    Weights:
        `embeddings` `(vocabulary, dim)`, frozen; for each adapter that acts `lora_a`
        `(vocabulary, r)` and `lora_b` `(r, dim)`, float32.

    Raises:
        ValueError: an invalid rank or alpha; an embeddings constraint; `weights`.

    Example:

    >>> import keras
    >>> layer = LoRAEmbedding(61, 12, rank=2, alpha=4, mask_zero=True)
    >>> layer.build()
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(61, 2), (2, 12)]
    >>> tuple(layer(keras.ops.ones((3, 5), "int32")).shape)
    (3, 5, 12)

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; for embeddings the
    authors' loralib, https://github.com/microsoft/LoRA.
    """

    # Looked up or called in reverse, a row of the table has no norm of its outputs in common.
    takes_dora = False
    kernel_equation = staticmethod(table_equation)


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAReversibleEmbedding")
class LoRAReversibleEmbedding(LoRALayer, keras.layers.ReversibleEmbedding, Lookup):
    """A `ReversibleEmbedding` with a frozen table and trainable low-rank adapters.

        h = E[i] + s A[i] B                    the lookup
        y = cap(h E^T + s (h B^T) A^T)         the reverse, where the weights are tied
        y = cap(h R)                           the reverse, where they are not

    Tied weights are one table, which is adapted in both directions. Where they are not tied the
    kernel `R` of the reverse is another matrix: it is frozen, and not adapted. (Hugging Face
    PEFT adapts the lookup alone in both cases; see docs/peft.md.)

    `A` starts at zero and `B` standard normal, and there is no dropout: see `LoRAEmbedding`.

    Args:
        input_dim: Size of the vocabulary.
        output_dim: Size `dim` of a row.
        rank, alpha, use_rslora, adapters, active: See `LoRALayer`. Its `dropout`, `init` and
            `train_bias` say nothing here.
        **kwargs: Any argument of `keras.layers.ReversibleEmbedding` but `weights`.

    Input shape:
        `(batch, ...)`, of integers, not ragged; with `reverse=True` `(batch, ..., dim)`.

    Output shape:
        `(batch, ..., dim)`; with `reverse=True` `(batch, ..., vocabulary)`.

    Weights:
        `embeddings` `(vocabulary, dim)` and, where they are not tied, `reverse_embeddings`
        `(dim, vocabulary)`, frozen; for each adapter that acts `lora_a` `(vocabulary, r)` and
        `lora_b` `(r, dim)`, float32.

    Raises:
        ValueError: an invalid rank or alpha; an embeddings constraint; `weights`.

    Example:

    >>> import keras
    >>> layer = LoRAReversibleEmbedding(61, 12, rank=2, logit_soft_cap=30.0)
    >>> rows = layer(keras.ops.ones((3, 5), "int32"))
    >>> tuple(rows.shape), tuple(layer(rows, reverse=True).shape)
    ((3, 5, 12), (3, 5, 61))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(61, 2), (2, 12)]

    Reference: Press and Wolf 2016, https://arxiv.org/abs/1608.05859; Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, section 4.1.
    """

    # Looked up or called in reverse, a row of the table has no norm of its outputs in common.
    takes_dora = False
    kernel_equation = staticmethod(table_equation)

    def call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        if not (reverse and self.tie_weights and self.slots):
            # Its lookup is that of `Lookup`, by `super().call`; and it sets the mask.
            return keras.layers.ReversibleEmbedding.call(self, inputs, reverse)
        logits = self.adapted_reverse(inputs)
        cap = self.logit_soft_cap
        return logits if cap is None else ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)

    def adapted_reverse(self, inputs: Tensor) -> Tensor:
        """`h E^T + sum_i s_i (h B_i^T) A_i^T`."""
        table = ops.convert_to_tensor(self.base_kernel)
        if self.reverse_dtype is not None:
            inputs, table = (ops.cast(x, self.reverse_dtype) for x in (inputs, table))
        wide = wide_dtype(self.base_kernel)
        terms = [
            (inputs, _turned(slot.scaled_b(wide), table), _turned(slot.a, table), None)
            for slot in self.slots
        ]
        split = split_equation("...y,xy->...x", len(inputs.shape))
        return split.adapted_product(inputs, table, terms)


def _turned(factor: Tensor, table: Tensor) -> Tensor:
    """A factor for the way back, in the dtype of the table."""
    return ops.cast(ops.transpose(factor), table.dtype)
