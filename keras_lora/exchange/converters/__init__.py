"""Which weight of a Hugging Face checkpoint each kernel of a KerasHub model is.

KerasHub's converters say it, one for each architecture: `hub_blocks` runs the one of the model's
class on tensors without values (`tensors`), in the place of a checkpoint (`recording`), and reads
off what became of each element (`blocks`). So there is no table of architectures here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora.exchange.converters.blocks import Block, Kernel, Locator, RefusedError
from keras_lora.exchange.converters.converters import MissingFieldError, find_converter
from keras_lora.exchange.converters.recording import Recording, record
from keras_lora.exchange.converters.tensors import (
    Array,
    Shapes,
    Traced,
    demands,
    evaluate,
    merged,
    weight_keys,
)
from keras_lora.layers import (
    base_kernel,
    is_table,
    kernel_shape,
    lora_class_for,
    plain_class,
    split_kernel,
)
from keras_lora.lowrank.equations import Shape
from keras_lora.walker import Node, backbone_of, lora_layers, numbered, walk

__all__ = ["Block", "HubWeights", "MissingFieldError", "Origin", "hub_blocks"]


@dataclass(frozen=True)
class Origin:
    """The one weight that a variable is taken from.

    Attributes:
        weight: Key of the weight.
        shape: Its shape.
    """

    weight: str
    shape: Shape
    value: Traced

    def index(self) -> Array:
        """For each element of the variable, its number in the flattened weight."""
        indices = np.arange(math.prod(self.shape)).reshape(self.shape)
        return self.read(indices)

    def read(self, tensor: Array) -> Array:
        """The variable, from the weight."""
        return evaluate(self.value, {self.weight: tensor})


@dataclass(frozen=True)
class HubWeights:
    """Where the variables of a model lie in a Hugging Face checkpoint.

    The keys of weights are those that KerasHub's converter asks for. It finds them under a
    prefix too: for BERT it asks for `encoder.layer.0...`, and a checkpoint of a model with a
    head has `bert.encoder.layer.0...`.

    Attributes:
        model_type: Hugging Face's name of the architecture.
        blocks: For the path of a layer (as in `find_targets`), the block of its kernel; one for
            each index of the kernel's shared axes, where it has such.
        refused: For the path of a layer that has none, the reason.
        others: For the path of every other variable, where it is from, or None. The path is the
            layer's with the variable's name. A table of positions that is no matrix there is in
            it too.
        variables: These variables themselves.
    """

    model_type: str
    blocks: Mapping[str, tuple[Block, ...]]
    refused: Mapping[str, str]
    others: Mapping[str, Origin | None]
    variables: Mapping[str, keras.Variable]


def hub_blocks(
    model: keras.Model,
    transformers_config: Mapping[str, Any] | None = None,
    *,
    model_type: str | None = None,
) -> HubWeights:
    """Find where the kernels of a model lie in a Hugging Face checkpoint of its architecture.

    Nothing is loaded, and nothing in the model is changed.

    Args:
        model: A KerasHub backbone, or a model that holds one, adapted or not.
        transformers_config: The checkpoint's `config.json` as a dictionary. Only a few
            converters read in it what a Keras backbone does not hold.
        model_type: Hugging Face's name of the architecture, where KerasHub loads several into
            backbones of one class. By default, the one that the backbone's configuration suits.

    Raises:
        MissingFieldError: the converter needs `transformers_config`.
        ValueError: there is no backbone in the model, or no converter for it.

    Example:

    >>> import keras_hub
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> weights = hub_blocks(backbone)
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
    kernels_alone = [n.layer for p, n in layers.items() if p in blocks or not is_table(n.layer)]
    variables = _named_variables(model, kernels_alone)
    others = _origins(variables, recording)
    return HubWeights(converter.model_type, blocks, refused, others, variables)


def _has_matrix(node: Node) -> bool:
    return node.layer.built and lora_class_for(plain_class(node.layer)) is not None


def _kernels(
    layers: Mapping[str, Node], recording: Recording
) -> tuple[dict[str, Kernel], dict[str, str]]:
    """The kernels that come from weights; and for the others, the reason."""
    kernels, refused = {}, {}
    for path, node in layers.items():
        value = recording.values.get(id(base_kernel(node.layer)))
        if isinstance(value, Traced):
            try:
                split = split_kernel(node.layer)
            except ValueError as error:  # a diagonal
                refused[path] = str(error)
            else:
                kernels[path] = Kernel(value, split, kernel_shape(node.layer))
        elif value is not None:
            refused[path] = "computed by the converter from values, and not only from weights"
        elif recording.stopped:
            refused[path] = f"the converter did not come to it: {recording.stopped}"
        else:
            refused[path] = "the converter loads no weight into it"
    return kernels, refused


def _located(
    kernels: Mapping[str, Kernel],
) -> tuple[dict[str, tuple[Block, ...]], dict[str, str]]:
    locator = Locator()
    shapes: dict[str, Shapes] = {}
    blocks, refused = {}, {}
    for path, kernel in kernels.items():
        try:
            shapes[path] = locator.shapes(kernel)
        except RefusedError as error:
            refused[path] = str(error)
    # The whole of a fused matrix is known from all the kernels that are slices of it.
    whole = merged(list(shapes.values()))
    for path in shapes:
        try:
            blocks[path] = locator.blocks(kernels[path], whole)
        except RefusedError as error:
            refused[path] = str(error)
    return blocks, refused


def _bare_parameters(
    blocks: Mapping[str, Sequence[Block]], layers: Mapping[str, Node]
) -> dict[str, str]:
    """Tables, of positions most often, that are no embedding there: their shape is not known."""
    tables = {
        path: found[0].weight for path, found in blocks.items() if is_table(layers[path].layer)
    }
    return {
        path: f"a bare parameter, and no embedding: {key}"
        for path, key in tables.items()
        if not key.endswith(".weight")
    }


def _origins(variables: Mapping[str, Any], recording: Recording) -> dict[str, Origin | None]:
    values: dict[str, Traced] = {}
    shapes: list[Shapes] = []
    for path, variable in variables.items():
        value = recording.values.get(id(variable))
        if isinstance(value, Traced) and len(set(weight_keys(value))) == 1:
            shape = tuple(variable.shape)
            # What is reshaped is most often a bias, a vector.
            demanded = next(demands(value, shape, [(math.prod(shape),), shape]), None)
            if demanded is not None:
                values[path] = value
                shapes.append(demanded)
    whole = merged(shapes)
    keys = {path: weight_keys(value)[0] for path, value in values.items()}
    found = {path: Origin(key, whole[key], values[path]) for path, key in keys.items()}
    return {path: found.get(path) for path in variables}


def _named_variables(
    model: keras.Model, layers: Sequence[keras.layers.Layer]
) -> dict[str, keras.Variable]:
    """The variables of a model that are neither kernels of these layers nor of adapters."""
    tree = [("", model), *((f"{node.path}/", node.layer) for node in walk(model))]
    # Parents come first, so that the innermost layer that has a variable gives the path.
    owners = {id(v): (prefix + v.name, v) for prefix, layer in tree for v in layer.weights}
    adapters = [v for layer in lora_layers(model).values() for v in layer.adapter_variables]
    kernels = [base_kernel(layer) for layer in layers]
    left_out = {id(v) for v in (*adapters, *kernels)}
    seen: Counter[str] = Counter()
    return {numbered(p, seen): v for key, (p, v) in owners.items() if key not in left_out}
