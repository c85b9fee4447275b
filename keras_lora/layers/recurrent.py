"""The final classes of recurrent cells: `LoRALSTMCell`, `LoRAGRUCell`, `LoRASimpleRNNCell` and
`LoRAConvLSTMCell`.

A cell reads its kernels and its bias at each time step. What it needs of the adapters is formed
before the first step: this module wraps the loops of Keras's recurrent layers.

The gradient of a formed kernel costs as much as that of a kernel that trains. So in training a cell
that adds its bias to both products, of its whole inputs, has the updates in the bias:

    z = x W0 + h U0 + (b + s (x A) B + s (h A') B')

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `inner_loop`: the loop over time, which Keras does not document.
    `_flatten_layers`: the cells within stacked cells.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeAlias, final

import keras
from keras import ops

from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.effective import BaseVariables, EffectiveMatrix, forming, unformed
from keras_lora.layers.kinds import CONV_LSTM_CELL
from keras_lora.layers.lora_layer import LoRALayer
from keras_lora.lowrank.equations import Tensor

_CELL_BY_CELL = keras.layers.RNN.inner_loop  # as Keras has it
_FUSED = 2  # the `implementation` with one product for all gates

# `A` and `s B` of each active adapter.
Factors: TypeAlias = "Sequence[tuple[Tensor, Tensor]]"

_NONE: Mapping[Any, Any] = MappingProxyType({})
# Of a thread: the factors that are formed, by bank, and what is added for a bias, by cell.
_FACTORS: ContextVar[Mapping[Any, Factors | None]] = ContextVar("formed_factors", default=_NONE)
_ADDED: ContextVar[Mapping[Any, Tensor]] = ContextVar("added_for_a_bias", default=_NONE)


@final
class Bias:
    """The bias of a cell, or what is added in its place."""

    def __get__(self, cell: Any, owner: type | None = None) -> Any:
        if cell is None:
            return self
        added = _ADDED.get().get(cell)
        return vars(cell).get("bias") if added is None else added

    def __set__(self, cell: Any, value: Any) -> None:
        vars(cell)["bias"] = value  # in `build` of the plain cell


class RecurrentCell(LoRALayer, BaseVariables):
    """Abstract base of adapted recurrent cells, in which two matrices are adapted.

        W = W0 + s A B        U = U0 + s A' B'

    `W0` is `kernel`, which acts on the input, and `U0` is `recurrent_kernel`, which acts on the
    state. They are formed once for all time steps, and cuDNN's kernels stay usable where Keras
    uses them. The adapters have no dropout, which would need products of its own at each step; the
    dropouts of the cell itself act as before.
    """

    kernel = EffectiveMatrix()
    recurrent_kernel = EffectiveMatrix()
    bias = Bias()

    def call(self, inputs: Tensor, states: Any, training: bool = False) -> Any:
        updates = self._updates([inputs, states[0]]) if training and self.adds_bias else None
        with forming([self]) if updates is None else self._adding(*updates):
            return super().call(inputs, states, training)

    @property
    def adds_bias(self) -> bool:
        """Whether the bias is added to both products, of the whole inputs."""
        return self.use_bias and not self.dropout and not self.recurrent_dropout

    def with_bias(self, update: Tensor, recurrent_update: Tensor) -> Tensor:
        """The bias and the updates of both products, as the cell adds them."""
        return ops.add(self.bias, ops.add(update, recurrent_update))

    def _updates(self, values: Sequence[Tensor]) -> list[Tensor] | None:
        """`s (x A) B` of each matrix; None if they are not all that the adapters do."""
        known, factors = _FACTORS.get(), list[Factors]()
        for bank in self.banks.values():
            formed = known[bank] if bank in known else _factors(bank)
            if formed is None:
                return None
            factors.append(formed)
        return list(map(_update, values, factors)) if any(factors) else None

    @contextlib.contextmanager
    def _adding(self, *updates: Tensor) -> Iterator[None]:
        token = _ADDED.set({**_ADDED.get(), self: self.with_bias(*updates)})
        try:
            with unformed([self]):
                yield
        finally:
            _ADDED.reset(token)


def _update(x: Tensor, factors: Factors) -> Tensor:
    return sum((ops.matmul(ops.matmul(x, a), b) for a, b in factors), start=0)


def _factors(bank: AdapterBank) -> Factors | None:
    """None with DoRA, of which the update is not all."""
    # Of the input only the number of axes counts, and it has two, as the matrix.
    terms = bank.computation.terms(bank.site, bank.site.matrix, False)
    return None if any(t.gain is not None for t in terms) else [(t.a, t.b) for t in terms]


@contextlib.contextmanager
def _forming_factors(cells: Iterable[RecurrentCell]) -> Iterator[None]:
    """Within the context, in this thread, the factors of cells that add their bias are formed."""
    formed = dict(_FACTORS.get())
    for bank in [bank for cell in cells if cell.adds_bias for bank in cell.banks.values()]:
        if bank not in formed:  # the loop of an `LSTM` goes on to that of `RNN`
            formed[bank] = _factors(bank)
    token = _FACTORS.set(formed)
    try:
        yield
    finally:
        _FACTORS.reset(token)


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

    @property
    def adds_bias(self) -> bool:
        return super().adds_bias and self.implementation == _FUSED


@keras.saving.register_keras_serializable(package="keras_lora", name="LoRAGRUCell")
class LoRAGRUCell(RecurrentCell, keras.layers.GRUCell):
    """A `GRUCell` with frozen kernels and trainable low-rank adapters; see `LoRALSTMCell`.

    Example:

    >>> LoRAGRUCell(5, rank=2).active_adapters
    ('default',)
    """

    @property
    def adds_bias(self) -> bool:
        return super().adds_bias and self.implementation == _FUSED and self.reset_after

    def with_bias(self, update: Tensor, recurrent_update: Tensor) -> Tensor:
        bias = ops.convert_to_tensor(self.bias)  # one for each product
        return ops.stack([bias[0] + update, bias[1] + recurrent_update])


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

    Args:
        rank: The number of axes of the convolutions, as in Keras; that of an adapter is in
            `adapters`.
        *args: As the cell takes them.
        **kwargs: Any argument of the cell, and those of `LoRALayer`.

    Example:

    >>> adapters = {"fr": {"rank": 2, "alpha": 4}}
    >>> LoRAConvLSTMCell(rank=2, filters=5, kernel_size=3, adapters=adapters).active_adapters
    ('fr',)
    """

    adds_bias = False  # the products are convolutions

    def __init__(self, rank: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(rank, *args, **kwargs)


def form_before_loops() -> None:
    """Wrap the loops of Keras's recurrent layers; called once, when this module is imported."""
    for layer_class in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU):
        layer_class.inner_loop = _forming_first(layer_class.inner_loop)


