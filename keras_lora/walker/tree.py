"""The layers of a model as a tree.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_flatten_layers`: the only way to the sublayers of a layer that is not a model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import keras

from keras_lora.layers import LoRALayer

Layer: TypeAlias = "keras.layers.Layer"


@dataclass(frozen=True)
class Node:
    """A layer in the tree of a model.

    `path` joins the layers' names from below the root. `stable_path` is what it would be in the
    first model of a process: Keras numbers the layers that are given no name, over all models.
    """

    path: str
    layer: Layer
    parent: Layer
    stable_path: str


def walk(model: Layer) -> Iterator[Node]:
    """Every layer below `model`, parents first, each object once: at the first path to it."""
    yield from _walk(model, "", "", {id(model)})


def _walk(parent: Layer, prefix: str, stable_prefix: str, seen: set[int]) -> Iterator[Node]:
    names: Counter[str] = Counter()
    stable_names: Counter[str] = Counter()
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        path = prefix + numbered(layer.name, names)
        stable = stable_prefix + numbered(_unnumbered(layer), stable_names)
        yield Node(path, layer, parent, stable)
        yield from _walk(layer, f"{path}/", f"{stable}/", seen)


def all_layers(model: Layer) -> list[Layer]:
    """A model and every layer below, in the order of `walk`: without paths, which cost the most."""
    found: dict[int, Layer] = {id(model): model}
    _gather(model, found)
    return list(found.values())


def _gather(parent: Layer, found: dict[int, Layer]) -> None:
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        if id(layer) not in found:
            found[id(layer)] = layer
            _gather(layer, found)


def numbered(name: str, seen: Counter[str]) -> str:
    """`name`, and for further ones of that name `name#2`, `name#3`..."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _unnumbered(layer: Layer) -> str:
    """The layer's name, without the number where Keras made the name from the class."""
    given = re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__)
    given = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", given)
    snake = re.sub("_+", "_", given).lower()
    return snake if re.fullmatch(rf"{re.escape(snake)}_\d+", layer.name) else str(layer.name)


def lora_layers(model: Layer) -> dict[str, LoRALayer]:
    """The adapted layers of a model, by path.

    Args:
        model: A model or a layer, adapted or not.

    Returns:
        `{path: layer}`, empty where nothing is adapted.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> kl.lora_layers(model)
    {}
    """
    found = {n.path: n.layer for n in walk(model) if isinstance(n.layer, LoRALayer)}
    return {model.name: model} | found if isinstance(model, LoRALayer) else found
