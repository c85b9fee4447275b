"""The numbers that stand for layers in KerasHub's `.lora.h5` files, and the layers of a model.

Private Keras API in this file, and why:
    `_flatten_layers`: KerasHub numbers the layers of a backbone in its order.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping

import keras
import numpy as np

from keras_lora.checks import invalid_file, warn
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import PathLike
from keras_lora.layers import family_of, lora_class_for, plain_class, site_of, sites_of
from keras_lora.lowrank.equations import Shape
from keras_lora.lowrank.per_axis import Pair
from keras_lora.walker import Node, backbone_of, walk


def keras_hub_layers(model: keras.layers.Layer) -> dict[int, Node]:
    """The layers of a model's KerasHub backbone, by the number that KerasHub gives them.

    Args:
        model: A backbone, a task, or any model that has one backbone inside. The paths of the
            nodes start at this model.

    Raises:
        ValueError: the model has no backbone, or more than one.
    """
    nodes = {id(node.layer): node for node in walk(model)}
    layers = backbone_of(model)._flatten_layers(include_self=False)
    return {i: nodes[id(v)] for i, v in enumerate(v for v in layers if v.weights)}


def enabled_layers(layers: Mapping[int, Node], names: Collection[str]) -> dict[int, Node]:
    """The layers that `backbone.enable_lora(rank, target_layer_names=names)` enables."""
    return {
        i: node
        for i, node in layers.items()
        # KerasHub's own condition.
        if node.layer.name in names and hasattr(node.layer, "enable_lora")
    }


def is_exchanged(layer: keras.layers.Layer) -> bool:
    """Whether this package can adapt a layer, and KerasHub writes and reads its factors."""
    # KerasHub neither writes the factors of an embedding nor reads them.
    if lora_class_for(plain_class(layer)) is None or family_of(layer) != "linear":
        return False
    try:
        site_of(layer).split()
    except ValueError:  # the equation takes a diagonal
        return False
    return True


def matrix_shape(layer: keras.layers.Layer) -> Shape:
    """The shape of the matrix that KerasHub writes factors of, in layers of other kinds too."""
    if sites_of(layer):
        return site_of(layer).shape
    is_embedding = isinstance(layer, keras.layers.Embedding)
    return tuple((layer.embeddings if is_embedding else layer.kernel).shape)


def match_keras_hub_layers(
    model: keras.layers.Layer,
    pairs: Mapping[int, Pair],
    source: PathLike,
    *,
    skip_unsupported: bool = False,
) -> dict[int, Node]:
    """The layer of a model that each number of a file stands for, after checking that it fits.

    A file has no names, so a file of another model could fit by chance. But KerasHub enables all
    layers of a name or none, so a file that has only some layers of a name is of another model.

    Args:
        model: The backbone, or a model that has it inside.
        pairs: The content of the file, as `read_keras_hub_lora` returns it.
        source: The path of the file, for messages.
        skip_unsupported: Leave out, with a warning, layers that this package cannot adapt.

    Raises:
        AdapterFileError: every way in which file and model differ.
    """
    layers = keras_hub_layers(model)
    named = {i: layers[i] for i in pairs if i in layers}
    supported = {i: n for i, n in named.items() if is_exchanged(n.layer)}
    skipped = [
        f"lora/{i} ('{n.path}')"
        for i, n in named.items()
        if i not in supported and np.tensordot(*pairs[i], 1).any()
    ]
    problems = Problems()
    problems.add(*_not_as_enabled(layers, pairs))
    problems.add(*(p for i, n in supported.items() if (p := _misfit(i, n, pairs[i]))))
    if not skip_unsupported:
        reason = "which cannot be adapted (skip_unsupported=True leaves the layer out)"
        problems.add(*(f"{layer}, {reason}" for layer in skipped))
    expected, fix = (
        "factors for layers of this model",
        "build the backbone that the file was saved from",
    )
    problems.raise_any(lambda received: invalid_file(source, expected, received, fix))
    if skipped:
        warn(f"{os.fspath(source)}: left out {', '.join(skipped)}, which cannot be adapted")
    return supported


def _not_as_enabled(layers: Mapping[int, Node], numbers: Collection[int]) -> Iterator[str]:
    """Why the numbers of a file are not the numbers of all layers of some names."""
    expected = enabled_layers(layers, {layers[i].layer.name for i in numbers if i in layers})
    for i in numbers:
        if i not in layers:
            yield f"lora/{i}, while the model has {len(layers)} layers with weights"
    for i in numbers:
        if i in layers and i not in expected:
            yield f"lora/{i} ('{layers[i].path}'), a layer for which Keras has no LoRA"
    for i, node in expected.items():
        if i not in numbers:
            name = node.layer.name
            yield f"no lora/{i} ('{node.path}'), although other layers called {name!r} are present"


def _misfit(i: int, node: Node, pair: Pair) -> str | None:
    a, b = pair
    shape, rank = matrix_shape(node.layer), len(b)
    if (*a.shape[:-1], b.shape[-1]) == shape:
        return None
    return (
        f"lora/{i} ('{node.path}') of shapes {a.shape} and {b.shape}, expected "
        f"{(*shape[:-1], rank)} and {(rank, shape[-1])}"
    )
