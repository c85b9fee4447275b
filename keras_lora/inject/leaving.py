"""What adapters leave behind in the models around them, when their layers are plain again.

An encoder may be in several models. The verb that takes its adapters out may be called with any of
them, and the others must not stay frozen, or have heads, for adapters that are gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras

from keras_lora.inject.freezing import thaw
from keras_lora.inject.gradients import settle_gradients
from keras_lora.inject.saving import prepare_saving
from keras_lora.inject.showing import name_none
from keras_lora.inject.switching import adapter_names, allow_any_rank, known_models
from keras_lora.layers import BASE, owned, remove_owner
from keras_lora.walker import Tree


@contextlib.contextmanager
def leaving(tree: Tree, merged: bool = False) -> Iterator[list[keras.Model]]:
    """Around a verb that takes adapters out of a model: afterwards put every model in order that
    was adapted with one of its layers.

    `merged` is whether the active values of heads and biases stay, as those of the base. The list
    has, in the end, the models that are plain.
    """
    others = [model for model in known_models(tree) if model is not tree.root]
    plain: list[keras.Model] = []
    yield plain
    trees = [tree, *map(Tree.of, others)]
    for known in trees:
        names = {BASE, *adapter_names(known)}
        for variable in known.root.variables:
            _drop_values(variable, names, merged)
    _release(trees)
    plain += [known.root for known in trees if not known.adapted]


def _drop_values(variable: keras.Variable, names: set[str], merged: bool) -> None:
    """Drop the values of a variable that belong to none of these adapters."""
    item = owned(variable)
    if item is None:
        return
    if merged and item.owner not in names:
        item.assign(BASE, item.value(item.owner))
    for name in item.names - names:
        remove_owner(variable, name)


def _release(trees: list[Tree]) -> None:
    """Let a model without adapters train as before it was adapted, and be saved.

    What it shares with a model that has adapters stays frozen as long as that one has them.
    """
    adapted = [tree for tree in trees if tree.adapted]
    held = {id(x) for tree in adapted for x in [*tree.layers, *tree.root.variables]}
    for tree in trees:
        if not tree.adapted:
            thaw(tree, held)
            allow_any_rank(tree)
            name_none(tree)
            settle_gradients(tree)
    for tree in adapted:
        settle_gradients(tree)
        prepare_saving(tree)
