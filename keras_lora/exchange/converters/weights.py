"""Where the kernels and other variables of a KerasHub model come from in a checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora.exchange.converters.blocks import Block, ConvertedKernel, Locator, RefusedError
from keras_lora.exchange.converters.converters import find_converter
from keras_lora.exchange.converters.recording import Recording, record
from keras_lora.exchange.converters.tensors import (
    Array,
    Shapes,
    Traced,
    demands,
    evaluate,
    least_shapes,
    weight_keys,
)
from keras_lora.layers import family_of, lora_class_for, plain_class, site_of
from keras_lora.lowrank.equations import Shape
from keras_lora.walker import Node, backbone_of, lora_layers, numbered, walk


@dataclass(frozen=True)
class WeightSource:
    """The one weight from which a variable is taken that is no kernel.

    Attributes:
        weight: The key of the weight.
        shape: The shape of the weight.
        value: The operations of the converter that make the variable from the weight.
    """

    weight: str
    shape: Shape
    value: Traced

    def index(self) -> Array:
        """For each element of the variable, the number of its element in the flattened weight."""
        indices = np.arange(math.prod(self.shape)).reshape(self.shape)
        return self.read(indices)

    def read(self, tensor: Array) -> Array:
        """The variable's value, from the value of the weight."""
        return evaluate(self.value, {self.weight: tensor})


@dataclass(frozen=True)
class HuggingFaceWeights:
    """Where the variables of a model come from in a Hugging Face checkpoint.

    The keys of weights are the names that KerasHub's converter asks for. KerasHub finds a weight
    under a prefix too: for BERT the converter asks for `encoder.layer.0...`, and a checkpoint of
    a model with a head has `bert.encoder.layer.0...`.

    Attributes:
        model_type: Hugging Face's name of the architecture.
        blocks: For the path of a layer (as in `find_targets`), the block of its kernel. A kernel
            with shared axes, as of stacked experts, has a block for each index of these axes.
        refused: For the path of a layer whose kernel is no block of one weight, the reason.
        others: For the path of every other variable, its source, or None where it has none. The
            path is the layer's path and the variable's name. An embedding matrix of
            positions that is a bare parameter in the Hugging Face model is among these.
        variables: The variables that `others` names.
    """

    model_type: str
    blocks: Mapping[str, tuple[Block, ...]]
    refused: Mapping[str, str]
    others: Mapping[str, WeightSource | None]
    variables: Mapping[str, keras.Variable]


def hugging_face_weights(
    model: keras.Model,
    transformers_config: Mapping[str, Any] | None = None,
    *,
    model_type: str | None = None,
) -> HuggingFaceWeights:
    """Find where the kernels of a model are in a Hugging Face checkpoint of its architecture.

    No checkpoint is loaded, and the model does not change.

    Args:
        model: A KerasHub backbone, or a model that has one inside, adapted or not.
        transformers_config: The checkpoint's `config.json` as a dictionary. Only a few
            converters need it, for fields that a Keras backbone does not know.
        model_type: Hugging Face's name of the architecture, where KerasHub loads several
            architectures into backbones of one class. By default the architecture that fits the
            backbone's configuration best.

    Raises:
        MissingFieldError: the converter needs `transformers_config`.
        ValueError: the model has no backbone, or KerasHub has no converter for the backbone.

    Example:

    >>> import keras_hub
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> weights = hugging_face_weights(backbone)
    >>> (block,) = weights.blocks["transformer_layer_0/self_attention/value"]
    >>> block.weight, block.shape, block.stored_transposed, block.rows
    ('h.0.attn.c_attn.weight', (18, 6), True, array([12, 13, 14, 15, 16, 17]))
    """
    backbone = backbone_of(model)
    converter = find_converter(backbone, transformers_config, model_type)
    recording = record(model, backbone, converter)
    layers = {node.path: node for node in walk(model) if _has_matrix(node)}
    kernels, refused = _kernels(layers, recording)
    blocks, unlocated = _located(kernels)
    refused |= unlocated | _bare_parameters(blocks, layers)
    blocks = {path: found for path, found in blocks.items() if path not in refused}
    # The matrix of a refused embedding may still come from one weight, and belongs to `others`.
    kernel_layers = [
        n.layer for p, n in layers.items() if p in blocks or family_of(n.layer) != "embedding"
    ]
    variables = _named_variables(model, kernel_layers)
    others = _sources(variables, recording)
    return HuggingFaceWeights(converter.model_type, blocks, refused, others, variables)


