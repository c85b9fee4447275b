"""What differs among the adapters of a model: factors, kernels and biases, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lora.export.many.tables import Array, Piece
from keras_lora.files.keys import stable_layers
from keras_lora.layers import (
    BASE,
    LoRALayer,
    OwnedValues,
    Rows,
    all_owned,
    kernel_shape,
    lora_class_for,
    output_gain,
    plain_class,
    split_kernel,
)
from keras_lora.walker import Tree, walk

MAGNITUDE = "lora_magnitude"  # of DoRA, in an adapter's files


@dataclass(eq=False)
class Use:
    """A layer whose factors, kernel or bias differ from row to row, and the keys of these."""

    path: str
    layer: keras.layers.Layer
    factors: tuple[Piece, Piece] | None = None
    kernel: Piece | None = None
    bias: Piece | None = None
    gain: Piece | None = None

    @property
    def pieces(self) -> list[Piece]:
        values = (self.kernel, self.bias, self.gain)
        return [p for p in (*(self.factors or ()), *values) if p is not None]

    def rows(self, taken: Mapping[str, tf.Tensor], refusals: list[str]) -> Rows:
        def of(piece: Piece | None) -> Any:
            return piece and tf.cast(taken[piece.key], self.layer.compute_dtype)

        def refuse(reason: str) -> None:
            refusals.append(f"'{self.path}': {reason}")

        factors = self.factors and (of(self.factors[0]), of(self.factors[1]))
        gain = self.gain and taken[self.gain.key]
        return Rows(refuse, factors, of(self.kernel), of(self.bias), gain)

    def put_update(self, name: str, values: dict[str, Array]) -> None:
        """In an adapter's values, put the scale into `B`, and the gain in the magnitude's place."""
        if self.factors is None or name not in self.layer.adapters:
            return
        adapter, b = self.layer.adapters[name], self.factors[1].key
        values[b] = np.float32(adapter.scaling) * values[b]
        if self.gain is not None and adapter.spec.use_dora:
            split = split_kernel(self.layer)
            gain = output_gain(self.layer, adapter)
            values[b] = np.array(split.times_gain(values[b], gain, split.b))
            values[self.gain.key] = gain
            del values[f"{self.path}/{MAGNITUDE}"]


def adapted_uses(model: keras.Model, names: Sequence[str], refusals: list[str]) -> dict[int, Use]:
    """The layers that these adapters adapt, by identity."""
    uses = {}
    for path, layer in stable_layers(Tree.of(model)).items():
        if not set(names) & set(layer.adapters):
            continue
        if _is_linear(layer):
            gain = _gain_piece(path, layer, names)
            uses[id(layer)] = Use(path, layer, _factor_pieces(path, layer), gain=gain)
        else:
            kind = layer.base_class.__name__
            refusals.append(f"'{path}': a layer of the kind {kind} has no adapters by row")
    return uses


def _factor_pieces(path: str, layer: LoRALayer) -> tuple[Piece, Piece]:
    split = split_kernel(layer)
    shapes: list[list[Any]] = [list(s) for s in split.factor_shapes(kernel_shape(layer), rank=0)]
    for shape, axis in zip(shapes, split.rank_axes, strict=True):
        shape[axis] = None
    a, b = map(tuple, shapes)
    return Piece(f"{path}/lora_a", a), Piece(f"{path}/lora_b", b)


def _gain_piece(path: str, layer: LoRALayer, names: Sequence[str]) -> Piece | None:
    """Of a layer in which one of the adapters has DoRA."""
    specs = [layer.adapters[name].spec for name in names if name in layer.adapters]
    if not any(spec.use_dora for spec in specs):
        return None
    return Piece(f"{path}/lora_gain", split_kernel(layer).norm_shape(kernel_shape(layer)))


def add_owned(
    model: keras.Model, names: Sequence[str], uses: dict[int, Use], refusals: list[str]
) -> dict[str, OwnedValues]:
    """The values that differ among the adapters, by key, as pieces of their layers."""
    keys, owners, owned = Tree.of(model).variable_keys, _owners(model), {}
    for item in all_owned(model.variables):
        if not _differs(item, names):
            continue
        key, owner = keys[id(item.variable)], owners.get(id(item.variable))
        if owner is None or item.variable.dtype == "float64":
            refusals.append(
                f"'{key}': only a kernel or a bias of a Dense or EinsumDense layer, in 32 bits "
                "or less, can differ from row to row"
            )
            continue
        path, layer, role = owner
        use = uses.setdefault(id(layer), Use(path, layer))
        setattr(use, role, Piece(key, tuple(item.variable.shape)))
        owned[key] = item
    return owned


def unplaced(
    model: keras.Model, name: str, values: Mapping[str, Array], pieces: Sequence[Piece]
) -> list[str]:
    """The keys of an adapter that have no piece, and are not values of the base."""
    same = {id(item.variable) for item in all_owned(model.variables) if not _differs(item, [name])}
    known = {piece.key for piece in pieces}
    known |= {key for identity, key in Tree.of(model).variable_keys.items() if identity in same}
    return [key for key in values if key not in known]


def _differs(item: OwnedValues, names: Sequence[str]) -> bool:
    values = (item.value(name) for name in names if name in item.names)
    return any(not np.array_equal(value, item.value(BASE)) for value in values)


def _owners(model: keras.Model) -> dict[int, tuple[str, keras.layers.Layer, str]]:
    """Path, layer and role of each kernel and bias that a layer can have for each row."""
    owners = {}
    for node in walk(model):
        layer = node.layer
        if not layer.built or not _is_linear(layer):
            continue
        owners[id(layer.bias)] = node.path, layer, "bias"
        if not isinstance(layer, LoRALayer) and layer.dtype_policy.quantization_mode is None:
            owners[id(layer.kernel)] = node.path, layer, "kernel"
    return owners


def _is_linear(layer: keras.layers.Layer) -> bool:
    """Whether the layer is of a kind that `Rows` can stand in for."""
    known = isinstance(layer, keras.layers.Dense | keras.layers.EinsumDense)
    return known and lora_class_for(plain_class(layer)) is not None
