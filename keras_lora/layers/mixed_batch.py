"""A mixed batch: each row has an adapter of its own, so that one model serves many adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from keras import ops

from keras_lora.layers.computation import Computation
from keras_lora.layers.kinds import Site
from keras_lora.lowrank.equations import EinsumSplit, Tensor
from keras_lora.lowrank.products import ByRow, Products, Term


@final
@dataclass(frozen=True, eq=False)
class MixedBatch(Computation):
    """Factors, kernels and biases with the batch as their first axis, in the compute dtype.

        y_i = act(g_i (x_i W_i) + b_i + (x_i A_i) B_i)        for each row i of the batch

    `W_i` and `b_i` are the layer's own where None is given, and there is no update where there are
    no factors. The scales, and the gain `g_i` of DoRA, are part of `B_i`.

    Attributes:
        refuse: Called with the reason if the use of the layer allows no adapter for each row. It
            may raise; otherwise the layer goes on without adapters.
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

    changes_output = True

    def products(self, site: Site, x: Tensor) -> Products:
        split = site.split(len(x.shape))
        refusal = self._refusal(split, x)
        if refusal is None:
            return ByRow(split, site.products, self.kernel)
        self.refuse(refusal)
        return site.products(x)

    def terms(self, site: Site, x: Tensor, training: bool | None) -> Sequence[Term]:  # noqa: ARG002
        if self.factors is None or self._refusal(site.split(len(x.shape)), x) is not None:
            return []
        return [Term(x, *self.factors, self.gain)]

    def repeatable(self, training: bool | None) -> MixedBatch:  # noqa: ARG002
        return self

    def add_bias(self, product: Tensor, bias: Tensor | None) -> Tensor:
        if self.bias is None:
            return product if bias is None else ops.add(product, bias)
        shape = ops.shape(self.bias)
        if product.shape[0] != shape[0] and isinstance(shape[0], int):
            return product  # refused already
        ones = (1,) * (len(product.shape) - len(shape))
        return product + ops.reshape(self.bias, (shape[0], *ones, *shape[1:]))

    def kernel_of(self, site: Site) -> Tensor:
        self.refuse("its kernel is read, and each row has a kernel of its own")
        return site.matrix

    def _refusal(self, split: EinsumSplit, x: Tensor) -> str | None:
        """Why the rows of `x` are not those of the batch; None where they are."""
        if split.input[0] not in split.batch or split.output[0] != split.input[0]:
            return f"its einsum {split.input},{split.kernel}->{split.output} moves the first axis"
        own = (*(self.factors or ()), self.kernel, self.bias)
        batch = next(tensor.shape[0] for tensor in own if tensor is not None)
        if x.shape[0] == batch:
            return None
        return f"its input is of shape {tuple(x.shape)} where the batch is {batch}"
