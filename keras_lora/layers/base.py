"""`LoRALayer`, the abstract base of every adapted layer.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_tracker`: a built layer is locked, and adapters are added after it was built.
    `_track_variable`, `_untrack_variable`: adapters are taken away and put back.
    `_check_load_own_variables`: counts a layer's variables, adapters included, before it
        loads those of the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.config import AdapterSpec, invalid
from keras_lora.initializers import factor_initializers
from keras_lora.layers.checkpoint import (
    BASE_ONLY,
    STATE_PREFIX,
    adapter_values,
    assign_values,
    check_values,
)
from keras_lora.layers.matrix import (
    base_kernel,
    bias_of,
    is_table,
    kernel_constraint,
    kernel_shape,
    wide_dtype,
    wide_kernel,
)
from keras_lora.layers.rows import Rows
from keras_lora.layers.slots import Adapter, Factor, Group, Slot, adapter_shapes, dropped
from keras_lora.layers.state import LoRAState
from keras_lora.lowrank import EinsumSplit, Shape, Tensor, joint_gain, split_equation

DEFAULT_ADAPTER = "default"
# Marks a variable or a layer that was frozen here with the flag that it had before.
WAS_TRAINABLE = "_lora_was_trainable"


class Adapting:
    """Marks the classes of this package: they stand before Keras's in those of a layer."""