def _has_matrix(node: Node) -> bool:
    """Whether the layer can be adapted, and its matrix is one for Hugging Face too."""
    known = family_of(node.layer) in ("linear", "embedding")
    return known and node.layer.built and lora_class_for(plain_class(node.layer)) is not None


def _kernels(
    layers: Mapping[str, Node], recording: Recording
) -> tuple[dict[str, ConvertedKernel], dict[str, str]]:
    """The kernels that come from weights; and for each other layer, why its kernel does not."""
    kernels, refused = {}, {}
    for path, node in layers.items():
        value = recording.values.get(id(site_of(node.layer).matrix))
        if isinstance(value, Traced):
            try:
                split = site_of(node.layer).split()
            except ValueError as error:  # the equation takes a diagonal
                refused[path] = str(error)
            else:
                kernels[path] = ConvertedKernel(value, split, site_of(node.layer).shape)
        elif value is not None:
            refused[path] = "computed by the converter from other values than weights"
        elif recording.stopped:
            refused[path] = f"the converter stopped before this layer: {recording.stopped}"
        else:
            refused[path] = "the converter loads no weight into it"
    return kernels, refused


def _located(
    kernels: Mapping[str, ConvertedKernel],
) -> tuple[dict[str, tuple[Block, ...]], dict[str, str]]:
    locator = Locator()
    shapes: dict[str, Shapes] = {}
    blocks, refused = {}, {}
    for path, kernel in kernels.items():
        try:
            shapes[path] = locator.shapes(kernel)
        except RefusedError as error:
            refused[path] = str(error)
    # The size of a fused matrix follows only from all the kernels that are slices of it.
    whole = least_shapes(list(shapes.values()))
    for path in shapes:
        try:
            blocks[path] = locator.blocks(kernels[path], whole)
        except RefusedError as error:
            refused[path] = str(error)
    return blocks, refused


def _bare_parameters(
    blocks: Mapping[str, Sequence[Block]], layers: Mapping[str, Node]
) -> dict[str, str]:
    """Embeddings, mostly of positions, that are bare parameters in the Hugging Face model.

    Such a parameter may have more axes than a matrix, so that its shape is not known.
    """
    weights = {
        path: found[0].weight
        for path, found in blocks.items()
        if family_of(layers[path].layer) == "embedding"
    }
    return {
        path: f"a bare parameter in the Hugging Face model, and no embedding: {key}"
        for path, key in weights.items()
        if not key.endswith(".weight")
    }


def _sources(variables: Mapping[str, Any], recording: Recording) -> dict[str, WeightSource | None]:
    values: dict[str, Traced] = {}
    shapes: list[Shapes] = []
    for path, variable in variables.items():
        value = recording.values.get(id(variable))
        if isinstance(value, Traced) and len(set(weight_keys(value))) == 1:
            shape = tuple(variable.shape)
            # A weight that the converter reshapes is mostly a bias, so a vector is tried first.
            demanded = next(demands(value, shape, [(math.prod(shape),), shape]), None)
            if demanded is not None:
                values[path] = value
                shapes.append(demanded)
    whole = least_shapes(shapes)
    keys = {path: weight_keys(value)[0] for path, value in values.items()}
    found = {path: WeightSource(key, whole[key], values[path]) for path, key in keys.items()}
    return {path: found.get(path) for path in variables}


def _named_variables(
    model: keras.Model, layers: Sequence[keras.layers.Layer]
) -> dict[str, keras.Variable]:
    """The variables of a model, without the kernels of these layers and those of adapters."""
    tree = [("", model), *((f"{node.path}/", node.layer) for node in walk(model))]
    # Parents come first, so the innermost layer with a variable gives the path.
    owners = {id(v): (prefix + v.name, v) for prefix, layer in tree for v in layer.weights}
    adapters = [v for layer in lora_layers(model).values() for v in layer.adapter_variables]
    kernels = [site_of(layer).matrix for layer in layers]
    left_out = {id(v) for v in (*adapters, *kernels)}
    seen: Counter[str] = Counter()
    return {numbered(p, seen): v for key, (p, v) in owners.items() if key not in left_out}
