"""Between the variables of a model and the parameters of its Hugging Face counterpart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.exchange.converters import Block, HubWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.layers import BASE, LoRALayer, base_kernel, kernel_shape, owned
from keras_lora.lowrank.equations import Shape
from keras_lora.walker import walk


@dataclass(frozen=True, eq=False)
class Place:
    """Where the elements of a variable are in a parameter.

    Attributes:
        variable: The variable.
        shape: The parameter's shape.
        index: Gives, for each element of the variable, its number in the flattened parameter.
            Few are asked for: that of a table of tokens is larger than the table.
        read: Gives the variable's value from the parameter.
    """

    variable: keras.Variable
    shape: Shape
    index: Callable[[], Array]
    read: Callable[[Array], Array]


Places: TypeAlias = dict[str, list[Place]]


def find_places(
    model: keras.Model,
    weights: HubWeights,
    heads: Mapping[str, str],
    of_adapted: bool = False,
) -> Places:
    """The variables of a model by the parameter that they are taken from.

    `heads` are the modules of Dense layers that no converter knows, by the layer's path. The
    kernels of adapted layers are left out, since they train in no other way, or are in too.

    Raises:
        ValueError: a head that is no Dense layer of the model.
    """
    places: Places = {}
    for path, origin in weights.others.items():
        if origin is not None:
            place = Place(weights.variables[path], origin.shape, origin.index, origin.read)
            places.setdefault(origin.weight, []).append(place)
    layers = {node.path: node.layer for node in walk(model)}
    for path, blocks in weights.blocks.items():
        layer = layers[path]
        trains_apart = of_adapted or not isinstance(layer, LoRALayer)
        if trains_apart and len(kernel_shape(layer)) == 2:
            place = _place_of(base_kernel(layer), blocks[0])
            places.setdefault(blocks[0].weight, []).append(place)
    for path, module in heads.items():
        places |= _head_places(layers.get(path), path, module)
    return places


def gather(
    values: Sequence[tuple[keras.Variable, Array]], places: Places, problems: list[str]
) -> dict[str, Array]:
    """The parameters that these variables are, with these values; the inverse of `scatter`.

    What has no place there is added to `problems`.
    """
    by_variable = {id(p.variable): (key, p) for key, found in places.items() for p in found}
    parameters: dict[str, Array] = {}
    filled: dict[str, Array] = {}
    for variable, value in values:
        if id(variable) not in by_variable:
            problems.append(f"{variable.path}: it is in no parameter there")
            continue
        key, place = by_variable[id(variable)]
        parameter = parameters.setdefault(key, np.zeros(math.prod(place.shape), "float32"))
        index = place.index()
        parameter[index] = value
        filled.setdefault(key, np.zeros(parameter.size, bool))[index] = True
    problems += [f"{key}: only a part of it trains" for key, f in filled.items() if not f.all()]
    return {key: p.reshape(places[key][0].shape) for key, p in parameters.items()}


def scatter(
    parameters: Mapping[str, Array], places: Places, problems: list[str]
) -> list[tuple[keras.Variable, Array]]:
    """The variables that are in these parameters, and their values."""
    values = []
    for key, parameter in parameters.items():
        found = places.get(key, [])
        if not found:
            problems.append(f"{key}: the model has no variable that is this parameter")
        elif parameter.size != math.prod(found[0].shape):
            problems.append(f"{key}: shape {parameter.shape}, expected {found[0].shape}")
        else:
            values += [(p.variable, p.read(parameter.reshape(p.shape))) for p in found]
    return values


def check_copies(copies: Mapping[str, Array], places: Places, problems: list[str]) -> None:
    """Compare what an adapter's file has of its base with the base here.

    PEFT saves tables along with their adapters (and `lm_head`, where the vocabulary was resized),
    and would put these in the place of its base's. Equal is what differs by rounding to 16 bits.
    What has no place here acts on nothing.
    """
    for key in sorted(copies.keys() & places.keys()):
        for variable, value in scatter({key: copies[key]}, places, problems):
            item = owned(variable)
            ours = np.array(ops.convert_to_numpy(variable)) if item is None else item.value(BASE)
            if not np.allclose(value, ours.astype("float32"), rtol=2**-7, atol=1e-6):
                problems.append(f"{key}: the adapter was trained on other values of it")


def _place_of(kernel: keras.Variable, block: Block) -> Place:
    """Of a kernel `(in, out)`."""
    shape = block.shape[::-1] if block.stored_transposed else block.shape

    def index() -> Array:
        grid = np.ix_(block.rows, block.columns)
        places = grid[::-1] if block.stored_transposed else grid
        return np.ravel_multi_index(places, shape).T

    return Place(kernel, shape, index, block.read)


def _head_places(layer: keras.layers.Layer | None, path: str, module: str) -> Places:
    if not isinstance(layer, keras.layers.Dense):
        raise invalid("heads", "paths of Dense layers of the model", path)
    inputs, out = layer.kernel.shape
    block = Block(f"{module}.weight", (out, inputs), False, np.arange(out), np.arange(inputs))
    places = {block.weight: [_place_of(layer.kernel, block)]}
    if layer.bias is not None:
        places[f"{module}.bias"] = [Place(layer.bias, (out,), partial(np.arange, out), np.asarray)]
    return places
