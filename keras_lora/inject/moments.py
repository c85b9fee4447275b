"""The moments of optimizers move with the adapters.

An optimizer has moments for each variable that trains, such as those of slots. When another adapter
moves into a slot, the moments there belong to the old one. So the moments of each factor are parked
when its adapter leaves, with the number of steps that they come from, and are restored when the
adapter enters again, into whatever variables it then trains in.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_trainable_variables`: the variables that an optimizer was built for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
from keras import ops

from keras_lora.checks import warn
from keras_lora.distribution import strategy_scope
from keras_lora.inject.optimizers import (
    Renewal,
    averages,
    built_optimizer,
    carry_exclusions,
    shared_state,
    states_by_variable,
    steps_of,
)
from keras_lora.layers import BASE, Factor, all_owned, parts_of
from keras_lora.layers.factors import read, write
from keras_lora.lowrank.equations import Shape, Tensor
from keras_lora.walker import Tree

State = list[Tensor]
Held = Mapping[int, Factor]


@dataclass(frozen=True, eq=False)
class _Company:
    """What an optimizer had beside the moments of factors when these were parked.

    Attributes:
        steps: The number of steps that were made.
        shared: What it has for all variables, the number of steps included.
        others: The moments of the variables that are no adapter's, by the variable's id.
    """

    steps: int
    shared: State
    others: Mapping[int, tuple[keras.Variable, State]]


@dataclass(eq=False)
class _Parked:
    """The parked moments of an optimizer.

    Attributes:
        factors: For each factor, its moments and what was beside them. Those of an adapter that was
            deleted or replaced go with its factors.
        without: What was beside no factor: while no adapter trained.
        entered: What was written into the optimizer's variables last, by the variable's id.
    """

    factors: WeakKeyDictionary[Factor, tuple[State, _Company]] = field(
        default_factory=WeakKeyDictionary
    )
    without: _Company | None = None
    entered: Mapping[int, Tensor] = field(default_factory=dict)


_PARKED: WeakKeyDictionary[Any, _Parked] = WeakKeyDictionary()

_EXPECTED = (
    "expected one that keeps its moments in lists with an entry for each variable, as Keras's own "
    "optimizers do. Received: {}. Its moments are as at the start of a training."
)


class OptimizerMove:
    """The optimizer of a model, from before a change of its layers to after the change.

    Where other variables train then, the optimizer is made anew.
    """

    def __init__(self, tree: Tree, model: keras.Model) -> None:
        """
        Raises:
            ValueError: the optimizer cannot be made from its own config.
        """
        self._model, self._tree = model, tree
        built = built_optimizer(model)
        self._renewal = None if built is None else Renewal(built)
        self._trained = [id(v) for v in model.trainable_variables]
        self._held, self._places = _held(tree), _places(tree)
        if built is not None and tree.adapted:
            _park(built, self._held)

    def finish(self) -> None:
        """After the change: restore the moments of what trains now."""
        model, held = self._model, _held(self._tree)
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            return
        changed = self._trained != [id(v) for v in model.trainable_variables]
        if changed:
            optimizer = self._renewed(optimizer)
        if not self._tree.adapted:
            _PARKED.pop(optimizer, None)
        elif changed or held != self._held:
            _restore(model, optimizer, held)

    def _renewed(self, optimizer: Any) -> Any:
        places = _places(self._tree)
        pairs = [(old, places.get(place)) for place, old in self._places.items()]
        replaced = {id(old): new for old, new in pairs if new is not None and new is not old}
        variables = [*self._model.variables, *self._places.values()]
        if self._renewal is None or self._renewal.old is not optimizer:
            for part in parts_of(optimizer):
                carry_exclusions(part, part, variables, replaced)
            return optimizer
        self._renewal.exclude(variables, replaced)
        if optimizer in _PARKED:
            _PARKED[self._renewal.new] = _PARKED.pop(optimizer)
        self._model.optimizer = self._renewal.new
        return self._renewal.new


@contextlib.contextmanager
def moving_moments(tree: Tree, models: Iterable[keras.Model]) -> Iterator[None]:
    """Around a move of adapters that leaves the same variables to train."""
    held = _held(tree)
    optimizers = [(m, m.optimizer) for m in models if getattr(m, "optimizer", None) is not None]
    for _, optimizer in optimizers:
        if optimizer.built:
            _park(optimizer, held)
    try:
        yield
    finally:
        if (after := _held(tree)) != held:
            with strategy_scope(tree):
                for model, optimizer in optimizers:
                    _restore(model, optimizer, after)


def _held(tree: Tree) -> dict[int, Factor]:
    """The adapters' values that are in variables, by the variable's id."""
    slots = [slot for bank in tree.banks for slot in bank.slots]
    pairs = [pair for slot in slots for pair in slot.held]
    pairs += [item.held for item in all_owned(tree.root.variables) if item.owner != BASE]
    return {id(variable): factor for variable, factor in pairs}


def _places(tree: Tree) -> dict[Any, keras.Variable]:
    """The variables of slots that train, each by where it is."""
    return {
        (id(bank), index, which): variable
        for bank in tree.banks
        for index, slot in enumerate(bank.slots)
        for which, variable in enumerate(slot.factors)
    }


def _park(optimizer: Any, held: Held) -> None:
    parked = _PARKED.setdefault(optimizer, _Parked())
    values = {id(v): read(v) for v in optimizer.variables}
    if not steps_of(optimizer) or (parked.entered and _same(parked.entered, values)):
        return  # no step was made since: what is parked still holds
    trained = {id(v): v for v in optimizer._trainable_variables}
    states = states_by_variable(optimizer)
    moments = {i: [values[id(v)] for v in own] for i, own in states.items()}
    others = {i: (trained[i], x) for i, x in moments.items() if i not in held}
    shared = [values[id(v)] for v in shared_state(optimizer)]
    company = _Company(steps_of(optimizer), shared, others)
    if len(others) == len(moments):
        parked.without = company
    for i in moments.keys() & held.keys():
        whole, own = tuple(trained[i].shape), held[i].shape
        parked.factors[held[i]] = [_cut(x, whole, own) for x in moments[i]], company


def _restore(model: keras.Model, optimizer: Any, held: Held) -> None:
    """Let adapters that trained go on, and others begin as with a new optimizer."""
    parked = _PARKED.get(optimizer)
    if parked is None:
        return
    variables = model.trainable_variables
    entering = [factor for v in variables if (factor := held.get(id(v))) is not None]
    known = [parked.factors[factor][1] for factor in entering if factor in parked.factors]
    beside = None if entering else parked.without
    company = max(known, key=lambda found: found.steps, default=beside)
    parked.entered = {}
    if not optimizer.built:
        if company is None:
            return  # Keras builds it when it is first needed
        optimizer.build(variables)
    shared = shared_state(optimizer)
    if company is not None and not _fits(company.shared, shared):
        warn(f"The state of the optimizer is lost: {_EXPECTED.format(type(optimizer).__name__)}")
        company = None
    entered = _Entered(optimizer, variables, company)
    values = entered.shared(shared)
    apart = states_by_variable(optimizer)
    for variable in variables:
        moments = _moments_of(variable, held.get(id(variable)), parked, company)
        values |= entered.states(variable, apart[id(variable)], moments)
    for state in optimizer.variables:
        if id(state) in values:
            write(state, values[id(state)])
    parked.entered = values


def _moments_of(
    variable: keras.Variable, factor: Factor | None, parked: _Parked, company: _Company | None
) -> State | None:
    """The moments that are parked for what is in a variable."""
    if company is None:
        return None
    if factor is not None:
        return parked.factors[factor][0] if factor in parked.factors else None
    known, moments = company.others.get(id(variable), (None, None))
    return moments if known is variable else None


class _Entered:
    """What is written into the variables of an optimizer; without `company` all is new."""

    def __init__(
        self, optimizer: Any, variables: Sequence[keras.Variable], company: _Company | None
    ) -> None:
        self._optimizer, self._variables, self._company = optimizer, variables, company

    @cached_property
    def _fresh(self) -> Any:
        optimizer = Renewal(self._optimizer).new
        optimizer.build(self._variables)
        return optimizer

    @cached_property
    def _averages(self) -> set[int]:
        # The average of no values is the first value: Keras sees to that in the first step alone.
        return set() if self._company is None else averages(self._fresh)

    @cached_property
    def _starts(self) -> dict[int, list[keras.Variable]]:
        return states_by_variable(self._fresh)

    def shared(self, variables: Sequence[keras.Variable]) -> dict[int, Tensor]:
        """The values of what is kept for all variables, by id."""
        begun = None if self._company is None else self._company.shared
        values = [read(v) for v in shared_state(self._fresh)] if begun is None else begun
        return {id(v): x for v, x in zip(variables, values, strict=True)}

    def states(
        self, variable: keras.Variable, states: Sequence[keras.Variable], moments: State | None
    ) -> dict[int, Tensor]:
        """The values of what is kept for a variable, by id."""
        if moments is not None and _fits(moments, states):
            return {id(v): x for v, x in zip(states, moments, strict=True)}
        found = self._starts[id(variable)]
        starts = [read(variable if id(v) in self._averages else v) for v in found]
        if moments is not None:
            starts = [_pasted(x, start) for x, start in zip(moments, starts, strict=True)]
        return {id(v): x for v, x in zip(states, starts, strict=True)}


def _cut(x: Tensor, whole: Shape, own: Shape) -> Tensor:
    """The part of a state that belongs to a factor in a variable of a higher rank."""
    if whole == own or tuple(x.shape) != whole:
        return x
    return ops.convert_to_numpy(x)[tuple(map(slice, own))].copy()


def _pasted(x: Tensor, start: Tensor) -> Tensor:
    """The inverse of `_cut`: the rest is as an optimizer begins."""
    whole = np.array(ops.convert_to_numpy(start), copy=True)
    whole[tuple(map(slice, x.shape))] = x
    return whole


def _fits(values: State, variables: Sequence[keras.Variable]) -> bool:
    return [tuple(x.shape) for x in values] == [tuple(v.shape) for v in variables]


def _same(some: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> bool:
    return all(np.array_equal(x, values[i]) for i, x in some.items())
