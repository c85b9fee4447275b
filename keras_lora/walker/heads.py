"""Which layers make a model's outputs, and which model is a KerasHub backbone.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_keras_history`, `_inbound_nodes`: the only way from a model's outputs back to the layer
        that made them.
"""

from __future__ import annotations

import re
from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.layers import family_of, plain_class, supported_base
from keras_lora.walker.tree import Layer, Tree

# Words by which people call the layer that makes the outputs.
_HEADS = {"head", "heads", "logit", "logits", "classifier", "score", "scores", "predictions"}


def output_heads(tree: Tree) -> set[int]:
    """The ids of the linear layers that make a model's outputs; see `find_targets`."""
    return _output_heads(tree, tree.root)


def _output_heads(tree: Tree, model: Layer) -> set[int]:
    if is_backbone(model):
        return set()
    if isinstance(model, keras.Sequential) or not has_graph(model):
        # `get`: an output that is also an input may come from a model outside the tree.
        children = tree.children.get(id(model), ())
        weighted = [layer for layer in children if layer.weights]
        return _heads_at(tree, weighted[-1]) if weighted else set()
    outputs = keras.tree.flatten(model.outputs)
    makers = [maker for output in outputs if (maker := _maker(output)) is not None]
    return {head for maker in makers for head in _heads_at(tree, maker)}


def _heads_at(tree: Tree, layer: Layer) -> set[int]:
    if supported_base(plain_class(layer)) is not None:
        return set() if family_of(layer) == "embedding" else {id(layer)}
    if isinstance(layer, keras.layers.Wrapper):
        return _heads_at(tree, layer.layer)
    return _output_heads(tree, layer) if isinstance(layer, keras.Model) else set()


def possible_heads(tree: Tree) -> set[int]:
    """The ids of linear layers that may make the outputs, of which `output_heads` cannot tell.

    In a graph they are those before an operation of several inputs that makes an output: a mask, a
    concatenation, a sum. In a subclassed model they are layers of its own that are named as heads
    or, where the last of its layers is no linear one, all that are linear.
    """
    model, known = tree.root, output_heads(tree)
    if is_backbone(model) or not isinstance(model, keras.Model):
        return set()
    if has_graph(model):
        outputs = keras.tree.flatten(model.outputs)
        unclear = [output for output in outputs if _maker(output) is None]
        makers = [maker for output in unclear for maker in _makers(output)]
    else:
        makers = [x for x in tree.children[id(model)] if not known or _is_called_head(x.name)]
    return {head for maker in makers for head in _heads_at(tree, maker)} - known


def _is_called_head(name: str) -> bool:
    return bool(_HEADS & set(re.findall(r"[a-z]+", name.lower())))


def _makers(tensor: Any) -> list[Layer]:
    """The layers with weights that a tensor comes from, through operations without weights."""
    found, left, seen = {}, [tensor], set[int]()
    while left:
        history = left.pop()._keras_history
        operation = history.operation
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            found[id(operation)] = operation
        elif operation._inbound_nodes and id(operation) not in seen:
            seen.add(id(operation))
            left += operation._inbound_nodes[history.node_index].input_tensors
    return list(found.values())


def _maker(tensor: Any) -> Layer | None:
    """The layer with weights that a tensor comes from, through operations of one input."""
    while True:
        history = tensor._keras_history
        operation = history.operation
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            return operation
        if not operation._inbound_nodes:
            return None
        inputs = operation._inbound_nodes[history.node_index].input_tensors
        if len(inputs) != 1:
            return None
        (tensor,) = inputs


def has_graph(model: Layer) -> bool:
    """Whether this is a Functional or Sequential model, whose layers are nodes of a graph."""
    return isinstance(model, keras.Model) and getattr(model, "outputs", None) is not None


def is_backbone(model: Layer) -> bool:
    """Whether this is a KerasHub backbone, told by name so that KerasHub is not imported."""
    names = {f"{c.__module__}.{c.__name__}" for c in type(model).__mro__}
    return "keras_hub.src.models.backbone.Backbone" in names


def backbone_of(model: Layer) -> Any:
    """The KerasHub backbone that a model is or contains; the outermost, where one is in another.

    Raises:
        ValueError: the model contains no backbone, or several side by side.
    """
    tree = Tree.of(model)
    found = [layer for layer in tree.layers if is_backbone(layer)]
    inside = tree.ids_within(inner for backbone in found for inner in tree.children[id(backbone)])
    outermost = [backbone for backbone in found if id(backbone) not in inside]
    if len(outermost) != 1:
        raise invalid(
            "model",
            "a KerasHub backbone, or a model that contains one",
            [backbone.name for backbone in outermost] or model,
            "pass the backbone itself",
        )
    return outermost[0]