class LoRALayer(Adapting, keras.layers.Layer):
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

    @staticmethod
    @abstractmethod
    def kernel_equation(layer: keras.layers.Layer) -> str:
        """The einsum of a layer's input and kernel, such as `"...x,xy->...y"`.

        Asked of the base class's layers too, before they are adapted.
        """

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

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters of this layer by name, active or not."""
        return MappingProxyType(self._lora.adapters)

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that act in `call` and `kernel`."""
        return self._lora.active

    @property
    def slots(self) -> Sequence[Slot]:
        """The variables that the layer computes with; at least a slot for each that acts."""
        return tuple(self._lora.slots)

    @property
    def base_class(self) -> type:
        """The class that the layer has without its adapters."""
        return self._lora.base_class

    @property
    def base_kernel(self) -> keras.Variable:
        """The frozen kernel `W0`, or table; `assign_base` gives it other values."""
        return base_kernel(self)

    def assign_base(self, value: Tensor) -> None:
        """`W0 <- value`, and `|W0|`, which DoRA keeps, with it. Adapters stay as they are."""
        self.base_kernel.assign(value)
        self._measure()

    def fold(self) -> None:
        """`W0 <- W`, the effective kernel."""
        # Without the gradient: torch would take the kernel for a function of A and B.
        self.assign_base(ops.stop_gradient(self.kernel))

    @property
    def adapter_variables(self) -> list[keras.Variable]:
        """Every variable that the layer has beyond its base's, dropout seeds included."""
        seeds = [] if self._lora.seeds is None else [self._lora.seeds.state]
        return self._slot_variables() + seeds

    @property
    def base_variables(self) -> list[keras.Variable]:
        """The layer's own variables without those of its adapters."""
        ours = {id(v) for v in self.adapter_variables}
        return [v for v in self.weights if id(v) not in ours]

    def add_adapter(self, name: str, spec: AdapterSpec, group: Group | None = None) -> Adapter:
        """Make the factors of a new adapter. It does not act until it is activated."""
        a_shape, b_shape, *m_shape = self.factor_shapes(spec)
        fan_in, _ = self._split().matrix_shape(kernel_shape(self))
        a, b = factor_initializers(spec, fan_in, is_table(self))
        # Drawn where it is needed first, so that it is the norm of the kernel as that is then.
        m = Factor(self._draw_norms, *m_shape) if m_shape else None
        adapter = Adapter(spec, Factor(a, a_shape), Factor(b, b_shape), m, group)
        self._lora.adapters[name] = adapter
        return adapter

    def adapter_of(
        self, spec: AdapterSpec, factors: Sequence[Any], group: Group | None = None
    ) -> Adapter:
        """An adapter with these factors, for this layer; not in it yet."""
        a, b, *m = map(Factor, factors)
        return Adapter(spec, a, b, m[0] if m else None, group)

    def factor_shapes(self, spec: AdapterSpec) -> list[Shape]:
        """Of `A`, `B` and, for DoRA, `m`."""
        return adapter_shapes(self._split(), kernel_shape(self), spec)

    def put_adapter(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in, in the place of one of that name where there is one.

        Whether it acts is as before. What acts must fit (`fits`).
        """
        old = self._lora.adapters.get(name)
        for slot in self._lora.slots:
            if old is not None and slot.holds is old:
                slot.park()
                slot.put(adapter, self.masks)
        self._lora.adapters[name] = adapter

    def set_strength(self, name: str, strength: float) -> None:
        self._lora.adapters[name].strength = strength
        for slot in self._lora.slots:
            if slot.holds is self._lora.adapters[name]:
                slot.refresh()

    def remove_adapter(self, name: str) -> None:
        """The inverse of `add_adapter`; the slot that it was in stays, empty."""
        self.activate([n for n in self._lora.active if n != name], self.trains_adapters)
        del self._lora.adapters[name]

    @property
    def masks(self) -> bool:
        """Whether dropout is part of what the layer computes in training."""
        return self._lora.seeds is not None

    def fits(self, specs: Sequence[AdapterSpec]) -> bool:
        """Whether such adapters can act without new variables, which need a new trace."""
        enough = len(specs) <= len(self._lora.slots)
        masked = self.masks or not self._has_dropout(specs)
        pairs = zip(specs, self._lora.slots, strict=False)
        return enough and masked and all(slot.takes(spec) for spec, slot in pairs)

    def activate(self, names: Sequence[str], trainable: bool = True) -> None:
        """Let exactly these adapters act, and train or not; makes slots where they do not fit."""
        adapters = [self._lora.adapters[name] for name in names]
        made = self._made_slots(adapters)
        for slot in self._lora.slots:
            slot.park()
        for index, slot in made.items():
            self._untrack([v for old in self._lora.slots[index : index + 1] for v in old.variables])
            self._lora.slots[index : index + 1] = [slot]
            slot.start(adapters[index])
        for slot, adapter in zip(self._lora.slots, adapters, strict=False):
            if slot.holds is None:
                slot.put(adapter, self.masks)
        for slot in self._lora.slots[len(adapters) :]:
            slot.clear()
        self._lora.active = tuple(names)
        self.train_adapters(trainable)

    @property
    def trains_adapters(self) -> bool:
        return any(v.trainable for slot in self._lora.slots for v in slot.factors)

    def train_adapters(self, trainable: bool) -> None:
        for slot in self._lora.slots:
            for variable in slot.factors:
                variable.trainable = trainable

    @contextlib.contextmanager
    def without_slots(self) -> Iterator[None]:
        """Within the context the layer is its base, bit for bit. Not for what is compiled."""
        slots, self._lora.slots = self._lora.slots, []
        try:
            yield
        finally:
            self._lora.slots = slots

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
            warnings.warn(BASE_ONLY, stacklevel=2)
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

    def _slot_variables(self) -> list[keras.Variable]:
        """Those of the slots, and what they share."""
        norms = [] if self._lora.squared_norms is None else [self._lora.squared_norms]
        return [v for slot in self._lora.slots for v in slot.variables] + norms

    def _trains_bias(self) -> bool:
        if not self.built:
            return self._lora.train_bias
        bias = bias_of(self)
        return bias is not None and bias.trainable

    def _has_dropout(self, specs: Sequence[AdapterSpec]) -> bool:
        # What the adapter of a table takes is the number of a token.
        return not is_table(self) and any(spec.dropout for spec in specs)

    def _split(self, input_rank: int | None = None) -> EinsumSplit:
        return split_equation(self.kernel_equation(self), input_rank)

    def _draw_norms(self, shape: Shape, dtype: str) -> Tensor:
        """`|W0|` of each output, as an initializer."""
        return ops.cast(ops.sqrt(self._draw_squared_norms(shape, dtype)), dtype)

    def _draw_squared_norms(self, *_: Any, **__: Any) -> Tensor:
        return self._split().squared_norms(ops.stop_gradient(wide_kernel(self)))

    def _measure(self) -> None:
        """Take `|W0|` anew."""
        if self._lora.squared_norms is not None:
            self._lora.squared_norms.assign(self._draw_squared_norms())

    def _untrained_magnitudes(self) -> list[Factor]:
        """Those that are still `|W0|`."""
        found = [x.magnitude for x in self._lora.adapters.values() if x.magnitude is not None]
        if not found:
            return []
        norms = ops.convert_to_numpy(self._draw_norms((), "float32"))
        return [magnitude for magnitude in found if np.array_equal(magnitude, norms)]

    def _wide_dtype(self) -> str:
        return wide_dtype(self.base_kernel)

    def _made_slots(self, adapters: Sequence[Adapter]) -> dict[int, Slot]:
        """New slots, by their place, for those of these adapters that do not fit into the old."""
        if self.fits([adapter.spec for adapter in adapters]):
            return {}
        made: list[keras.Variable] = []

        def new(name: str, shape: Shape, initializer: Any, trainable: bool) -> keras.Variable:
            dtype = "float32" if trainable else self._wide_dtype()
            options = {"initializer": initializer, "dtype": dtype, "trainable": trainable}
            # In 16 bits a gain that is near 1 would be 1.
            options["autocast"] = not name.startswith(("lora_magnitude", "lora_squared_norms"))
            made.append(self.add_weight(name=name, shape=shape, **options))
            return made[-1]

        specs, old = [adapter.spec for adapter in adapters], self._lora.slots
        needed = [i for i, s in enumerate(specs) if i >= len(old) or not old[i].takes(s)]
        shapes = {i: self.factor_shapes(_grown(specs[i], old[i : i + 1])) for i in needed}
        try:
            with self._unlocked():
                slots = {i: Slot.make(new, i, adapters[i], shapes[i]) for i in needed}
                norms = self._lora.squared_norms
                if norms is None and any(spec.use_dora for spec in specs):
                    shape = self._split().norm_shape(kernel_shape(self))
                    norms = new("lora_squared_norms", shape, self._draw_squared_norms, False)
                if self._has_dropout(specs) and self._lora.seeds is None:
                    self._lora.seeds = keras.random.SeedGenerator()
                    self._tracker.add_to_store("seed_generators", self._lora.seeds)
                self._lora.squared_norms = norms
        except BaseException:
            self._untrack(made)
            raise
        return slots

    def _track_adapters(self) -> None:
        trains = self.trains_adapters
        with self._unlocked():
            for variable in [v for slot in self._lora.slots for v in slot.factors]:
                variable.trainable = True  # else Keras files it with the statistics
            for variable in self._slot_variables():
                self._track_variable(variable)
            if self._lora.seeds is not None:
                self._tracker.add_to_store("seed_generators", self._lora.seeds)
        self.train_adapters(trains)

    def _untrack_adapters(self) -> None:
        self._untrack(self._slot_variables())
        with self._unlocked():
            self._tracker.untrack(self._lora.seeds)

    def _untrack(self, variables: Sequence[keras.Variable]) -> None:
        for variable in variables:
            self._untrack_variable(variable)

    @contextlib.contextmanager
    def _unlocked(self) -> Iterator[None]:
        locked = self._tracker.locked
        self._tracker.unlock()
        try:
            yield
        finally:
            if locked:
                self._tracker.lock()

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


def _grown(spec: AdapterSpec, old: Sequence[Slot]) -> AdapterSpec:
    """What a slot must take: this, and all that the one in its place did."""
    return dataclasses.replace(
        spec,
        rank=max([spec.rank, *(slot.rank for slot in old)]),
        use_dora=spec.use_dora or any(slot.magnitude is not None for slot in old),
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
