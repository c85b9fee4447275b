"""The final classes of depthwise convolutions: `LoRADepthwiseConv1D` and `LoRADepthwiseConv2D`."""

from __future__ import annotations

import keras

from keras_lora.layers.convolution import EffectiveConvolution


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRADepthwiseConv1D")
class LoRADepthwiseConv1D(EffectiveConvolution, keras.layers.DepthwiseConv1D):
    """A `DepthwiseConv1D` layer with a frozen kernel and trainable low-rank adapters.

        y = act(dconv(x, W0 + s A B) + b)
        W0: (size, channels, multiplier)   A: (size, r)   B: (r, channels, multiplier)

    See `LoRADepthwiseConv2D`, of which this is the form for sequences.

    Args:
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.DepthwiseConv1D`.

    Input shape:
        `(batch, steps, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.DepthwiseConv1D`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(channels, multiplier)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a depthwise constraint.

    Example:

    >>> import keras
    >>> layer = LoRADepthwiseConv1D(3, depth_multiplier=2, rank=2)
    >>> layer.build((None, 100, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 2), (2, 12, 2)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRADepthwiseConv2D")
class LoRADepthwiseConv2D(EffectiveConvolution, keras.layers.DepthwiseConv2D):
    """A `DepthwiseConv2D` layer with a frozen kernel and trainable low-rank adapters.

        y = act(dconv(x, W0 + s A B) + b)
        W0: (h, w, channels, multiplier)   A: (h, w, r)   B: (r, channels, multiplier)

    The kernel is factored as a matrix of its positions by its channels and their multiples, so that
    all channels share the `r` patterns in `A`; a rank above the number of positions adds nothing.
    In 32 bits the sum `W0 + s A B` is formed once a call, since a kernel of this layer is small:
    in two steps the first would have `r` outputs for each channel.

    Args:
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.DepthwiseConv2D`.

    Input shape:
        `(batch, height, width, channels)`; channels second with `"channels_first"`.

    Output shape:
        As in `keras.layers.DepthwiseConv2D`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(channels, multiplier)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a depthwise constraint.

    Example:

    >>> import keras
    >>> layer = LoRADepthwiseConv2D(3, depth_multiplier=2, rank=2)
    >>> layer.build((None, 32, 32, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 3, 2), (2, 12, 2)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """
