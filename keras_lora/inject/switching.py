"""Which adapters of a model are active, and train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from weakref import ref

import keras

from keras_lora.checks import invalid, warn
from keras_lora.distribution import strategy_scope
from keras_lora.inject.compiled import FUNCTIONS, changing, stale_when_flags_change
from keras_lora.inject.freezing import freeze, thawed_by_others
from keras_lora.inject.identity import check_variables
from keras_lora.inject.moments import moving_moments
from keras_lora.inject.plan import unique
from keras_lora.inject.saving import prepare_saving
from keras_lora.layers import (
    BASE,
    Adapter,
    AdapterBank,
    LoRALayer,
    OwnedValues,
    all_owned,
    goes_by_element,
)
from keras_lora.walker import Layer, Tree


def adapted(tree: Tree) -> dict[str, AdapterBank]:
    """The adapters of each adapted matrix, by path.

    Raises:
        ValueError: the model has no adapters.
    """
    check_adapted(tree)
    return tree.banks_by_path


def check_adapted(tree: Tree) -> None:
    """
    Raises:
        ValueError: the model has no adapters, or other variables than they were made for.
    """
    if not tree.adapted:
        raise ValueError(
            f"Expected a model with adapters. Received: {tree.root.name!r}, which has none. It was "
            "never adapted, or its adapters were merged or unloaded: call apply_lora first."
        )
    check_variables(tree)


def adapter_names(tree: Tree) -> list[str]:
    """All names, in the order in which they were added."""
    return list(dict.fromkeys(name for bank in tree.banks for name in bank.adapters))


def active_names(tree: Tree) -> list[str]:
    """The names of the active adapters, in an order that each layer agrees with."""
    return in_order([bank.active for bank in tree.banks])


def in_order(orders: Iterable[Sequence[str]]) -> list[str]:
    """One order of all names that agrees with each of these, which are parts of one order."""
    left, names = [list(order) for order in dict.fromkeys(map(tuple, orders)) if order], []
    while left:
        later = {name for order in left for name in order[1:]}
        first = next((order[0] for order in left if order[0] not in later), left[0][0])
        names.append(first)
        left = [rest for order in left if (rest := [n for n in order if n != first])]
    return names


def check_names(tree: Tree, names: str | Sequence[str] | None) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: no adapters, a name that the model does not have, or a name twice.
    """
    check_adapted(tree)
    wanted, known = [names] if isinstance(names, str) else list(names or ()), adapter_names(tree)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise invalid("names", f"names among {known}", unknown)
    if len(set(wanted)) < len(wanted):
        raise invalid("names", "each name once", wanted, "scale it with scale_adapter")
    return wanted


def check_no_dora(tree: Tree, names: Iterable[str], fix: str) -> None:
    """Refuse adapters that are more than the sum `s A B`.

    Raises:
        ValueError: one of them has DoRA.
    """
    wanted = set(names)
    found = {n for x in tree.banks for n, a in x.adapters.items() if a.spec.use_dora} & wanted
    if found:
        raise ValueError(
            "Expected adapters without DoRA (use_dora=False), whose update is A B alone. "
            f"Received: {sorted(found)}. {fix}."
        )


def whole_adapters(tree: Tree, names: Iterable[str]) -> dict[str, Adapter]:
    """The adapter of the model for each name; layers made by hand belong to none."""
    adapters = ((n, x.adapters[n]) for n in names for x in tree.banks if n in x.adapters)
    return {name: adapter.adapter for name, adapter in adapters if adapter.adapter is not None}


