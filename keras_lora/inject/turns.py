"""One verb at a time: the verbs of a model, and of models that share a layer with it, take turns.

Each layer has a gate. A verb passes the gates of all layers of its model, so two verbs exclude each
other where their models share a layer, and only there. A context such as `merged` keeps its turn to
its end: another thread waits, and the thread itself may only call what the context allows.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import keras

from keras_lora.inject.tracing import check_not_traced
from keras_lora.walker import Layer, Tree

_NUMBERS = itertools.count()


@dataclass(eq=False)
class _Gate:
    """What a verb passes to work with a layer.

    Attributes:
        lock: Held while a verb of a model with this layer works.
        contexts: The contexts that the layer is in, the outermost first.
        number: Gates are passed in this order, so that two threads cannot wait for each other.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    contexts: list[str] = field(default_factory=list)
    number: int = field(default_factory=lambda: next(_NUMBERS))


_GATES: WeakKeyDictionary[Layer, _Gate] = WeakKeyDictionary()
_MAKING = threading.Lock()


def _gates_of(tree: Tree) -> Sequence[_Gate]:
    with _MAKING:
        gates = [_GATES.setdefault(layer, _Gate()) for layer in tree.layers]
    return sorted(gates, key=lambda gate: gate.number)


# The contexts that choose which adapters are active: what changes no adapter may run in them.
CHOOSING = ("disable_adapter", "use_adapter")


@contextlib.contextmanager
def turn(
    model: keras.Model, verb: str, within: Sequence[str] = (), traced: bool = False
) -> Iterator[Tree]:
    """A verb's turn: within the context no other verb works on a layer of the model.

    Args:
        model: The model.
        verb: The name of the verb, for errors.
        within: The contexts in which the verb may be called.
        traced: Whether the verb may be called while a computation is being recorded.

    Yields:
        The model's tree.

    Raises:
        ValueError: no model, a computation is being recorded, or the model is in a context that
            does not allow the verb.
    """
    with _passing(model) as (tree, gates):
        if not traced:
            check_not_traced(tree, verb)
        _check_contexts(gates, model, verb, within)
        yield tree


@contextlib.contextmanager
def context(tree: Tree, name: str) -> Iterator[None]:
    """Within it the verbs that `name` does not allow are refused. Used in the turn of `name`."""
    gates = _gates_of(tree)
    for gate in gates:
        gate.contexts.append(name)
    try:
        yield
    finally:
        for gate in gates:
            gate.contexts.remove(name)


@contextlib.contextmanager
def _passing(model: keras.Model) -> Iterator[tuple[Tree, Sequence[_Gate]]]:
    tree = Tree.of(model)
    with contextlib.ExitStack() as stack:
        gates = _gates_of(tree)
        for gate in gates:
            stack.enter_context(gate.lock)
        yield tree, gates


def _check_contexts(
    gates: Sequence[_Gate], model: keras.Model, verb: str, within: Sequence[str]
) -> None:
    refused = sorted({name for gate in gates for name in gate.contexts if name not in within})
    if refused:
        raise ValueError(
            f"{verb}: expected a call outside `with {refused[0]}(...)`, which puts the model back "
            f"as it was. Received: a call inside, for {model.name!r}. Leave the context first."
        )
