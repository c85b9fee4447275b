"""The final classes of separable convolutions: `LoRASeparableConv1D` and `LoRASeparableConv2D`."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.layers.convolution import ConvolutionLayer
from keras_lora.layers.effective import BaseVariables, EffectiveMatrix


class SeparableConvolution(ConvolutionLayer, BaseVariables):
    """Abstract base of adapted separable convolutions, in which both kernels are adapted."""

    depthwise_kernel: Any = EffectiveMatrix()
    pointwise_kernel: Any = EffectiveMatrix()


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRASeparableConv1D")
class LoRASeparableConv1D(SeparableConvolution, keras.layers.SeparableConv1D):
    """A `SeparableConv1D` layer with two frozen kernels and trainable low-rank adapters of both.

        y = act(conv(dconv(x, D + s A B), P + s A' B') + b)

    The depthwise kernel `D` is factored as in `LoRADepthwiseConv2D`, the pointwise one `P` as in
    `LoRAConv2D`; `layer.banks` has the adapters of each.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the depthwise kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.SeparableConv1D`.

    Input shape:
        `(batch, steps, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.SeparableConv1D`.

    Weights:
        `depthwise_kernel`, `pointwise_kernel` and `bias`, frozen; for each active adapter and each
        kernel `lora_a`, `lora_b` and, for DoRA, `lora_magnitude`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a constraint on a kernel.

    Example:

    >>> import keras
    >>> layer = LoRASeparableConv1D(64, 3, rank=2)
    >>> layer.build((None, 100, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 2), (2, 12, 1), (1, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRASeparableConv2D")
class LoRASeparableConv2D(SeparableConvolution, keras.layers.SeparableConv2D):
    """A `SeparableConv2D` layer with two frozen kernels and trainable low-rank adapters of both.

        y = act(conv(dconv(x, D + s A B), P + s A' B') + b)

    The depthwise kernel `D` is factored as in `LoRADepthwiseConv2D`, the pointwise one `P` as in
    `LoRAConv2D`; `layer.banks` has the adapters of each.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the depthwise kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.SeparableConv2D`.

    Input shape:
        `(batch, height, width, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.SeparableConv2D`.

    Weights:
        `depthwise_kernel`, `pointwise_kernel` and `bias`, frozen; for each active adapter and each
        kernel `lora_a`, `lora_b` and, for DoRA, `lora_magnitude`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a constraint on a kernel.

    Example:

    >>> import keras
    >>> layer = LoRASeparableConv2D(64, 3, rank=2)
    >>> layer.build((None, 32, 32, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 3, 2), (2, 12, 1), (1, 1, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """
