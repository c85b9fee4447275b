"""`LoRALayer`, the abstract base of every adapted layer.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_check_load_own_variables`: counts a layer's variables, adapters included, before it
        loads those of the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_lora.checks import invalid, warn
from keras_lora.config import AdapterSpec, check_start
from keras_lora.layers.adaptable import check_adaptable, check_adapter_name, remember_flag
from keras_lora.layers.adapter import LayerAdapter
from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.checkpoint import (
    BASE_ONLY,
    STATE_PREFIX,
    active_values,
    adapter_values,
    assign_values,
    check_values,
    saved_active,
    untrained_values,
)
from keras_lora.layers.computation import Computation, computing
from keras_lora.layers.converting import fill
from keras_lora.layers.guarded import Guarded, adapted_class
from keras_lora.layers.kinds import KINDS, kinds_of, only
from keras_lora.layers.quantized import mode_of
from keras_lora.layers.rematerialized import Rematerialized
from keras_lora.layers.slots import Room, Slot
from keras_lora.layers.state import LoRAState, own_weights
from keras_lora.lowrank.equations import Tensor
from keras_lora.lowrank.products import adapted_sum

DEFAULT_ADAPTER = "default"


class LoRALayer(Guarded, Rematerialized, keras.layers.Layer):
    """Abstract base of every adapted layer.

        y = act(x W0 + b + sum_i s_i (drop_i(x) A_i) B_i)     over the active adapters i

    `W0` is frozen, `A_i` and `B_i` are float32 whatever the layer's dtype, and the product
    `A_i B_i` is never formed in the forward pass. A final class is also a subclass of the Keras
    layer that it adapts, whose row in `KINDS` says how the kernel acts. A final class of
    your own may change that row: a static method `kernel_equation(layer)` gives the einsum of the
    layer's input and kernel, such as `"...x,xy->...y"`, and `takes_dora = False` refuses DoRA.

    With `use_dora`, adapter `i` has a trainable norm `m_i` of the weights of each output:

        W_i = m_i (W0 + s_i A_i B_i) / |W0 + s_i A_i B_i|      W = W0 + sum_i (W_i - W0)

    Args:
        *args: As the base layer takes them.
        rank: Inner size `r` of the adapter `"default"`.
        alpha: Numerator of its scale, `s = alpha / r`.
        dropout: Dropout on the adapter's input while training, in `[0, 1)`.
        use_rslora: `s = alpha / sqrt(r)`.
        use_dora: Also train a magnitude of each output.
        init: How `A` and `B` start; see `AdapterSpec`.
        freeze_a: Train `B` alone; see `AdapterSpec`.
        adapters: `{name: AdapterSpec fields}` instead of the seven above, for several adapters.
        active: Names of the active adapters; all of them by default.
        train_bias: Train the bias beside the adapters.
        room: What the slots have room for, where that is more than `active`: from `get_config`.
        **kwargs: As the base layer takes them.

    Raises:
        ValueError: an invalid spec, a constraint on the kernel, or Keras's own `lora_rank`.

    Example (of a class of your own: `register_lora_class`):

    >>> from keras_lora.layers import LoRADense
    >>> LoRADense(5, adapters={"fr": {"rank": 2, "alpha": 4}}).active_adapters
    ('fr',)
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Give a class the name of the class that it adapts.

        Keras makes the paths of a weights file, and the names of layers, from `__name__`. With the
        same name, a checkpoint of the base fits the adapted model.
        """
        super().__init_subclass__(**options)
        cls.__name__ = adapted_class(cls).__name__
        own, changes = vars(cls), dict[str, Any]()
        if "kernel_equation" in own:
            changes["equation"] = own["kernel_equation"].__func__
        if "takes_dora" in own:
            changes["takes_dora"] = own["takes_dora"]
        if changes:
            KINDS[cls] = {"": dataclasses.replace(only(kinds_of(cls), cls), **changes)}

    def __init__(
        self,
        *args: Any,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "kaiming_uniform",
        freeze_a: bool = False,
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        active: Sequence[str] | None = None,
        train_bias: bool = False,
        room: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if adapters is None:
            spec = AdapterSpec(
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                use_rslora=use_rslora,
                use_dora=use_dora,
                init=init,
                freeze_a=freeze_a,
            )
            specs = {DEFAULT_ADAPTER: spec}
        else:
            specs = {check_adapter_name(n): AdapterSpec(**spec) for n, spec in adapters.items()}
        for spec in specs.values() if room is None else ():
            check_start(spec.init, [spec.alpha])
        if kwargs.get("weights") is not None:
            fix = "build the layer and assign to its base_kernel"
            raise invalid("weights", "None", type(kwargs["weights"]), fix)
        chosen = tuple(specs if active is None else active)
        if not set(chosen) <= set(specs):
            raise invalid("active", f"names among {sorted(specs)}", active)
        kinds = kinds_of(type(self))
        takes_dora = all(kind.takes_dora for kind in kinds.values())
        if not takes_dora and any(spec.use_dora for spec in specs.values()):
            raise invalid("use_dora", f"False for a {type(self).__qualname__}", True)
        starts = [kind.start for kind in kinds.values() if kind.start is not None]
        if starts and any(spec.freeze_a for spec in specs.values()):
            raise invalid("freeze_a", "False for a layer whose A starts at zero", True)
        super().__init__(*args, **kwargs)
        check_adaptable(self)
        self._lora = LoRAState.of(self, adapted_class(type(self)), kinds)
        self._lora.pending, self._lora.pending_active = specs, chosen
        self._lora.pending_room = None if room is None else Room(**room)
        self._lora.train_bias = train_bias

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, type(self).__qualname__, 1)

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)
        biases = {id(bank.site.bias) for bank in self.banks.values()}
        for variable in self.base_variables:
            remember_flag(variable)
            variable.trainable = id(variable) in biases and self._lora.train_bias
        for bank in self.banks.values():
            state = self._lora
            fill(bank, state.pending, state.pending_active, state.pending_room)
        self._lora.pending = {}

    @property
    def banks(self) -> Mapping[str, AdapterBank]:
        """The bank of each matrix, by the matrix's name; a layer's only matrix is named `""`."""
        return self._lora.banks

    @property
    def bank(self) -> AdapterBank:
        """The bank of the layer's only matrix.

        Raises:
            ValueError: the layer has several matrices.
        """
        return only(self._lora.banks, self)

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
        """The adapters of this layer by name, active or not."""
        return self.bank.adapters

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are active in `call` and `kernel`."""
        if not self.built:
            return self._lora.pending_active
        return tuple(dict.fromkeys(n for bank in self.banks.values() for n in bank.active))

    @property
    def slots(self) -> Sequence[Slot]:
        """The variables that the layer computes with; at least a slot for each active adapter."""
        return tuple(slot for bank in self.banks.values() for slot in bank.slots)

    @property
    def base_class(self) -> type:
        """The class that the layer has without its adapters."""
        return self._lora.base_class

    @property
    def base_kernel(self) -> keras.Variable:
        """The variable with the frozen `W0`, or its integers; `assign_base` changes its values."""
        return self.bank.site.matrix

    def assign_base(self, value: Tensor) -> None:
        """`W0 <- value`, and measure `|W0|` again for DoRA. Adapters stay as they are."""
        self.bank.assign_base(value)

    @property
    def adapter_variables(self) -> list[keras.Variable]:
        """Every variable that the layer has beyond its base's, dropout seeds included."""
        return [v for bank in self.banks.values() for v in bank.variables]

    @property
    def base_variables(self) -> list[keras.Variable]:
        """The layer's own variables without those of its adapters."""
        ours = {id(v) for v in self.adapter_variables}
        return [v for v in own_weights(self) if id(v) not in ours]

    def fold(self) -> None:
        """`W0 <- W`, the effective kernel; of every matrix."""
        for bank in self.banks.values():
            bank.fold()

    def without_adapters(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, in this thread, the layer is its base, bit for bit."""
        return computing({bank: bank.without_adapters() for bank in self.banks.values()})

    def computing(self, computation: Computation) -> contextlib.AbstractContextManager[None]:
        """Within the context the layer is computed with other adapters than those of its slots."""
        return computing({self.bank: computation})

    @property
    def kernel(self) -> Tensor:
        """The effective kernel `W`, such as `W0 + sum_i s_i A_i B_i`, in the dtype of `W0`.

        Summed in float32, or in the dtype of `W0` if that is wider, and rounded once. `W0`
        itself, as a variable, where there are no slots.
        """
        return self.bank.kernel

    def adapted_product(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """`x W0 + sum_i s_i (drop_i(x) A_i) B_i`: the layer before bias and activation.

        With DoRA it is `x W0 + sum_i (g_i - 1) drop_i(x) W0 + g_i s_i (drop_i(x) A_i) B_i` with
        `g_i = m_i / |W0 + s_i A_i B_i|`, the norm being a constant in the gradient.
        """
        for bank in self.banks.values():  # of several matrices, one after the other
            computation, site = bank.computation, bank.site
            terms = computation.terms(site, inputs, training)
            inputs = adapted_sum(computation.products(site, inputs), inputs, terms, training)
        return inputs

    def get_config(self) -> dict[str, Any]:
        banks = list(self.banks.values())
        built = {name: adapter.acting_spec for name, adapter in banks[0].adapters.items()}
        specs = self._lora.pending | built
        room = banks[0].room if self.built else self._lora.pending_room
        return {
            **super().get_config(),
            "adapters": {name: spec.to_dict() for name, spec in specs.items()},
            "active": list(banks[0].active if self.built else self._lora.pending_active),
            "train_bias": self._trains_bias(),
            "room": dataclasses.asdict(room) if room else None,
        }

    def save_own_variables(self, store: Any) -> None:
        """Store the base's variables under the base's keys, the adapters under their own.

        So a checkpoint of the base loads into the adapted layer.
        """
        self.save_base_variables(store)
        for key, value in (adapter_values(self._lora) | active_values(self._lora)).items():
            store[key] = value

    def save_base_variables(self, store: Any) -> None:
        """Store what the plain layer would store."""
        with self.without_adapters():  # the base class stores `self.kernel`
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Load the base and, where the file has them, the adapters.

        After a file of a base alone, untrained magnitudes and rows of tokens are the new base's.
        """
        keys = list(store.keys())
        if saved := {key: store[key] for key in keys if key.startswith(STATE_PREFIX)}:
            check_values(self._lora, saved, self.path)
        if self._lora.checked is not None:
            self._lora.checked += saved_active(self._lora, saved)
            return
        untrained = [pair for bank in self.banks.values() for pair in untrained_values(bank)]
        with self.without_adapters():
            super().load_own_variables({key: store[key] for key in keys if key not in saved})
        for bank in self.banks.values():
            bank.measure()
        if not saved:
            warn(BASE_ONLY)
            for factor, of_base in untrained:
                factor.assign(of_base())
        assign_values(self._lora, saved)

    def adapted_output(self, inputs: Tensor, training: bool | None, bias: Tensor | None) -> Tensor:
        """`act(x W0 + b + delta)`; the base's own `call` where no adapter can change it.

        Args:
            inputs: `x`.
            training: Whether dropout applies.
            bias: `b`, in a shape that adds to the product; None for a layer without bias.
        """
        computations = [bank.computation for bank in self.banks.values()]
        if not any(computation.changes_output for computation in computations):
            return (super().quantized_call if mode_of(self) else super().call)(inputs)
        x = computations[-1].add_bias(self.adapted_product(inputs, training), bias)
        return x if self.activation is None else self.activation(x)

    def quantized_call(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.call(*args, **kwargs)  # whose frozen product is Keras's own quantized one

    def _trains_bias(self) -> bool:
        if not self.built:
            return self._lora.train_bias
        biases = [bank.site.bias for bank in self.banks.values()]
        return any(bias is not None and bias.trainable for bias in biases)

    def _check_load_own_variables(self, store: Any) -> None:
        expected = len(self.base_variables)
        if len(store.keys()) != expected:
            # Keras tries a layer that failed again with other, empty parts of the file and
            # reports the last error only. The first error is the true one.
            first = None if store.keys() else self._lora.refusal
            raise ValueError(
                first
                or f"Layer '{self.path}' expected {expected} base variables in the file. "
                f"Received: {len(store.keys())}."
            )


def plain_class(layer: keras.layers.Layer) -> type:
    """The class that a layer has without adapters."""
    return layer.base_class if isinstance(layer, LoRALayer) else type(layer)
