"""The layers of a model as a tree, from one walk over the model.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_flatten_layers`: the only way to the sublayers of a layer that is not a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import keras

from keras_lora.checks import invalid
from keras_lora.layers import AdapterBank, LoRALayer, sites_of
from keras_lora.walker.stable_names import (
    stable_name,
    stable_name_0_1,
    stable_variable_name,
    variable_name_0_1,
)

Layer: TypeAlias = "keras.layers.Layer"


@dataclass(frozen=True)
class Node:
    """A layer in the tree of a model.

    `path` joins the names of the layers from below the root to this one. `stable_path` is the path
    that the layer would have in the first model of a process: Keras numbers layers without a given
    name across all models.
    """

    path: str
    layer: Layer
    parent: Layer
    stable_path: str


@dataclass(frozen=True, eq=False)
class Tree:
    """A model and every layer below it.

    A verb makes one tree of its model and passes the tree on. Adapting a layer changes its class
    and its variables, but exchanges no layer for another, so a tree stays true while a verb works.
    `adapted` and `adapted_by_path` say which layers are adapted at the moment.

    Attributes:
        root: The model.
        layers: The model and the layers below, parents first, each object once.
        children: The direct sublayers of each layer, by the id of the layer.
        naming: The name of each layer in stable paths.
        naming_variables: The name of each variable in keys.
    """

    root: Layer
    layers: Sequence[Layer]
    children: Mapping[int, Sequence[Layer]]
    naming: Callable[[Layer], str] = stable_name
    naming_variables: Callable[[keras.Variable], str] = stable_variable_name

    @classmethod
    def of(cls, root: Layer) -> Tree:
        """Walk over a model.

        Raises:
            ValueError: no layer of Keras 3.
        """
        _check_layer(root)
        children: dict[int, Sequence[Layer]] = {}

        def noted(layer: Layer) -> Sequence[Layer]:
            children[id(layer)] = _sublayers(layer)
            return children[id(layer)]

        return cls(root, _preorder(root, noted), children)

    @cached_property
    def nodes(self) -> Sequence[Node]:
        """The layers below the root with their paths, each at the first path to it."""
        return list(_nodes(self, self.root, "", "", {id(self.root)}))

    @cached_property
    def owners(self) -> Sequence[Node]:
        """The nodes and, for variables of its own, a model that is the root, by its name."""
        root, own = self.root, self.root.name
        if not isinstance(root, keras.Model) or any(node.path == own for node in self.nodes):
            return self.nodes
        return [Node(own, root, root, self.naming(root)), *self.nodes]

    @cached_property
    def models(self) -> Sequence[keras.Model]:
        """The root and the layers below that are models."""
        return [layer for layer in self.layers if isinstance(layer, keras.Model)]

    @property
    def adapted(self) -> list[LoRALayer]:
        """The layers that are adapted at the moment."""
        return [layer for layer in self.layers if isinstance(layer, LoRALayer)]

    @property
    def adapted_by_path(self) -> dict[str, LoRALayer]:
        """The layers that are adapted at the moment, by path; the root goes by its name."""
        found = {n.path: n.layer for n in self.nodes if isinstance(n.layer, LoRALayer)}
        root = {self.root.name: self.root} if isinstance(self.root, LoRALayer) else {}
        return root | found

    @property
    def banks(self) -> list[AdapterBank]:
        """The bank of each matrix that is adapted at the moment."""
        return [bank for layer in self.adapted for bank in layer.banks.values()]

    @property
    def banks_by_path(self) -> dict[str, AdapterBank]:
        """The same by `site_path`: the path of the layer, if the layer has one matrix."""
        return {
            site_path(path, name): bank
            for path, layer in self.adapted_by_path.items()
            for name, bank in layer.banks.items()
        }

    @cached_property
    def stable_paths(self) -> Mapping[str, str]:
        """The stable path of each matrix that can be adapted, by its path."""
        return {
            site_path(node.path, name): site_path(node.stable_path, name)
            for node in self.owners
            for name in (sites_of(node.layer) if node.layer.built else ())
        }

    def stable_path(self, path: str) -> str:
        """The stable path of a matrix; the path itself of what cannot be adapted."""
        return self.stable_paths.get(path, path)

    @cached_property
    def variable_keys(self) -> Mapping[int, str]:
        """The key of each weight, by its id: the stable path of its layer, and its name.

        Computed once, for the weights that the model has then: the variables of an adapter that is
        added later have no key.
        """
        keys: dict[int, str] = {}
        nodes = [("", self.root), *((f"{n.stable_path}/", n.layer) for n in self.nodes)]
        # Inner layers first: a layer's weights contain those of the layers in it.
        for prefix, layer in reversed(nodes):
            seen: Counter[str] = Counter()
            for variable in layer.weights:
                if id(variable) not in keys:
                    keys[id(variable)] = prefix + numbered(self.naming_variables(variable), seen)
        return keys

    def named_as_in_0_1(self) -> Tree:
        """The tree with the stable paths that version 0.1.0 wrote."""
        return replace(self, naming=stable_name_0_1, naming_variables=variable_name_0_1)

    def within(self, layer: Layer) -> list[Layer]:
        """A layer of the tree and every layer below it, each once."""
        return _preorder(layer, lambda parent: self.children[id(parent)])

    def ids_within(self, layers: Iterable[Layer]) -> set[int]:
        """The ids of these layers and of every layer below them."""
        return {id(inner) for layer in layers for inner in self.within(layer)}


def _check_layer(model: object) -> None:
    if isinstance(model, keras.layers.Layer):
        return
    packages = {c.__module__.split(".")[0] for c in type(model).__mro__}
    if packages & {"tf_keras", "keras"}:
        raise invalid(
            "model",
            "a model of Keras 3",
            model,
            "it is of Keras 2 (tf_keras): unset TF_USE_LEGACY_KERAS, and make the model with "
            "`import keras`",
        )
    raise invalid("model", "a Keras model", model)


def _sublayers(layer: Layer) -> Sequence[Layer]:
    return layer._flatten_layers(include_self=False, recursive=False)


def _preorder(root: Layer, children: Callable[[Layer], Sequence[Layer]]) -> list[Layer]:
    found: dict[int, Layer] = {id(root): root}
    _gather(root, children, found)
    return list(found.values())


def _gather(
    parent: Layer, children: Callable[[Layer], Sequence[Layer]], found: dict[int, Layer]
) -> None:
    for layer in children(parent):
        if id(layer) not in found:
            found[id(layer)] = layer
            _gather(layer, children, found)


def _nodes(
    tree: Tree, parent: Layer, prefix: str, stable_prefix: str, seen: set[int]
) -> Iterator[Node]:
    names: Counter[str] = Counter()
    stable_names: Counter[str] = Counter()
    for layer in tree.children[id(parent)]:
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        path = prefix + numbered(layer.name, names)
        stable = stable_prefix + numbered(tree.naming(layer), stable_names)
        yield Node(path, layer, parent, stable)
        yield from _nodes(tree, layer, f"{path}/", f"{stable}/", seen)


def walk(model: Layer) -> Sequence[Node]:
    """Every layer below `model`, parents first, each object once: at the first path to it."""
    return Tree.of(model).nodes


def all_layers(model: Layer) -> list[Layer]:
    """A model and every layer below: `Tree.of(model).layers`."""
    return _preorder(model, _sublayers)


def site_path(path: str, matrix: str) -> str:
    """The path of a matrix: that of its layer, and its name where the layer has several."""
    return f"{path}/{matrix}" if matrix else path


def numbered(name: str, seen: Counter[str]) -> str:
    """`name`; when it is seen again, `name#2`, `name#3`..."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


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
    return Tree.of(model).adapted_by_path
