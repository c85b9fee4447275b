"""`AdapterBank`: the adapters of one matrix, and the slots that the matrix is computed with.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_tracker`: where a layer has its seed generators.
    `_track_variable`, `_untrack_variable`: adapters are taken away and put back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

import keras
import numpy as np
from keras import ops

from keras_lora.config import AdapterSpec
from keras_lora.initializers import Start
from keras_lora.layers.adapter import (
    Adapter,
    LayerAdapter,
    adapter_shapes,
    drawn_factors,
    factor_names,
    layer_adapter,
)
from keras_lora.layers.computation import Computation, chosen
from keras_lora.layers.kinds import Site
from keras_lora.layers.layouts import drawn, factor_layout, laid_out, layout_of, whole
from keras_lora.layers.slot_adapters import SlotAdapters
from keras_lora.layers.slots import Room, Slot
from keras_lora.layers.unlocked import unlocked
from keras_lora.lowrank.equations import Shape, Tensor


@final
class AdapterBank:
    """The adapters of a site (one matrix of one layer), by name, and the slots of the site.

    A layer has a bank for each of its matrices. The bank adds the variables of slots to the
    layer, which is all that the layer itself knows of its adapters.

    Attributes:
        site: The matrix.
        slots: The variables that the site is computed with; at least a slot for each active
            adapter.
        seeds: The seed generator of dropout. Made when an adapter with dropout is first active;
            dropout is then part of the computation for good.
        squared_norms: `|W0|^2` of each output. Made when an adapter with DoRA is first active.
        pads: Whether an adapter may be in a slot of a higher rank. Not where an optimizer trains
            it that does not go by element.
        traced_by_name: Whether a compiled function computes with adapters that a context chose by
            name, so that the function is stale once other adapters are in the slots.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.slots: list[Slot] = []
        self.seeds: keras.random.SeedGenerator | None = None
        self.squared_norms: keras.Variable | None = None
        self.pads = True
        self.traced_by_name = False
        self._adapters: dict[str, LayerAdapter] = {}
        self._active: tuple[str, ...] = ()
        self._in_slots = SlotAdapters(self)

    @property
    def adapters(self) -> Mapping[str, LayerAdapter]:
        """The adapters by name, active or not."""
        return MappingProxyType(self._adapters)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the active adapters; in a context of this thread, of those it chose."""
        computation = self.computation
        if not isinstance(computation, SlotAdapters):
            return self._active
        return tuple(n for i, n in enumerate(self._active) if i in computation.multipliers)

    @property
    def computation(self) -> Computation:
        """Which adapters the site is computed with: those in the slots, or those of a context."""
        return chosen(self, self._in_slots)

    def choice(self, factors: Mapping[str, float]) -> SlotAdapters:
        """The computation with these active adapters alone, each scaled by a factor."""
        before = self.computation
        assert isinstance(before, SlotAdapters)
        pairs, multipliers = enumerate(map(factors.get, self._active)), before.multipliers
        return SlotAdapters(
            self, {i: f * multipliers[i] for i, f in pairs if f is not None and i in multipliers}
        )

    def add(
        self,
        name: str,
        spec: AdapterSpec,
        adapter: Adapter | None = None,
        start: Start | None = None,
        measured: Any = None,
    ) -> LayerAdapter:
        """Make the factors of a new adapter, by the start of its spec or another one.

        It is not active before `activate`. `measured` is what the start has measured on data.
        """
        self.site.check_tokens(spec.train_tokens, self.site.layer.name)
        start = self.site.kind.start_of(spec.init) if start is None else start
        started = start.started(self.site.frozen_matrix(measured), spec.rank, spec.scaling)
        if spec.has_counterpart:
            started = started.drawn_once()
        rows = self.site.rows(spec.train_tokens)
        draws = {"a": started.a, "b": started.b, "magnitude": self.norms, "tokens": rows}
        values = drawn_factors(self.shapes(spec), draws, self.site.wide_dtype)
        self._adapters[name] = layer_adapter(spec, values, adapter)
        return self._adapters[name]

    def ordinary(self, name: str) -> LayerAdapter:
        """An adapter as ordinary LoRA: of twice the rank where it has a counterpart."""
        return self._adapters[name].ordinary(self.site.split().rank_axes[1])

    def put(self, name: str, adapter: LayerAdapter) -> None:
        """Add an adapter, or let it replace the adapter of that name.

        It is active if the replaced adapter was, and must then fit (`fits`).
        """
        old = self._adapters.get(name)
        for slot in self.slots:
            if old is not None and slot.adapter is old:
                slot.park()
                slot.put(adapter, self.has_dropout)
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """The inverse of `add`; the slot that the adapter was in stays, empty."""
        self.activate([n for n in self._active if n != name], self.trains)
        del self._adapters[name]

    def set_scale_factor(self, name: str, factor: float) -> None:
        self._adapters[name].scale_factor = factor
        for slot in self.slots:
            if slot.adapter is self._adapters[name]:
                slot.refresh()

    def shapes(self, spec: AdapterSpec) -> dict[str, Shape]:
        """The shapes of the factors by name."""
        shapes = adapter_shapes(self.site.split(), self.site.shape, spec)
        return dict(zip(factor_names(spec), shapes, strict=True))

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is part of what the site computes in training."""
        return self.seeds is not None

    def fits(self, specs: Sequence[AdapterSpec]) -> bool:
        """Whether adapters of these specs can be active without new variables and a new trace."""
        enough = len(specs) <= len(self.slots)
        masked = self.has_dropout or not self._need_dropout(specs)
        pairs = zip(specs, self.slots, strict=False)
        return enough and masked and all(slot.takes(spec, self.pads) for spec, slot in pairs)

    def activate(self, names: Sequence[str], trainable: bool = True) -> None:
        """Make exactly these adapters active, training or not; add slots where they do not fit."""
        adapters = [self._adapters[name] for name in names]
        made = self._made_slots(adapters)
        for slot in self.slots:
            slot.park()
        self._take(made)
        for index, slot in made.items():
            slot.start(adapters[index])
        for slot, adapter in zip(self.slots, adapters, strict=False):
            if slot.adapter is None:
                slot.put(adapter, self.has_dropout)
        for slot in self.slots[len(adapters) :]:
            slot.clear()
        self._active = tuple(names)
        self.train(trainable)

    @property
    def room(self) -> Room:
        """What the slots have room for; `make_room` makes slots alike in another layer."""
        return Room.of(self.slots, self.has_dropout, self.trains)

    def make_room(self, room: Room) -> None:
        """Make empty slots before any adapter is active."""
        zeros = [list(map(np.zeros, self.shapes(spec).values())) for spec in room.specs]
        self._take(self._made_slots(list(map(layer_adapter, room.specs, zeros))))
        self.activate([], room.trainable)

    @property
    def trains(self) -> bool:
        return any(v.trainable for slot in self.slots for v in slot.factors)

    def train(self, trainable: bool) -> None:
        trained = {id(v) for v in self.training()} if trainable else ()
        for variable in [v for slot in self.slots for v in slot.factors]:
            variable.trainable = id(variable) in trained

    def training(self, names: Sequence[str] | None = None) -> list[keras.Variable]:
        """The variables of slots that train with these adapters; by default the active ones."""
        adapters = [self._adapters[name] for name in (self._active if names is None else names)]
        pairs = list(zip(self.slots, adapters, strict=False))
        frozen = {id(s.a) for s, x in pairs if x.spec.freeze_a}
        frozen |= {id(v) for s, x in pairs if not x.spec.rank for v in (s.a, s.b)}
        return [v for slot in self.slots for v in slot.factors if id(v) not in frozen]

    @property
    def kernel(self) -> Tensor:
        """The effective matrix `W`; `W0` itself, as a variable, where there are no slots."""
        return self.computation.kernel_of(self.site)

    def fold(self) -> None:
        """`W0 <- W`."""
        # Without the gradient: torch would take the kernel for a function of A and B.
        self.assign_base(ops.stop_gradient(self.kernel))

    def assign_base(self, value: Tensor) -> None:
        """`W0 <- value`, and measure `|W0|` again for DoRA. Adapters stay as they are."""
        self.site.assign(value)
        self.measure()

    def without_adapters(self) -> SlotAdapters:
        """The computation that is the site's base, bit for bit."""
        return SlotAdapters(self, {})

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that the adapters add to the layer, dropout seeds included."""
        seeds = [] if self.seeds is None else [self.seeds.state]
        return self._slot_variables() + seeds

    def track(self) -> None:
        """Add the variables of the slots to the layer's; the inverse of `untrack`."""
        self._track(self._slot_variables())
        if self.seeds is not None:
            with unlocked(self.site.layer):
                self.site.layer._tracker.add_to_store("seed_generators", self.seeds)

    def untrack(self) -> None:
        self._untrack(self._slot_variables())
        with unlocked(self.site.layer):
            self.site.layer._tracker.untrack(self.seeds)

    def norms(self, shape: Shape = (), dtype: str = "float32") -> Tensor:
        """`|W0|` of each output, as an initializer."""
        return ops.cast(ops.sqrt(self._draw_squared_norms(shape, dtype)), dtype)

    def measure(self) -> None:
        """Compute `|W0|^2` again."""
        if self.squared_norms is not None:
            self.squared_norms.assign(self._draw_squared_norms())

    def _draw_squared_norms(self, *_: Any, **__: Any) -> Tensor:
        return self.site.split().squared_norms(ops.stop_gradient(self.site.wide_matrix()))

    def _slot_variables(self) -> list[keras.Variable]:
        """The variables of the slots, and the norms that they share."""
        norms = [] if self.squared_norms is None else [self.squared_norms]
        return [v for slot in self.slots for v in slot.variables] + norms

    def _need_dropout(self, specs: Sequence[AdapterSpec]) -> bool:
        return self.site.kind.has_dropout and any(spec.dropout for spec in specs)

    def _made_slots(self, adapters: Sequence[LayerAdapter]) -> dict[int, Slot]:
        """New slots, by index, for the adapters that do not fit into the old ones."""
        specs, old = [adapter.spec for adapter in adapters], self.slots
        if self.fits(specs):
            return {}
        needed = [i for i, s in enumerate(specs) if i >= len(old) or not old[i].takes(s, self.pads)]
        grown = {i: old[i].grown(specs[i], self.pads) if i < len(old) else specs[i] for i in needed}
        shapes = {i: self.shapes(spec) for i, spec in grown.items()}
        _, rank_axis = self.site.split().rank_axes
        made: list[keras.Variable] = []
        try:
            with unlocked(self.site.layer):
                new = self._adder(made)
                slots = {i: Slot.make(new, i, adapters[i], shapes[i], rank_axis) for i in needed}
                self._add_shared(specs, made)
        except BaseException:
            self._untrack(made)
            raise
        return slots

    def _take(self, made: Mapping[int, Slot]) -> None:
        """Put new slots in the place of old ones or behind them."""
        for index, slot in made.items():
            self._untrack([v for old in self.slots[index : index + 1] for v in old.variables])
            self.slots[index : index + 1] = [slot]
        if made:
            # In the order of the slots, whatever their history: optimizers go by the order.
            self._untrack(self._slot_variables())
            self._track(self._slot_variables())

    def _track(self, variables: Sequence[keras.Variable]) -> None:
        trains = self.trains
        for factor in [factor for slot in self.slots for factor in slot.factors]:
            factor.trainable = True  # otherwise Keras lists the factors as non-trainable
        with unlocked(self.site.layer):
            for variable in variables:
                self.site.layer._track_variable(variable)
        self.train(trains)

    def _adder(self, made: list[keras.Variable]) -> Any:
        """Adds a variable to the layer, and to the list."""
        prefix = f"{self.site.name}_" if self.site.name else ""

        def new(
            name: str,
            shape: Shape,
            initializer: Any,
            trainable: bool,
            *,
            exact: bool = False,
            dtype: str | None = None,
        ) -> keras.Variable:
            factor = (trainable or exact) and not name.startswith("lora_tokens")
            dtype = dtype or ("float32" if factor else self.site.wide_dtype)
            options: dict[str, Any] = {"dtype": dtype, "trainable": trainable}
            # In 16 bits a gain near 1 would become 1, and what was learned beside A0 would be lost.
            rounded = not name.startswith(("lora_magnitude", "lora_squared_norms"))
            options["autocast"] = rounded and not exact
            layout = factor_layout(self.site.matrix, self.site.split(), name, shape)
            options["initializer"] = drawn(initializer, shape, dtype, layout)
            with laid_out(layout):
                made.append(self.site.layer.add_weight(name=prefix + name, shape=shape, **options))
            return made[-1]

        return new

    def _add_shared(self, specs: Sequence[AdapterSpec], made: list[keras.Variable]) -> None:
        """Make what all slots share: the norms for DoRA, the seeds for dropout."""
        norms, layer = self.squared_norms, self.site.layer
        if norms is None and any(spec.use_dora for spec in specs):
            shape = self.site.split().norm_shape(self.site.shape)
            norms = self._adder(made)("lora_squared_norms", shape, self._draw_squared_norms, False)
        if self._need_dropout(specs) and self.seeds is None:
            with laid_out(whole(layout_of(self.site.matrix))):
                self.seeds = keras.random.SeedGenerator()
            layer._tracker.add_to_store("seed_generators", self.seeds)
        self.squared_norms = norms

    def _untrack(self, variables: Sequence[keras.Variable]) -> None:
        for variable in variables:
            self.site.layer._untrack_variable(variable)