def switch(tree: Tree, names: Sequence[str], trainable: bool = True) -> None:
    """Activate exactly these adapters; if `trainable`, they train with their biases and layers.

    No compiled function is dropped, and no optimizer is made anew, unless variables are missing
    or other variables are to train.

    Raises:
        ValueError: two of the adapters have a value for the same variable.
    """
    banks, owned = tree.banks, all_owned(tree.root.variables)
    thawed = thawed_by_others([*tree.layers, *tree.root.trainable_variables])
    others = {id(item) for item in thawed}
    trained = [v for v in tree.root.trainable_variables if id(v) not in others]
    trainable = trainable and bool(names)
    extra = unowned_variables(banks, owned, trained)
    if trainable:
        extra += _trained_beside(tree, names)
    settle_ranks(tree)
    fit = _all_fit(banks, names) and not any(bank.traced_by_name for bank in banks)
    with strategy_scope(tree):
        if fit and not thawed and _same_flags(banks, names, trained, extra, trainable):
            with moving_moments(tree, known_models(tree)):
                _move(banks, owned, names, trainable)
        else:
            stale = stale_when_flags_change() if fit else FUNCTIONS
            with changing(tree, tree.adapted, stale):
                _move(banks, owned, names, trainable)
                refreeze(tree, extra)
            for bank in banks:
                bank.traced_by_name = False
    if owned:
        prepare_saving(tree)
    _warn_of_frozen_again(tree, thawed)


def _warn_of_frozen_again(tree: Tree, thawed: Iterable[Layer | keras.Variable]) -> None:
    slots = {id(v) for bank in tree.banks for v in bank.variables}
    again = [
        x.path
        for x in thawed
        if isinstance(x, keras.Variable) and id(x) not in slots and not x.trainable
    ]
    if again:
        warn(
            "Variables of the base trained, such as after `model.trainable = True`, and are frozen "
            f"again: {again}. To train them beside an adapter, name their layers in "
            "`layers_to_save`."
        )


def activate(tree: Tree, names: Sequence[str], trainable: bool | None = None) -> None:
    """Move adapters into the slots, and their values into the variables of the base.

    Trainable flags of slots change as asked; other flags and optimizers do not change.
    """
    with strategy_scope(tree):
        _move(tree.banks, all_owned(tree.root.variables), names, trainable)


def add_slots(tree: Tree, names: Sequence[str]) -> None:
    """Add the slots that these adapters need, if any; the active adapters stay."""
    if not _all_fit(tree.banks, names):
        active = active_names(tree)
        with changing(tree, tree.adapted):
            activate(tree, names)
            activate(tree, active)


def away_from_base(tree: Tree, names: Sequence[str]) -> list[str]:
    """The variables whose values `activate` would change, other than those of slots."""
    owned = all_owned(tree.root.variables)
    return [item.variable.path for item in owned if _owner(item, names) != item.owner]


def known_models(tree: Tree) -> list[keras.Model]:
    """The models that were adapted or switched with a layer of this model, and models in it.

    Where one encoder serves several models, each has an optimizer with moments of the same slots.
    """
    known = {}
    for layer in tree.adapted:
        layer._lora.models.update(tree.models)
        known.update({id(m): m for m in layer._lora.models})
    return list(known.values())


def settle_ranks(tree: Tree) -> None:
    """Let adapters be in slots of higher ranks only where all optimizers go by element.

    A model may be compiled later, with another optimizer: `fit` asks again.
    """
    models = known_models(tree)
    pads = all(goes_by_element(getattr(m, "optimizer", None)) for m in models)
    for bank in tree.banks:
        bank.pads = pads
    for model in models:
        if "make_train_function" not in vars(model):
            model.make_train_function = partial(_make_train_function, ref(model))


def allow_any_rank(tree: Tree) -> None:
    """The inverse of `settle_ranks`, for a model without adapters."""
    for model in tree.models:
        vars(model).pop("make_train_function", None)


