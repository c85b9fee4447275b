"""The final classes of embeddings: `LoRAEmbedding` and `LoRAReversibleEmbedding`.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_embeddings`: code that reads the attribute of an adapted layer gets the effective matrix.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_lora.layers.effective import EffectiveMatrix
from keras_lora.layers.guarded import Adapting
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.layers.quantized import Quantized, base_product, capped, reverse_product
from keras_lora.layers.slot_adapters import SlotAdapters
from keras_lora.layers.token_rows import replaced
from keras_lora.lowrank.equations import Tensor, split_equation
from keras_lora.lowrank.products import Products, Term, adapted_sum, einsum_products


class Lookup(Adapting, keras.layers.Embedding):
    """Abstract: an embedding that adds the rows of its adapters to those of its own matrix.

    Among the bases of a final class `LoRALayer` comes before this class. A subclass of `Embedding`
    may stand between the two: its `super().call(inputs)` then calls this class.
    """

    # A layer of KerasHub's SAM 3 reads the private attribute of another one.
    _embeddings = EffectiveMatrix()

    @property
    def embeddings(self) -> Tensor:
        """The effective matrix, `E + sum_i s_i A_i B_i`."""
        return self.kernel

    def call(self, inputs: Tensor) -> Tensor:
        return self.adapted_lookup(inputs)

    def adapted_lookup(self, inputs: Tensor) -> Tensor:
        """`E[i] + sum_j s_j A_j[i] B_j`: only these tokens' rows of `A B` are formed."""
        if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        rows = self._base_rows(inputs)
        computation = adapters_of(self)
        rows = replaced(computation.rows, inputs, rows)
        for slot, factor in computation.low_rank:
            pair = slot.pair(self.bank.site.wide_dtype, lambda a: ops.take(a, inputs, axis=0))
            a, b = (ops.cast(x, self.compute_dtype) for x in pair)
            rows = ops.add(rows, ops.matmul(a, _scaled(b, factor)))  # (..., r) @ (r, dim)
        return rows

    def _base_rows(self, tokens: Tensor) -> Tensor:
        if self.bank.site.is_quantized:
            return base_product(self).quantized_call(tokens)
        return ops.cast(ops.take(self.base_kernel, tokens, axis=0), self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAEmbedding")
class LoRAEmbedding(LoRALayer, Lookup):
    """An `Embedding` layer with a frozen matrix and trainable low-rank adapters.

        h = E[i] + s A[i] B     E: (vocabulary, dim)   A: (vocabulary, r)   B: (r, dim)

    By default `A` starts at zero and `B` standard normal, as in PEFT, so a fresh layer computes
    what its base does. Only the rows of `A` that were looked up get a gradient. There is no
    dropout, as in PEFT, since the adapter is fed token ids.

    Args:
        input_dim: Size of the vocabulary.
        output_dim: Size `dim` of a row.
        rank, alpha, use_rslora, init, adapters, active: See `LoRALayer`. Its `dropout` and
            `train_bias` have no effect.
        **kwargs: Any argument of `keras.layers.Embedding` except `weights`.

    Input shape:
        `(batch, ...)`, of integers; not ragged.

    Output shape:
        `(batch, ..., dim)`.

    Weights:
        `embeddings` `(vocabulary, dim)`, frozen; for each active adapter `lora_a`
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


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAReversibleEmbedding")
class LoRAReversibleEmbedding(LoRALayer, keras.layers.ReversibleEmbedding, Lookup):
    """A `ReversibleEmbedding` with a frozen matrix and trainable low-rank adapters.

        h = E[i] + s A[i] B                    the lookup
        y = cap(h E^T + s (h B^T) A^T)         the reverse, where the weights are tied
        y = cap(h R)                           the reverse, where they are not

    Tied weights are one matrix, which is adapted in both directions. If they are not tied, the
    kernel `R` of the reverse is another matrix, which is frozen and not adapted. (Hugging Face
    PEFT adapts the lookup alone in both cases; see docs/peft.md.)

    By default `A` starts at zero and `B` standard normal; there is no dropout: see
    `LoRAEmbedding`.

    Args:
        input_dim: Size of the vocabulary.
        output_dim: Size `dim` of a row.
        rank, alpha, use_rslora, init, adapters, active: See `LoRALayer`. Its `dropout` and
            `train_bias` have no effect.
        **kwargs: Any argument of `keras.layers.ReversibleEmbedding` except `weights`.

    Input shape:
        `(batch, ...)`, of integers, not ragged; with `reverse=True` `(batch, ..., dim)`.

    Output shape:
        `(batch, ..., dim)`; with `reverse=True` `(batch, ..., vocabulary)`.

    Weights:
        `embeddings` `(vocabulary, dim)` and, where they are not tied, `reverse_embeddings`
        `(dim, vocabulary)`, frozen; for each active adapter `lora_a` `(vocabulary, r)` and
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

    def call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        if not (reverse and self.tie_weights and adapters_of(self).changes_output):
            # Keras's `call` looks up by `super().call`, which is `Lookup.call`, and sets the mask.
            return keras.layers.ReversibleEmbedding.call(self, inputs, reverse)
        return capped(self.adapted_reverse(inputs), self.logit_soft_cap)

    def quantized_call(self, inputs: Tensor, reverse: bool = False) -> Tensor:
        """`call` of a quantized layer, with the gradient that Keras's own reverse does not have."""
        if not reverse:
            return self.adapted_lookup(inputs)  # without a mask, as in Keras
        if self.tie_weights:
            return capped(self.adapted_reverse(inputs), self.logit_soft_cap)
        return capped(reverse_product(self, inputs), self.logit_soft_cap)

    def adapted_reverse(self, inputs: Tensor) -> Tensor:
        """`h E^T + sum_j s_j (h B_j^T) A_j^T`."""
        site, computation = self.bank.site, adapters_of(self)
        split, matrix = split_equation("...y,xy->...x", len(inputs.shape)), None
        if site.is_quantized:
            base = reverse_product(self, inputs)
            inputs, dtype = ops.cast(inputs, base.dtype), base.dtype
            if computation.rows:
                matrix = ops.cast(site.weight(), dtype)
            products: Products = Quantized(lambda _: base, split, site.shape)
        else:
            matrix = site.weight()
            if self.reverse_dtype is not None:
                inputs, matrix = (ops.cast(x, self.reverse_dtype) for x in (inputs, matrix))
            products, dtype = einsum_products(split, matrix), matrix.dtype
        wide = site.wide_dtype
        pairs = [(*slot.pair(wide), factor) for slot, factor in computation.low_rank]
        turned = [(_turned(_scaled(b, f), dtype), _turned(a, dtype)) for a, b, f in pairs]
        logits = adapted_sum(products, inputs, [Term(inputs, b, a) for b, a in turned])
        for rows in computation.rows:
            logits = ops.add(logits, rows.columns(inputs, matrix, wide))
        return logits


def adapters_of(layer: LoRALayer) -> SlotAdapters:
    """The adapters that an embedding is computed with, which cannot differ from row to row."""
    computation = layer.bank.computation
    assert isinstance(computation, SlotAdapters)
    return computation


def _scaled(factor: Tensor, by: float) -> Tensor:
    return factor if by == 1 else by * factor


def _turned(factor: Tensor, dtype: Any) -> Tensor:
    """A factor transposed, in this dtype."""
    return ops.cast(ops.transpose(factor), dtype)
