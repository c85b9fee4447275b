"""The blocks of a model: the outermost layers that repeat.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_inbound_nodes`: the only way to how often a graph calls a layer, as ALBERT does its one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeAlias

from keras_lora.checks import invalid
from keras_lora.config import check_names
from keras_lora.layers import plain_class
from keras_lora.walker.names import match_names
from keras_lora.walker.tree import Layer, Node, Tree

Blocks: TypeAlias = "str | Sequence[str] | Callable[[Layer], bool]"


def select_blocks(tree: Tree, blocks: Blocks) -> list[Node]:
    """The layers that `blocks` selects, none of which is in another.

    Raises:
        ValueError: nothing is selected, a name matches nothing, or a layer is in another.
    """
    selected = _selected(tree, blocks)
    if not selected:
        raise invalid(
            "blocks",
            "layers to select",
            blocks,
            "the model has no layers that repeat and have layers in them. Its blocks may be parts "
            "of one graph, as in keras.applications: make each of them a layer or a model of its "
            'own, or name layers, as in blocks=["up"]'
            if blocks == "auto"
            else "no layer of the model is selected",
        )
    inner = {id(layer): node for node in selected for layer in tree.within(node.layer)[1:]}
    for node in selected:
        if id(node.layer) in inner:
            outer = inner[id(node.layer)].path
            raise invalid(
                "blocks",
                "layers of which none is in another, since each level computes all below it again",
                [outer, node.path],
                "name the outer or the inner ones",
            )
    return selected


def _selected(tree: Tree, blocks: Blocks) -> list[Node]:
    if callable(blocks):
        return [node for node in tree.nodes if blocks(node.layer)]
    if blocks == "auto":
        repeated = {id(layer) for layer in _repeated(tree, tree.root)}
        return [node for node in tree.nodes if id(node.layer) in repeated]
    if isinstance(blocks, str) and not blocks.startswith("re:"):
        expected = 'one of "auto", a pattern "re:...", a list of names, or a function of a layer'
        raise invalid("blocks", expected, blocks, f"for a layer of that name write [{blocks!r}]")
    names = check_names("blocks", [blocks] if isinstance(blocks, str) else blocks)
    return match_names(names, tree.nodes, "blocks")


def _repeated(tree: Tree, parent: Layer) -> list[Layer]:
    """The outermost layers below `parent` that repeat.

    They are entered where one of them holds more that repeat than there are of them: two encoders
    of twelve blocks, four stages of six.
    """
    composite = [x for x in tree.children[id(parent)] if tree.children[id(x)] and x.weights]
    found: list[Layer] = []
    for _, group in groupby(sorted(composite, key=_kind), key=_kind):
        layers = list(group)
        inside = [_repeated(tree, layer) for layer in layers]
        times = max(len(layers), *(len(layer._inbound_nodes) for layer in layers))
        if times == 1:
            found += inside[0]
        elif max(map(len, inside)) > times:
            found += [
                x for layer, each in zip(layers, inside, strict=True) for x in each or [layer]
            ]
        else:
            found += layers
    return found


def _kind(layer: Layer) -> str:
    layer_class = plain_class(layer)
    return f"{layer_class.__module__}.{layer_class.__qualname__}"
