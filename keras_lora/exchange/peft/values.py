"""The variables of a Keras model as slices of the parameters of the Hugging Face model."""

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
from keras_lora.exchange.converters import Block, HuggingFaceWeights
from keras_lora.exchange.converters.tensors import Array
from keras_lora.exchange.peft_files import PeftModule
from keras_lora.exchange.problems import Problems
from keras_lora.layers import BASE, LoRALayer, owned, site_of
from keras_lora.lowrank.equations import Shape
from keras_lora.walker import walk


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """A variable as a slice of a Hugging Face parameter.

    Attributes:
        variable: The variable.
        shape: The parameter's shape.
        index: Gives, for each element of the variable, the number of its element in the flattened
            parameter. A function, since the index of an embedding matrix takes more memory than
            the matrix.
        read: Gives the variable's value from the parameter's value.
    """

    variable: keras.Variable
    shape: Shape
    index: Callable[[], Array]
    read: Callable[[Array], Array]


ParameterSlices: TypeAlias = dict[str, list[ParameterSlice]]


def find_slices(
    model: keras.Model,
    weights: HuggingFaceWeights,
    heads: Mapping[str, str],
    of_adapted: bool = False,
) -> ParameterSlices:
    """The variables of a model, by the name of the parameter that they are slices of.

    Args:
        model: The Keras model.
        weights: Where its variables come from.
        heads: `{path of a Dense layer: name of its module}` for layers that no converter knows.
        of_adapted: Include the kernels of adapted layers, which never train themselves.

    Raises:
        ValueError: a head that is no Dense layer of the model.
    """
    slices: ParameterSlices = {}
    for path, source in weights.others.items():
        if source is not None:
            found = ParameterSlice(weights.variables[path], source.shape, source.index, source.read)
            slices.setdefault(source.weight, []).append(found)
    layers = {node.path: node.layer for node in walk(model)}
    for path, blocks in weights.blocks.items():
        layer = layers[path]
        included = of_adapted or not isinstance(layer, LoRALayer)
        if included and len(site_of(layer).shape) == 2:
            found = _slice_of(site_of(layer).matrix, blocks[0])
            slices.setdefault(blocks[0].weight, []).append(found)
    for path, module in heads.items():
        slices |= _head_slices(layers.get(path), path, module)
    return slices


def gather(
    values: Sequence[tuple[keras.Variable, Array]], slices: ParameterSlices, problems: Problems
) -> dict[str, Array]:
    """The parameters that consist of these variables, with these values: inverse of `scatter`.

    Added to `problems`: variables that are no slice of a parameter, and parameters of which a part
    has no value.
    """
    by_variable = {id(s.variable): (key, s) for key, found in slices.items() for s in found}
    parameters: dict[str, Array] = {}
    filled: dict[str, Array] = {}
    for variable, value in values:
        if id(variable) not in by_variable:
            problems.add(f"{variable.path}: it is in no parameter of the Hugging Face model")
            continue
        key, found = by_variable[id(variable)]
        parameter = parameters.setdefault(key, np.zeros(math.prod(found.shape), "float32"))
        index = found.index()
        parameter[index] = value
        filled.setdefault(key, np.zeros(parameter.size, bool))[index] = True
    problems.add(*(f"{key}: only a part of it trains" for key, f in filled.items() if not f.all()))
    return {key: p.reshape(slices[key][0].shape) for key, p in parameters.items()}


def scatter(
    parameters: Mapping[str, Array], slices: ParameterSlices, problems: Problems
) -> list[tuple[keras.Variable, Array]]:
    """The variables that are slices of these parameters, and their values.

    Parameters without such variables, or of another shape, are added to `problems`.
    """
    values = []
    for key, parameter in parameters.items():
        found = slices.get(key, [])
        if not found:
            problems.add(f"{key}: the model has no variable for this parameter")
        elif parameter.size != math.prod(found[0].shape):
            problems.add(f"{key}: shape {parameter.shape}, expected {found[0].shape}")
        else:
            values += [(s.variable, s.read(parameter.reshape(s.shape))) for s in found]
    return values


def with_added_biases(
    values: Sequence[tuple[keras.Variable, Array]],
    modules: Mapping[str, PeftModule],
    slices: ParameterSlices,
    problems: Problems,
) -> list[tuple[keras.Variable, Array]]:
    """The values, and those of the biases to which modules add one of `B` (`lora_bias`).

        h = x W0^T + b + s ((x a^T) b_B^T + bias)    <->    b + s bias, a trained bias

    Modules whose layers have no bias in Keras are added to `problems`.
    """
    added = {f"{n}.bias": m.scaling * m.bias for n, m in modules.items() if m.bias is not None}
    problems.add(
        *(f"{key}: the layer has no bias in Keras for lora_bias" for key in added.keys() - slices)
    )
    found = {id(variable): (variable, value) for variable, value in values}
    known = {key: added[key] for key in added.keys() & slices}
    for variable, update in scatter(known, slices, problems):
        _, value = found.get(id(variable), (variable, _of_base(variable)))
        found[id(variable)] = variable, value + update
    return list(found.values())


def _of_base(variable: keras.Variable) -> Array:
    item = owned(variable)
    value = np.array(ops.convert_to_numpy(variable)) if item is None else item.value(BASE)
    return value.astype("float32")


def check_copies(copies: Mapping[str, Array], slices: ParameterSlices, problems: Problems) -> None:
    """Compare the copies of base parameters in an adapter's file with the base of the model.

    PEFT saves an embedding matrix along with its adapter (and `lm_head`, if the vocabulary was
    resized), and puts the copy in the place of the base's. A difference that rounding to 16 bits
    makes is allowed. A copy of a parameter that the model does not have is ignored.
    """
    for key in sorted(copies.keys() & slices.keys()):
        for variable, value in scatter({key: copies[key]}, slices, problems):
            if not np.allclose(value, _of_base(variable), rtol=2**-7, atol=1e-6):
                problems.add(f"{key}: the adapter was trained with other values of this parameter")


def _slice_of(kernel: keras.Variable, block: Block) -> ParameterSlice:
    """A kernel `(in, out)` as a slice of the weight of its block."""
    shape = block.shape[::-1] if block.stored_transposed else block.shape

    def index() -> Array:
        grid = np.ix_(block.rows, block.columns)
        stored = grid[::-1] if block.stored_transposed else grid
        return np.ravel_multi_index(stored, shape).T

    return ParameterSlice(kernel, shape, index, block.read)


def _head_slices(layer: keras.layers.Layer | None, path: str, module: str) -> ParameterSlices:
    if not isinstance(layer, keras.layers.Dense):
        raise invalid("heads", "paths of Dense layers of the model", path)
    inputs, out = layer.kernel.shape
    block = Block(f"{module}.weight", (out, inputs), False, np.arange(out), np.arange(inputs))
    slices = {block.weight: [_slice_of(layer.kernel, block)]}
    if layer.bias is not None:
        slices[f"{module}.bias"] = [
            ParameterSlice(layer.bias, (out,), partial(np.arange, out), np.asarray)
        ]
    return slices
