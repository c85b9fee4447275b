"""`rematerialize` and `unrematerialize`: blocks whose activations are computed twice, not kept."""

from __future__ import annotations

import keras

from keras_lora.checks import invalid
from keras_lora.inject.compiled import around, refresh
from keras_lora.inject.trial import moving_variables
from keras_lora.inject.turns import turn
from keras_lora.layers import is_recomputed, keep_activations, moves, recompute
from keras_lora.walker import Blocks, Node, Tree, select_blocks


def rematerialize(model: keras.Model, blocks: Blocks = "auto") -> keras.Model:
    """Let the blocks of a model compute their activations again in the backward pass.

        memory of activations: inputs of all blocks + insides of one    instead of    insides of all

    A step computes each block's forward pass twice, and its memory for activations, in bytes,
    falls by about the number of blocks. Losses and updates are those of the plain model: the
    second pass drops what the first dropped. It serves LoRA and full fine-tuning alike, in `fit`
    and in training loops of your own, and is undone by `unrematerialize`.

    The layers stay the same objects of the same classes. So `apply_lora`, `merge_lora` and the
    other verbs work before and after, and files, configs, clones by Keras and SavedModels are those
    of the plain model; a model that is loaded from a file is rematerialized anew.

    Args:
        model: A built model, adapted or not, compiled or not. Compiled functions are made anew.
        blocks: One of

            - `"auto"`: the outermost layers that repeat, and have layers in them: several of a
              class below one layer, or one that a graph calls several times. Where one holds more
              repeating layers than there are of it, these are taken: the blocks of two encoders;
            - a list of names, each a whole path or its end, or `"re:PATTERN"`, as in `targets` of
              `LoRAConfig`;
            - a function of a layer that returns whether it is a block.

    Returns:
        `model`.

    Raises:
        ValueError: nothing is selected, or a block is in another, is not built, is rematerialized
            already, or assigns to its weights in training, as a `BatchNormalization` does unless
            it is frozen. The model is then as it was.

    Example:

    >>> import keras, keras_lora as kl
    >>> blocks = [keras.Sequential([keras.layers.Dense(3, "gelu")]) for _ in range(2)]
    >>> model = keras.Sequential([keras.Input((3,)), *blocks])
    >>> model = kl.rematerialize(model)
    >>> model = kl.unrematerialize(model)

    Reference: Chen et al. 2016, https://arxiv.org/abs/1604.06174, section 4.
    """
    with turn(model, "rematerialize") as tree:
        nodes = select_blocks(tree, blocks)
        _check_kept(tree, nodes)
        _check_still(tree, nodes)
        layers = [node.layer for node in nodes]
        for layer in layers:
            recompute(layer)
        refresh(around(tree, layers))
    return model


def unrematerialize(model: keras.Model) -> keras.Model:
    """Let all blocks of a model keep their activations again: the inverse of `rematerialize`.

    Args:
        model: A model with rematerialized blocks.

    Returns:
        `model`.

    Raises:
        ValueError: no block is rematerialized.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="up")])
    >>> model = kl.unrematerialize(kl.rematerialize(model, blocks=["up"]))
    """
    with turn(model, "unrematerialize") as tree:
        layers = [layer for layer in tree.layers if is_recomputed(layer)]
        if not layers:
            expected = "a model with rematerialized blocks"
            raise invalid("model", expected, model.name, "call rematerialize first")
        for layer in layers:
            keep_activations(layer)
        refresh(around(tree, layers))
    return model


def _check_kept(tree: Tree, nodes: list[Node]) -> None:
    """Refuse a block that is not built, is rematerialized, or is in or around one that is."""
    unbuilt = [node.path for node in nodes if not node.layer.built]
    if unbuilt:
        raise invalid("model", "a built model", unbuilt, "call it on a batch, or build it, first")
    known = [layer for layer in tree.layers if is_recomputed(layer)]
    inside = tree.ids_within(known)
    taken = [
        node.path
        for node in nodes
        if id(node.layer) in inside or any(is_recomputed(x) for x in tree.within(node.layer))
    ]
    if taken:
        raise ValueError(
            f"Expected blocks that keep their activations. Received: {taken}, which are "
            "rematerialized, or are in or around such blocks. Call unrematerialize(model) first."
        )


def _check_still(tree: Tree, nodes: list[Node]) -> None:
    """Refuse a block that assigns to its weights in training, by name."""
    moving = moving_variables(tree)
    for node in nodes:
        weights = [v for v in node.layer.weights if id(v) in moving]
        if weights:
            by = sorted({moving[id(v)].name for v in weights})
            raise moves(node.path, by, [v.path for v in weights])
