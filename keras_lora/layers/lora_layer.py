"""`LoRALayer`, the abstract base of every adapted layer.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_check_load_own_variables`: counts a layer's variables, adapters included, before it
        loads those of the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_lora.checks import invalid, warn
from keras_lora.config import AdapterSpec
from keras_lora.layers.bank import AdapterHolder, Adapting
from keras_lora.layers.checkpoint import (
    BASE_ONLY,
    STATE_PREFIX,
    adapter_values,
    assign_values,
    check_values,
)
from keras_lora.layers.kinds import (
    bias_of,
    is_table,
    kernel_constraint,
)
from keras_lora.layers.rows import Rows
from keras_lora.layers.slots import Slot, dropped
from keras_lora.layers.state import LoRAState
from keras_lora.lowrank.equations import EinsumSplit, Tensor, joint_gain

DEFAULT_ADAPTER = "default"
# Marks a variable or a layer that was frozen here with the flag that it had before.
WAS_TRAINABLE = "_lora_was_trainable"


class LoRALayer(AdapterHolder):
    """Abstract base of every adapted layer.

        y = act(x W0 + b + sum_i s_i (drop_i(x) A_i) B_i)     over the active adapters i

    `W0` is frozen, `A_i` and `B_i` are float32 whatever the layer's dtype, and the product
    `A_i B_i` is never formed in the forward pass. A final class says which einsum its kernel
    belongs to (`kernel_equation`) and is also a subclass of the Keras layer that it adapts.

    With `use_dora`, of each output the weights of an adapter have the trainable norm `m_i`:

        W_i = m_i (W0 + s_i A_i B_i) / |W0 + s_i A_i B_i|      W = W0 + sum_i (W_i - W0)

    Args:
        *args: As the base layer takes them.
        rank: Inner size `r` of the adapter `"default"`.
        alpha: Numerator of its scale, `s = alpha / r`.
        dropout: Dropout on the adapter's input while training, in `[0, 1)`.
        use_rslora: `s = alpha / sqrt(r)`.
        use_dora: Train a magnitude of each output too.
        init: How `A` starts; see `AdapterSpec`.
        adapters: `{name: AdapterSpec fields}` instead of the six above, for several adapters.
        active: Names of the adapters that act; all of them by default.
        train_bias: Train the bias beside the adapters.
        **kwargs: As the base layer takes them.

    Raises:
        ValueError: an invalid spec, a constraint on the kernel, or Keras's own `lora_rank`.
    """

    # Whether an adapter may have DoRA's magnitude: whether `base_kernel` is all that acts on x.
    takes_dora = True

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a class go by the name of the class that it adapts.

        Keras makes the paths of a weights file, and the names of layers, from `__name__`: so a
        checkpoint of the base fits the adapted model, in whatever container its layers are.
        """
        super().__init_subclass__(**options)
        cls.__name__ = _adapted_class(cls).__name__

    def __init__(
        self,
        *args: Any,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init: str = "kaiming_uniform",
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
        active: Sequence[str] | None = None,
        train_bias: bool = False,
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
            )
            specs = {DEFAULT_ADAPTER: spec}
        else:
            specs = {check_adapter_name(n): AdapterSpec(**spec) for n, spec in adapters.items()}
        if kwargs.get("weights") is not None:
            fix = "build the layer and assign to its base_kernel"
            raise invalid("weights", "None", type(kwargs["weights"]), fix)
        acting = tuple(specs if active is None else active)
        if not set(acting) <= set(specs):
            raise invalid("active", f"names among {sorted(specs)}", active)
        if not self.takes_dora and any(spec.use_dora for spec in specs.values()):
            raise invalid("use_dora", f"False for a {type(self).__qualname__}", True)
        super().__init__(*args, **kwargs)
        check_adaptable(self)
        self._lora = LoRAState(
            base_class=_adapted_class(type(self)),
            pending=specs,
            active=acting,
            train_bias=train_bias,
        )

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, type(self).__qualname__, 1)

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)
        for variable in self.base_variables:
            remember_flag(variable)
            variable.trainable = variable is bias_of(self) and self._lora.train_bias
        active = self._lora.active
        for name, spec in self._lora.pending.items():
            self.add_adapter(name, spec)
        self._lora.pending = {}
        self.activate(active)

    def fold(self) -> None:
        """`W0 <- W`, the effective kernel."""
        # Without the gradient: torch would take the kernel for a function of A and B.
        self.assign_base(ops.stop_gradient(self.kernel))

    @contextlib.contextmanager
    def with_rows(self, rows: Rows) -> Iterator[None]:
        """Within the context each row of a batch has adapters of its own."""
        self._lora.rows = rows
        try:
            yield
        finally:
            self._lora.rows = None

    @property
    def kernel(self) -> Tensor:
        """The effective kernel `W`, such as `W0 + sum_i s_i A_i B_i`, in the dtype of `W0`.

        Summed in float32, or in the dtype of `W0` where that is wider, and rounded once.
        `W0` itself, as a variable, where no adapter acts.
        """
        base = self.base_kernel
        if self._lora.rows is not None:
            self._lora.rows.refuse("its kernel is read, and there is another for each row")
        if not self._lora.slots:
            return base
        wide = self._wide_dtype()
        split = self._split()
        total = ops.cast(base, wide)
        updates = [self._update(slot, split, total, wide) for slot in self._lora.slots]
        gains = [gain for _, _, gain in updates if gain is not None]
        if gains:
            total = split.times_gain(total, joint_gain(gains), split.kernel)
        for a, b, _ in updates:
            # Not `+=`: on torch `total` is still the memory of the variable.
            total = total + split.delta(a, b)
        return ops.cast(total, base.dtype)

    def adapted_product(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """`x W0 + sum_i s_i (drop_i(x) A_i) B_i`: the layer before bias and activation.

        Of DoRA it is `x W0 + sum_i (g_i - 1) drop_i(x) W0 + g_i s_i (drop_i(x) A_i) B_i` with
        `g_i = m_i / |W0 + s_i A_i B_i|`, the norm being a constant in the gradient.
        """
        split = self._split(len(inputs.shape))
        if self._lora.rows is not None:
            return self._lora.rows.product(split, inputs, self.base_kernel)
        terms, kernel = [], ops.convert_to_tensor(self.base_kernel)
        for slot in self._lora.slots:
            x = inputs
            if training and self._lora.seeds is not None:
                x = dropped(x, slot.rate, self._lora.seeds)
            terms.append((x, *self._update(slot, split, kernel, self.compute_dtype)))
        return split.adapted_product(inputs, kernel, terms)

    def _update(
        self, slot: Slot, split: EinsumSplit, kernel: Tensor, dtype: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`A_i`, `g_i s_i B_i`, and `g_i` where the slot has a magnitude."""
        b, gain = slot.scaled_b(self._wide_dtype()), None
        if slot.magnitude is not None:
            gain = slot.magnitude.gain(split, kernel, self._lora.squared_norms, slot.a, b)
            b = split.times_gain(b, gain, split.b)
        return ops.cast(slot.a, dtype), ops.cast(b, dtype), gain

    def get_config(self) -> dict[str, Any]:
        built = {name: adapter.acting_spec for name, adapter in self._lora.adapters.items()}
        specs = self._lora.pending | built
        return {
            **super().get_config(),
            "adapters": {name: dataclasses.asdict(spec) for name, spec in specs.items()},
            "active": list(self._lora.active),
            "train_bias": self._trains_bias(),
        }

    def enable_lora(self, *_: Any, **__: Any) -> None:
        """Refused: Keras's own adapters would add to these, unseen by merging and saving."""
        raise ValueError(
            f"Layer '{self.path}': expected a layer without adapters of keras_lora to enable "
            f"Keras's own LoRA on. Received: adapters {list(self._lora.adapters)}. Add another "
            "adapter with apply_lora(model, config, name=...)."
        )

    def save_own_variables(self, store: Any) -> None:
        """The base's variables under the base's keys; the adapters under keys of their own.

        So a checkpoint of the base loads into the adapted layer.
        """
        with self.without_slots():  # the base class stores `self.kernel`
            super().save_own_variables(store)
        for key, value in adapter_values(self._lora).items():
            store[key] = value

    def load_own_variables(self, store: Any) -> None:
        """Load the base and, where the file has them, the adapters.

        From a file of a base alone, a magnitude that was never trained is the base's new norm, so
        that a fresh adapter goes on changing nothing.
        """
        keys = list(store.keys())
        saved = {key: store[key] for key in keys if key.startswith(STATE_PREFIX)}
        if saved:
            check_values(self._lora, saved, self.path)
        untrained = self._untrained_magnitudes()
        super().load_own_variables({key: store[key] for key in keys if key not in saved})
        self._measure()
        if not saved:
            warn(BASE_ONLY)
            for magnitude in untrained:
                magnitude.assign(self._draw_norms((), "float32"))
        assign_values(self._lora, saved)

    def save_assets(self, dir_path: str) -> None:  # noqa: ARG002
        """Stop the writing of a `.keras` file that could not be read back.

        Keras calls this for every layer of a `.keras` file and never for `save_weights`.
        """
        if self._lora.unsaveable:
            raise ValueError(self._lora.unsaveable)

    def load_assets(self, dir_path: str) -> None:
        """Nothing: `save_assets` writes nothing."""

    def _affine(self, inputs: Tensor, training: bool | None) -> Tensor:
        """`act(x W0 + b + delta)`; the base's own `call` where there is no slot."""
        rows = self._lora.rows
        if rows is None and not self._lora.slots:
            return super().call(inputs, training=training)
        x = self.adapted_product(inputs, training)
        if rows is not None and rows.bias is not None:
            x = rows.add_bias(x)
        elif self.bias is not None:
            x = ops.add(x, self.bias)
        return x if self.activation is None else self.activation(x)

    def _trains_bias(self) -> bool:
        if not self.built:
            return self._lora.train_bias
        bias = bias_of(self)
        return bias is not None and bias.trainable

    def _check_load_own_variables(self, store: Any) -> None:
        expected = len(self.base_variables)
        if len(store.keys()) != expected:
            # Keras tries a layer that failed again at other, empty places of the file, and
            # reports the last error only: the first is the one to see.
            first = None if store.keys() else self._lora.refusal
            raise ValueError(
                first
                or f"Layer '{self.path}' expected {expected} base variables in the file. "
                f"Received: {len(store.keys())}."
            )


def _adapted_class(lora_class: type) -> type:
    return next(c for c in lora_class.__mro__ if not issubclass(c, Adapting))


def plain_class(layer: keras.layers.Layer) -> type:
    """The class of a layer, or the one that it has without its adapters."""
    return layer.base_class if isinstance(layer, LoRALayer) else type(layer)


def check_adaptable(layer: keras.layers.Layer) -> None:
    """Refuse a layer whose kernel is not simply `W0`.

    Raises:
        ValueError: a kernel constraint, Keras's own LoRA, quantized weights, a diagonal.
    """
    name = layer.path or layer.name
    constraint = kernel_constraint(layer)
    if constraint is not None:
        which = "embeddings_constraint" if is_table(layer) else "kernel_constraint"
        raise ValueError(
            f"Layer '{name}': expected no {which.replace('_', ' ')}, since a constraint on W0 does "
            f"not hold for W0 + AB. Received: {which}={constraint}. Exclude the layer or build it "
            "without the constraint."
        )
    if layer.lora_enabled or layer.lora_rank:
        raise ValueError(
            f"Layer '{name}': expected a layer without Keras's own LoRA. Received: "
            f"lora_rank={layer.lora_rank}. Do not call `enable_lora` on a model that keras_lora "
            "adapts."
        )
    if layer.dtype_policy.quantization_mode is not None:
        raise ValueError(
            f"Layer '{name}': expected floating-point weights. Received: "
            f"quantization_mode={layer.dtype_policy.quantization_mode!r}. Adapt and merge first, "
            "then quantize, or exclude the layer."
        )


def check_adapter_name(name: object) -> str:
    if not isinstance(name, str) or not name or "/" in name or "." in name:
        raise invalid(
            "name", "a non-empty adapter name without '/' or '.'", name, 'try name="default"'
        )
    return name


def remember_flag(item: keras.layers.Layer | keras.Variable) -> None:
    """Note the trainable flag that `freezing.thaw` gives back; the first note counts."""
    if not hasattr(item, WAS_TRAINABLE):
        setattr(item, WAS_TRAINABLE, item.trainable)
