"""The final classes of transposed convolutions: `LoRAConv2DTranspose` and its like."""

from __future__ import annotations

import keras

from keras_lora.layers.convolution import EffectiveConvolution


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConv1DTranspose")
class LoRAConv1DTranspose(EffectiveConvolution, keras.layers.Conv1DTranspose):
    """A `Conv1DTranspose` layer with a frozen kernel and trainable low-rank adapters.

        y = act(conv_t(x, W0) + b + s conv_t(x, A) B)
        W0: (size, filters, channels)   A: (size, channels, r)   B: (r, filters)

    See `LoRAConv2DTranspose`, of which this is the form for sequences.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Conv1DTranspose`.

    Input shape:
        `(batch, steps, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.Conv1DTranspose`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(filters,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAConv1DTranspose(64, 3, strides=2, rank=2)
    >>> layer.build((None, 100, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConv2DTranspose")
class LoRAConv2DTranspose(EffectiveConvolution, keras.layers.Conv2DTranspose):
    """A `Conv2DTranspose` layer with a frozen kernel and trainable low-rank adapters.

        y = act(conv_t(x, W0) + b + s conv_t(x, A) B)
        W0: (h, w, filters, channels)   A: (h, w, channels, r)   B: (r, filters)

    `A` is a transposed convolution to `r` channels, with the layer's strides, padding and dilation,
    and `B` a convolution of size 1. The delta has the kernel's shape and, as a matrix of
    (kernel and inputs) by outputs, rank `r` at most. See `LoRAConv2D` for how it is computed.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Conv2DTranspose`.

    Input shape:
        `(batch, height, width, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.Conv2DTranspose`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(filters,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAConv2DTranspose(64, 3, strides=2, rank=2)
    >>> layer.build((None, 32, 32, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 3, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConv3DTranspose")
class LoRAConv3DTranspose(EffectiveConvolution, keras.layers.Conv3DTranspose):
    """A `Conv3DTranspose` layer with a frozen kernel and trainable low-rank adapters.

        y = act(conv_t(x, W0) + b + s conv_t(x, A) B)
        W0: (d, h, w, filters, channels)   A: (d, h, w, channels, r)   B: (r, filters)

    See `LoRAConv2DTranspose`, of which this is the form for volumes.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Conv3DTranspose`.

    Input shape:
        `(batch, depth, height, width, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.Conv3DTranspose`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(filters,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAConv3DTranspose(64, 3, strides=2, rank=2)
    >>> layer.build((None, 8, 8, 8, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 3, 3, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """
