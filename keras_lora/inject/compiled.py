"""A model's compiled functions and optimizer, which go stale when its layers change.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_layers`: missing from a model whose constructor failed, which may still be alive.
    `_value`: None while a step of JAX has the values of a model's variables.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress
from operator import call
from typing import Any
from weakref import ref

import keras

from keras_lora.distribution import strategy_scope
from keras_lora.inject.moments import OptimizerMove
from keras_lora.walker import Tree, all_layers

_KERAS_FUNCTIONS = ("train_function", "test_function", "predict_function")
FUNCTIONS = (*_KERAS_FUNCTIONS, "generate_function")


def models_around(tree: Tree, layers: Iterable[keras.layers.Layer]) -> list[keras.Model]:
    """Every live model that contains one of the layers of a tree, however deep.

    A layer does not know the models that contain it, and an outer model that has run `predict`
    keeps a graph of the layer as it was.
    """
    wanted = {id(layer) for layer in layers}
    models = [m for m in _live_models() if getattr(m, "_layers", None)]
    return [m for m in models if any(id(v) in wanted for v in _layers_of(m, tree) if v is not m)]


def _live_models() -> list[keras.Model]:
    """Every model that Python's garbage collector knows.

    All objects are listed, filtered and let go of within one call of C code, so that no other
    thread runs meanwhile: a thread that is making a tuple would fail if something else referred to
    the tuple. Types are compared by `id`, since `isinstance` may run Python code.
    """
    model_types = {id(model_class) for model_class in _with_subclasses(keras.Model)}
    objects: list[Any] = []
    models: list[keras.Model] = []
    of_models = map(model_types.__contains__, map(id, map(type, objects)))
    steps = (
        map(objects.extend, map(call, (gc.get_objects,))),
        map(models.extend, (compress(objects, of_models),)),
        map(call, (objects.clear,)),
    )
    collecting = gc.isenabled()
    gc.disable()  # a collection may run Python code
    try:
        deque(chain(*steps), maxlen=0)
    finally:
        if collecting:
            gc.enable()
    return models


def _with_subclasses(model_class: type) -> Iterator[type]:
    yield model_class
    subclasses: list[type] = type.__subclasses__(model_class)
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _layers_of(model: keras.Model, tree: Tree) -> Sequence[keras.layers.Layer]:
    return tree.within(model) if id(model) in tree.children else all_layers(model)


def around(tree: Tree, layers: Sequence[keras.layers.Layer]) -> list[Any]:
    """The models whose compiled functions a change of these layers makes stale."""
    found, model = models_around(tree, layers), tree.root
    inside = any(m is model for m in found) or not isinstance(model, keras.Model)
    return found if inside else [*found, model]


@contextlib.contextmanager
def changing(
    tree: Tree,
    layers: Sequence[keras.layers.Layer],
    functions: Sequence[str] = FUNCTIONS,
) -> Iterator[None]:
    """Around a change of layers: drop the compiled functions, and renew each optimizer whose
    trainable variables change. Moments move with the adapters.
    """
    models = around(tree, layers)
    with strategy_scope(tree):
        moves = [OptimizerMove(tree, model) for model in models]
    try:
        yield
    finally:
        refresh(models, functions)
        with strategy_scope(tree):
            for move in moves:
                move.finish()


def refresh(models: Sequence[keras.Model], functions: Sequence[str] = FUNCTIONS) -> None:
    """Drop the compiled functions; they are made anew when they are next needed."""
    for model in models:
        for name in functions:
            if getattr(model, name, None) is not None:
                anew = _MadeAnew(model, name) if name in _KERAS_FUNCTIONS else None
                setattr(model, name, anew)


class _MadeAnew:
    """In the place of a function that was dropped: the first call makes the function.

    Keras makes `train_function` before the first step of `fit` alone, and a callback may drop the
    function after it.
    """

    def __init__(self, model: keras.Model, name: str) -> None:
        self._model = ref(model)
        self._name = name

    def __call__(self, *args: Any) -> Any:
        model = self._model()
        setattr(model, self._name, None)
        spread = keras.distribution.distribution() is not None
        with _given_back(model, *args[0]) if spread else contextlib.nullcontext():
            getattr(model, f"make_{self._name}")()
        return getattr(model, self._name)(*args)


@contextlib.contextmanager
def _given_back(model: Any, trained: Any, others: Any, *rest: Any) -> Iterator[None]:
    """Within the context the variables have the values that a step of JAX has taken from them.

    When Keras makes a function of a model that is spread over devices, it asks where they are.
    """
    lists = [(model.trainable_variables, trained), (model.non_trainable_variables, others)]
    if len(rest) == 2:
        lists.append((model.optimizer.variables, rest[0]))
    if rest:
        lists.append((model.metrics_variables, rest[-1]))
    pairs = [pair for variables, given in lists for pair in zip(variables, given, strict=True)]
    taken = [(variable, value) for variable, value in pairs if variable._value is None]
    for variable, value in taken:
        variable._value = value
    try:
        yield
    finally:
        for variable, _ in taken:
            variable._value = None


def stale_when_flags_change() -> Sequence[str]:
    """The functions that depend on which variables train. On JAX all do, since they are given the
    variables in two lists: those that train and the others.
    """
    return ("train_function",) if keras.backend.backend() == "tensorflow" else FUNCTIONS
