"""The final classes of convolutions: `LoRAConv1D`, `LoRAConv2D` and `LoRAConv3D`."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.layers.convolving import channel_bias
from keras_lora.layers.effective import BaseVariables, EffectiveMatrix
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.lowrank.equations import Tensor


class ConvolutionLayer(LoRALayer):
    """Abstract base of adapted convolutions: the bias is one of channels."""

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        return self.adapted_output(inputs, training, channel_bias(self))


class EffectiveConvolution(ConvolutionLayer, BaseVariables):
    """Abstract base of those whose kernel is a plain attribute."""

    kernel: Any = EffectiveMatrix()


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConv1D")
class LoRAConv1D(ConvolutionLayer, keras.layers.Conv1D):
    """A `Conv1D` layer with a frozen kernel and trainable low-rank adapters.

        y = act(conv(x, W0) + b + s conv(x, A) B)
        W0: (size, channels, filters)   A: (size, channels, r)   B: (r, filters)   s = alpha / r

    See `LoRAConv2D`, of which this is the form for sequences; `padding="causal"` too.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Conv1D`.

    Input shape:
        `(batch, steps, channels)`; `(batch, channels, steps)` with `"channels_first"`.

    Output shape:
        As in `keras.layers.Conv1D`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(filters,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAConv1D(64, 3, padding="causal", rank=2)
    >>> layer.build((None, 100, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConv2D")
class LoRAConv2D(ConvolutionLayer, keras.layers.Conv2D):
    """A `Conv2D` layer with a frozen kernel and trainable low-rank adapters.

        y = act(conv(x, W0) + b + s conv(x, A) B)
        W0: (h, w, channels, filters)   A: (h, w, channels, r)   B: (r, filters)   s = alpha / r

    `A` is a convolution to `r` channels, with the layer's strides, padding and dilation, and `B`
    one of size 1. The delta `A B` has the kernel's shape and, as a matrix of
    `h w channels` by `filters`, rank `r` at most. With `groups`, `A` has the channels of a group,
    and each group of outputs applies it to its own inputs. `A` starts random and `B` at zero, so a
    fresh layer computes what its base does.

    In 32 bits the sum `W0 + s A B` is formed once a call and used in one convolution. For all but
    small kernels no gradient of the kernel is computed, but those of `A` and `B` directly.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Conv2D`.

    Input shape:
        `(batch, height, width, channels)`; `(batch, channels, height, width)` with
        `"channels_first"`.

    Output shape:
        As in `keras.layers.Conv2D`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(filters,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAConv2D(64, 3, groups=4, rank=2)
    >>> layer.build((None, 32, 32, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 3, 3, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; for convolutions the
    authors' loralib, https://github.com/microsoft/LoRA, and LoCon,
    https://github.com/KohakuBlueleaf/LyCORIS.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConv3D")
class LoRAConv3D(ConvolutionLayer, keras.layers.Conv3D):
    """A `Conv3D` layer with a frozen kernel and trainable low-rank adapters.

        y = act(conv(x, W0) + b + s conv(x, A) B)
        W0: (d, h, w, channels, filters)   A: (d, h, w, channels, r)   B: (r, filters)

    See `LoRAConv2D`, of which this is the form for volumes.

    Args:
        filters: Number of outputs.
        kernel_size: Size of the kernel.
        rank, alpha, dropout, use_rslora, use_dora, init, adapters, active, train_bias: See
            `LoRALayer`.
        **kwargs: Any argument of `keras.layers.Conv3D`.

    Input shape:
        `(batch, depth, height, width, channels)`; `(batch, channels, depth, height, width)` with
        `"channels_first"`.

    Output shape:
        As in `keras.layers.Conv3D`.

    Weights:
        `kernel` and `bias`, frozen; for each active adapter `lora_a`, `lora_b` and, for DoRA,
        `lora_magnitude` `(filters,)`, float32.

    Raises:
        ValueError: an invalid rank, alpha or dropout; a kernel constraint.

    Example:

    >>> import keras
    >>> layer = LoRAConv3D(64, 3, rank=2)
    >>> layer.build((None, 8, 8, 8, 12))
    >>> [tuple(v.shape) for v in layer.trainable_variables]
    [(3, 3, 3, 12, 2), (2, 64)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.
    """
