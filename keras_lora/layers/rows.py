"""What each row of a batch has of its own, where one model serves many adapters at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
from keras import ops

from keras_lora.lowrank.equations import EinsumSplit, Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Factors, kernels and biases with the batch as their first axis, in the compute dtype.

        y_i = act(g_i (x_i W_i) + b_i + (x_i A_i) B_i)        for each row i of the batch

    `W_i` and `b_i` are the layer's own where None is given, and there is no update where there are
    no factors. The scales, and the gain `g_i` of DoRA, are part of `B_i`.

    Attributes:
        refuse: Takes the reason where the layer is used in a way that has no such form. It may
            raise; else the layer goes on without rows.
        factors: `A` `(batch, r, shared, contracted)` and `B` `(batch, r, shared, free)`.
        kernel: `(batch, *kernel)`.
        bias: `(batch, *bias)`.
        gain: `(batch, shared, free)`, in float32: in 16 bits a gain near 1 would be 1.
    """

    refuse: Callable[[str], None]
    factors: tuple[Tensor, Tensor] | None = None
    kernel: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None

    def product(self, split: EinsumSplit, x: Tensor, kernel: keras.Variable) -> Tensor:
        """The layer before bias and activation."""
        refusal = self._refusal(split, x)
        if refusal is not None:
            self.refuse(refusal)
            return split.adapted_product(x, ops.convert_to_tensor(kernel), [])
        if self.kernel is None:
            product = split.adapted_product(x, ops.convert_to_tensor(kernel), [])
        else:
            product = split.product_by_row(x, self.kernel)
        if self.gain is not None:
            product = split.times_gain_by_row(product, self.gain)
        return product if self.factors is None else product + split.update_by_row(x, *self.factors)

    def add_bias(self, product: Tensor) -> Tensor:
        shape = ops.shape(self.bias)
        if product.shape[0] != shape[0] and isinstance(shape[0], int):
            return product  # refused already
        ones = (1,) * (len(product.shape) - len(shape))
        return product + ops.reshape(self.bias, (shape[0], *ones, *shape[1:]))

    def _refusal(self, split: EinsumSplit, x: Tensor) -> str | None:
        """Why the rows of `x` are not those of the batch; None where they are."""
        if split.input[0] not in split.rows or split.output[0] != split.input[0]:
            return f"its einsum {split.input},{split.kernel}->{split.output} moves the first axis"
        own = (*(self.factors or ()), self.kernel, self.bias)
        batch = next(tensor.shape[0] for tensor in own if tensor is not None)
        if x.shape[0] == batch:
            return None
        return f"its input is of shape {tuple(x.shape)} where the batch is {batch}"
