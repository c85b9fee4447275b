"""The final classes of recurrent cells: `LoRALSTMCell`, `LoRAGRUCell`, `LoRASimpleRNNCell` and
`LoRAConvLSTMCell`.

A cell reads its kernels at each time step. So this module wraps the loops of Keras's recurrent
layers, which form the effective kernels first.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `inner_loop`: the loop over time, which Keras does not document.
    `_flatten_layers`: the cells within stacked cells.
"""

from __future__ import annotations

import functools
from typing import Any

import keras

from keras_lora.layers.effective import BaseVariables, EffectiveMatrix, forming
from keras_lora.layers.kinds import CONV_LSTM_CELL
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.lowrank.equations import Tensor


class RecurrentCell(LoRALayer, BaseVariables):
    """Abstract base of adapted recurrent cells, in which two matrices are adapted.

        W = W0 + s A B        U = U0 + s A' B'

    `W0` is `kernel`, which acts on the input, and `U0` is `recurrent_kernel`, which acts on the
    state. The sums are formed once for all time steps, and cuDNN's kernels stay usable where Keras
    uses them. The adapters have no dropout, which would need products of its own at each step; the
    dropouts of the cell itself act as before.
    """

    kernel = EffectiveMatrix()
    recurrent_kernel = EffectiveMatrix()

    def call(self, inputs: Tensor, states: Any, training: bool = False) -> Any:
        with forming([self]):
            return super().call(inputs, states, training)


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRALSTMCell")
class LoRALSTMCell(RecurrentCell, keras.layers.LSTMCell):
    """An `LSTMCell` with frozen kernels and trainable low-rank adapters.

        W0: (d, 4 units)   A: (d, r)   B: (r, 4 units)
        U0: (units, 4 units)   A': (units, r)   B': (r, 4 units)   s = alpha / r

    A model's `LSTM` is adapted by its cell, whose matrices are `lstm/lstm_cell/kernel` and
    `lstm/lstm_cell/recurrent_kernel`. The four gates share an adapter, as they share a kernel.

    Args:
        units: Number of outputs.
        rank, alpha, use_rslora, use_dora, init, adapters, active, train_bias: See `LoRALayer`.
        **kwargs: Any argument of `keras.layers.LSTMCell`. `dropout` is the cell's own.

    Input shape:
        `(batch, d)`, and two states `(batch, units)`.

    Output shape:
        `(batch, units)`, and the states.

    Weights:
        `kernel`, `recurrent_kernel` and `bias`, frozen; for each active adapter two of `lora_a`
        and `lora_b`, float32.

    Raises:
        ValueError: an invalid rank or alpha; a constraint on a kernel.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(5, name="lstm")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(rank=2, targets="all"))
    >>> [tuple(v.shape) for v in model.trainable_variables]
    [(3, 2), (2, 20), (5, 2), (2, 20)]

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; Hochreiter and
    Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735.
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAGRUCell")
class LoRAGRUCell(RecurrentCell, keras.layers.GRUCell):
    """A `GRUCell` with frozen kernels and trainable low-rank adapters; see `LoRALSTMCell`.

    Example:

    >>> LoRAGRUCell(5, rank=2).active_adapters
    ('default',)
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRASimpleRNNCell")
class LoRASimpleRNNCell(RecurrentCell, keras.layers.SimpleRNNCell):
    """A `SimpleRNNCell` with frozen kernels and trainable low-rank adapters; see `LoRALSTMCell`.

    Example:

    >>> LoRASimpleRNNCell(5, rank=2).active_adapters
    ('default',)
    """


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAConvLSTMCell")
class LoRAConvLSTMCell(RecurrentCell, CONV_LSTM_CELL):
    """The cell of a `ConvLSTM1D` to `ConvLSTM3D` with frozen kernels and trainable adapters.

    As in a convolution, `A` has the kernel's positions and inputs: for `kernel` `(h, w, d, r)`,
    for `recurrent_kernel` `(h, w, filters, r)`; `B` is `(r, 4 filters)`. See `LoRALSTMCell`.

    Example:

    >>> LoRAConvLSTMCell(rank=2, filters=5, kernel_size=3).active_adapters
    ('default',)
    """


def form_before_loops() -> None:
    """Wrap the loops of Keras's recurrent layers; called once, when this module is imported."""
    for layer_class in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU):
        layer_class.inner_loop = _forming_first(layer_class.inner_loop)


def _forming_first(loop: Any) -> Any:
    @functools.wraps(loop)
    def inner_loop(layer: Any, *args: Any, **kwargs: Any) -> Any:
        cell = layer.cell  # need not be a layer
        inside = cell._flatten_layers() if isinstance(cell, keras.layers.Layer) else ()
        with forming(x for x in inside if isinstance(x, RecurrentCell)):
            return loop(layer, *args, **kwargs)

    return inner_loop


form_before_loops()