def _make_train_function(model: ref[keras.Model], *args: Any, **kwargs: Any) -> None:
    """`make_train_function` of a model, once each adapter is in a slot that it can train in.

    A frozen base that somebody thawed is frozen again before it could train. With a built optimizer
    TensorFlow traces the step once. Keras builds the optimizer within the step, which is then
    traced again without it.
    """
    trained = model()
    assert trained is not None
    thawed = trained.train_function is None and thawed_by_others(trained.trainable_variables)
    if thawed or not goes_by_element(trained.optimizer):
        tree = Tree.of(trained)
        if thawed or any(slot.is_padded for bank in tree.banks for slot in bank.slots):
            switch(tree, active_names(tree), any(bank.trains for bank in tree.banks))
    if trained.optimizer is not None and not trained.optimizer.built:
        with strategy_scope(Tree.of(trained)):
            trained.optimizer.build(trained.trainable_variables)
    type(trained).make_train_function(trained, *args, **kwargs)


def refreeze(tree: Tree, extra: Iterable[keras.Variable]) -> None:
    """Freeze everything except the slots that train and these variables."""
    slots = [v for x in tree.banks for slot in x.slots for v in slot.factors]
    freeze(tree, [*(v for v in slots if v.trainable), *extra])


def _move(
    banks: Iterable[AdapterBank],
    owned: Iterable[OwnedValues],
    names: Sequence[str],
    trainable: bool | None,
) -> None:
    owners = [(item, _owner(item, names)) for item in owned]
    for bank in banks:
        trains = bank.trains if trainable is None else trainable
        bank.activate([n for n in names if n in bank.adapters], trains)
    for item, owner in owners:
        item.switch(owner)


def _owner(item: OwnedValues, names: Sequence[str]) -> str:
    """Whose value the variable is to have."""
    owners = [name for name in names if name in item.names]
    if len(owners) > 1:
        raise ValueError(
            f"Expected at most one active adapter with a value of its own for "
            f"'{item.variable.path}' (by layers_to_save or bias). Received: {owners}. Activate one "
            "of them."
        )
    return owners[0] if owners else BASE


def unowned_variables(
    banks: Iterable[AdapterBank], owned: Iterable[OwnedValues], trained: Iterable[keras.Variable]
) -> list[keras.Variable]:
    """The variables that train and belong to no adapter of this package's verbs.

    They are of layers made by hand, or from a `.keras` file.
    """
    known = {id(item.variable) for item in owned}
    known |= {id(v) for bank in banks for v in bank.variables}
    return [v for v in trained if id(v) not in known]


def trained_by_none(tree: Tree) -> list[keras.Variable]:
    """The variables that train though no adapter owns them, and what else their layers have.

    Such as a head that was put on an adapted backbone, with its moving statistics. Not what an
    adapter froze and somebody else thawed.
    """
    trained, owned = tree.root.trainable_variables, all_owned(tree.root.variables)
    thawed = {id(v) for v in thawed_by_others(trained)}
    trained = [v for v in trained if id(v) not in thawed]
    found = unowned_variables(tree.banks, owned, trained)
    ids, taken = {id(v) for v in found}, {id(item.variable) for item in owned}
    for layer in tree.layers:
        inner = tree.children[id(layer)] or isinstance(layer, LoRALayer)
        if not inner and any(id(v) in ids for v in layer.weights):
            found += [v for v in layer.weights if id(v) not in taken]
    return unique(found)


def _trained_beside(tree: Tree, names: Sequence[str]) -> list[keras.Variable]:
    """The base's variables that are to train beside these adapters."""
    wanted = {id(v) for whole in whole_adapters(tree, names).values() for v in whole.trained}
    return [v for v in tree.root.variables if id(v) in wanted] if wanted else []


def _all_fit(banks: Iterable[AdapterBank], names: Sequence[str]) -> bool:
    return all(x.fits([x.adapters[n].spec for n in names if n in x.adapters]) for x in banks)


def _same_flags(
    banks: Iterable[AdapterBank],
    names: Sequence[str],
    trained: Iterable[keras.Variable],
    extra: Iterable[keras.Variable],
    trainable: bool,
) -> bool:
    slots = [v for x in banks for v in x.training([n for n in names if n in x.adapters])]
    return {id(v) for v in trained} == {id(v) for v in [*extra, *(slots if trainable else [])]}