def _forming_first(loop: Any) -> Any:
    @functools.wraps(loop)
    def inner_loop(
        layer: Any, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False
    ) -> Any:
        cell = layer.cell  # need not be a layer
        inside = cell._flatten_layers() if isinstance(cell, keras.layers.Layer) else ()
        cells = [x for x in inside if isinstance(x, RecurrentCell)]
        with forming(cells, before_call=True), _forming_factors(cells if training else ()):
            by_cell = training and _would_take_kernels(layer) and _add_updates(cells)
            return (_CELL_BY_CELL if by_cell else loop)(
                layer, sequences, initial_state, mask, training
            )

    return inner_loop


def _would_take_kernels(layer: Any) -> bool:
    """Whether Keras computes the layer by a function that takes whole kernels, without cuDNN.

    On JAX a `GRU` on every device. Its gradients of kernels cost more than it saves.
    """
    jax = keras.backend.backend() == "jax"
    return jax and isinstance(layer, keras.layers.GRU) and layer.use_cudnn == "auto"


def _add_updates(cells: Sequence[RecurrentCell]) -> bool:
    """Whether all that the adapters of these cells do can be added to their biases."""
    known = _FACTORS.get()
    formed = [known.get(bank) for cell in cells for bank in cell.banks.values()]
    return None not in formed and any(formed)


form_before_loops()
