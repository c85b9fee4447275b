"""The final classes: `LoRADense` and `LoRAEinsumDense`."""

from __future__ import annotations

import keras

from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.lowrank.equations import Tensor


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRADense")
class LoRADense(LoRALayer, keras.layers.Dense):
    """A `Dense` layer with a frozen kernel and trainable low-rank adapters.

        y = act(x W0 + b + s (x A) B)     W0: (d, k)   A: (d, r)   B: (r, k)   s = alpha / r

    `A` starts random and `B` at zero, so a fresh layer computes what its base does. Kernel and
    bias are frozen. Masks pass through, as in `Dense`.

    Args:
        units: Number of outputs `k`.
        rank, alpha, dropout, use_rslora, use_dora, init, freeze_a, adapters, active, train_bias:
            See `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Dense`.

    Input shape:
        `(batch, ..., d)`.

    Output shape:
        `(batch, ..., units)`.

    Weights:
        `kernel` `(d, k)` and `bias` `(k,)`, frozen; for each active adapter `lora_a` `(d, r)`,
        `lora_b` `(r, k)` and, for DoRA, `lora_magnitude` `(k,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> model = keras.Sequential([keras.Input((12,)), LoRADense(64, rank=8, alpha=16)])
    >>> [tuple(v.shape) for v in model.trainable_variables]
    [(12, 8), (8, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.adapted_output(inputs, training, self.bias)


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAEinsumDense")
class LoRAEinsumDense(LoRALayer, keras.layers.EinsumDense):
    """An `EinsumDense` layer with a frozen kernel and trainable low-rank adapters.

    The kernel's axes are contracted (in the input only), free (in the output only) or shared
    (in both). `A` has the shared and contracted axes and `r`, `B` the shared axes, `r` and the
    free ones: for `btd,dnh->btnh`, `A` is `(d, r)` and `B` is `(r, n, h)`. Seen as a matrix, the
    delta `A B` has rank `r` at most, as in the paper; for shared axes, at each of their indices.

    Args:
        equation: Any equation that `keras.layers.EinsumDense` accepts.
        output_shape: As in `keras.layers.EinsumDense`.
        rank, alpha, dropout, use_rslora, use_dora, init, freeze_a, adapters, active, train_bias:
            See `LoRALayer`.
        **kwargs: Any argument of `keras.layers.EinsumDense`.

    Input shape:
        As the equation says.

    Output shape:
        As the equation says.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude`, which has the shared and the free axes; float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAEinsumDense("btd,dnh->btnh", (None, 12, 64), rank=8)
    >>> layer.build((None, None, 768))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(768, 8), (8, 12, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.adapted_output(inputs, training, self.bias)
