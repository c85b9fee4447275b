"""`AdapterHolder`: the adapters of a layer, and the slots that it computes with.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_tracker`: a built layer is locked, and adapters are added after it was built.
    `_track_variable`, `_untrack_variable`: adapters are taken away and put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.config import AdapterSpec
from keras_lora.initializers import factor_initializers
from keras_lora.layers.kinds import base_kernel, is_table, kernel_shape, wide_dtype, wide_kernel
from keras_lora.layers.slots import Adapter, Factor, LayerAdapter, Slot, adapter_shapes
from keras_lora.layers.state import LoRAState
from keras_lora.lowrank.equations import EinsumSplit, Shape, Tensor, split_equation


class Adapting:
    """Marks the classes of this package: they stand before Keras's in those of a layer."""


class AdapterHolder(Adapting, keras.layers.Layer):
    """Abstract: what a layer has more than its base, but for what it computes with that."""

    _lora: LoRAState

    @staticmethod
    @abstractmethod
    def kernel_equation(layer: keras.layers.Layer) -> str:
        """The einsum of a layer's input and kernel, such as `"...x,xy->...y"`.

        Asked of the base class's layers too, before they are adapted.
        """

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
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

    def add_adapter(
        self, name: str, spec: AdapterSpec, whole: Adapter | None = None
    ) -> LayerAdapter:
        """Make the factors of a new adapter. It does not act until it is activated."""
        a_shape, b_shape, *m_shape = self.factor_shapes(spec)
        fan_in, _ = self._split().matrix_shape(kernel_shape(self))
        a, b = factor_initializers(spec, fan_in, is_table(self))
        # Drawn where it is needed first, so that it is the norm of the kernel as that is then.
        m = Factor(self._draw_norms, *m_shape) if m_shape else None
        adapter = LayerAdapter(spec, Factor(a, a_shape), Factor(b, b_shape), m, whole)
        self._lora.adapters[name] = adapter
        return adapter

    def adapter_of(
        self, spec: AdapterSpec, factors: Sequence[Any], whole: Adapter | None = None
    ) -> LayerAdapter:
        """An adapter with these factors, for this layer; not in it yet."""
        a, b, *m = map(Factor, factors)
        return LayerAdapter(spec, a, b, m[0] if m else None, whole)

    def factor_shapes(self, spec: AdapterSpec) -> list[Shape]:
        """Of `A`, `B` and, for DoRA, `m`."""
        return adapter_shapes(self._split(), kernel_shape(self), spec)

    def put_adapter(self, name: str, adapter: LayerAdapter) -> None:
        """Take an adapter in, in the place of one of that name where there is one.

        Whether it acts is as before. What acts must fit (`fits`).
        """
        old = self._lora.adapters.get(name)
        for slot in self._lora.slots:
            if old is not None and slot.adapter is old:
                slot.park()
                slot.put(adapter, self.has_dropout)
        self._lora.adapters[name] = adapter

    def set_scale_factor(self, name: str, scale_factor: float) -> None:
        self._lora.adapters[name].scale_factor = scale_factor
        for slot in self._lora.slots:
            if slot.adapter is self._lora.adapters[name]:
                slot.refresh()

    def remove_adapter(self, name: str) -> None:
        """The inverse of `add_adapter`; the slot that it was in stays, empty."""
        self.activate([n for n in self._lora.active if n != name], self.trains_adapters)
        del self._lora.adapters[name]

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is part of what the layer computes in training."""
        return self._lora.seeds is not None

    def fits(self, specs: Sequence[AdapterSpec]) -> bool:
        """Whether such adapters can act without new variables, which need a new trace."""
        enough = len(specs) <= len(self._lora.slots)
        masked = self.has_dropout or not self._has_dropout(specs)
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
            if slot.adapter is None:
                slot.put(adapter, self.has_dropout)
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

    def _slot_variables(self) -> list[keras.Variable]:
        """Those of the slots, and what they share."""
        norms = [] if self._lora.squared_norms is None else [self._lora.squared_norms]
        return [v for slot in self._lora.slots for v in slot.variables] + norms

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

    def _made_slots(self, adapters: Sequence[LayerAdapter]) -> dict[int, Slot]:
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


def _grown(spec: AdapterSpec, old: Sequence[Slot]) -> AdapterSpec:
    """What a slot must take: this, and all that the one in its place did."""
    return dataclasses.replace(
        spec,
        rank=max([spec.rank, *(slot.rank for slot in old)]),
        use_dora=spec.use_dora or any(slot.magnitude is not None for slot in old),
    )
