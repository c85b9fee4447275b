"""The layers of a model in which the adapters differ: in factors, kernel or bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lora.export.many.stacks import AdapterTensor, Array
from keras_lora.files.keys import stable_banks
from keras_lora.layers import (
    BASE,
    AdapterBank,
    LoRALayer,
    MixedBatch,
    OwnedValues,
    Site,
    all_owned,
    output_gain,
    site_of,
    sites_of,
)
from keras_lora.walker import Tree

MAGNITUDE = "lora_magnitude"  # of DoRA, in an adapter's files


@dataclass(eq=False)
class ServedLayer:
    """A layer that computes each row of a batch with the tensors of that row's adapter.

    Attributes:
        path: The layer's path in the model.
        layer: An adapted layer, or a plain one of whose kernel or bias adapters own values.
        factors: `A` and `B`, with the scale in `B`.
        kernel: A kernel that is trained in full, as a head's.
        bias: A bias that is trained.
        gain: DoRA's `g`, in place of the magnitude, so that the norm of `W0` is not needed.
    """

    path: str
    layer: keras.layers.Layer
    factors: tuple[AdapterTensor, AdapterTensor] | None = None
    kernel: AdapterTensor | None = None
    bias: AdapterTensor | None = None
    gain: AdapterTensor | None = None

    @property
    def tensors(self) -> list[AdapterTensor]:
        values = (self.kernel, self.bias, self.gain)
        return [t for t in (*(self.factors or ()), *values) if t is not None]

    def by_row(self, taken: Mapping[str, tf.Tensor], refusals: list[str]) -> MixedBatch:
        """The layer's part of the tensors of a batch.

        Args:
            taken: The tensors of each row's adapter, by key, from `StoredStacks.take`.
            refusals: The list to add the reason to if the layer cannot compute row by row.
        """

        def of(tensor: AdapterTensor | None) -> Any:
            return tensor and tf.cast(taken[tensor.key], self.layer.compute_dtype)

        def refuse(reason: str) -> None:
            refusals.append(f"'{self.path}': {reason}")

        factors = self.factors and (of(self.factors[0]), of(self.factors[1]))
        gain = self.gain and taken[self.gain.key]
        return MixedBatch(refuse, factors, of(self.kernel), of(self.bias), gain)

    def scale_values(self, name: str, values: dict[str, Array]) -> None:
        """Replace `B` by `s B` in an adapter's values and, with DoRA, by `g s B`, and `m` by `g`.

        The equation of `lowrank.equations`: `y = g (x W0) + (x A) (g s B)`.
        """
        if self.factors is None or name not in self.layer.adapters:
            return
        adapter, b = self.layer.bank.ordinary(name), self.factors[1].key
        values[b] = np.float32(adapter.scaling) * values[b]
        if self.gain is not None and adapter.spec.use_dora:
            split = site_of(self.layer).split()
            gain = output_gain(site_of(self.layer), adapter)
            values[b] = np.array(split.times_gain(values[b], gain, split.b))
            values[self.gain.key] = gain
            del values[f"{self.path}/{MAGNITUDE}"]


def adapted_layers(tree: Tree, names: Sequence[str], refusals: list[str]) -> dict[int, ServedLayer]:
    """The layers that these adapters adapt, by identity."""
    served = {}
    for path, bank in stable_banks(tree).items():
        if not set(names) & set(bank.adapters):
            continue
        layer = bank.site.layer
        if _takes_rows(layer):
            factors, gain = _factors(path, bank.site), _gain(path, bank, names)
            served[id(layer)] = ServedLayer(path, layer, factors, gain=gain)
        else:
            kind = layer.base_class.__name__
            refusals.append(f"'{path}': the adapters of {kind} cannot differ from row to row")
    return served


def _factors(path: str, site: Site) -> tuple[AdapterTensor, AdapterTensor]:
    split = site.split()
    shapes: list[list[Any]] = [list(s) for s in split.factor_shapes(site.shape, rank=0)]
    for shape, axis in zip(shapes, split.rank_axes, strict=True):
        shape[axis] = None
    a, b = map(tuple, shapes)
    return AdapterTensor(f"{path}/lora_a", a), AdapterTensor(f"{path}/lora_b", b)


def _gain(path: str, bank: AdapterBank, names: Sequence[str]) -> AdapterTensor | None:
    """The gain of a layer on which one of the adapters has DoRA."""
    specs = [bank.adapters[name].spec for name in names if name in bank.adapters]
    if not any(spec.use_dora for spec in specs):
        return None
    shape = bank.site.split().norm_shape(bank.site.shape)
    return AdapterTensor(f"{path}/lora_gain", shape)


def add_owned(
    tree: Tree,
    names: Sequence[str],
    served: dict[int, ServedLayer],
    refusals: list[str],
) -> dict[str, OwnedValues]:
    """Add the kernels and biases in which the adapters differ to the layers that have them.

    Args:
        tree: The layers of the model.
        names: The adapters.
        served: The layers to add the tensors to; missing layers are added.
        refusals: The list to add a reason to for each value that cannot differ by row.

    Returns:
        The values by key.
    """
    keys, owners, owned = tree.variable_keys, _owners(tree), {}
    for item in all_owned(tree.root.variables):
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
        into = served.setdefault(id(layer), ServedLayer(path, layer))
        setattr(into, role, AdapterTensor(key, tuple(item.variable.shape)))
        owned[key] = item
    return owned


def unplaced(
    tree: Tree, name: str, values: Mapping[str, Array], tensors: Sequence[AdapterTensor]
) -> list[str]:
    """The keys of an adapter's values that are neither served by row nor equal to the base's."""
    owned = all_owned(tree.root.variables)
    same = {id(item.variable) for item in owned if not _differs(item, [name])}
    known = {tensor.key for tensor in tensors}
    known |= {key for identity, key in tree.variable_keys.items() if identity in same}
    return [key for key in values if key not in known]


def _differs(item: OwnedValues, names: Sequence[str]) -> bool:
    """Whether the value of one of these adapters is another than the base's."""
    values = (item.value(name) for name in names if name in item.names)
    return any(not np.array_equal(value, item.value(BASE)) for value in values)


def _owners(tree: Tree) -> dict[int, tuple[str, keras.layers.Layer, str]]:
    """Path, layer and role of each kernel and bias that can differ from row to row."""
    owners = {}
    for node in tree.nodes:
        layer = node.layer
        if not layer.built or not _takes_rows(layer):
            continue
        owners[id(layer.bias)] = node.path, layer, "bias"
        if not isinstance(layer, LoRALayer) and layer.dtype_policy.quantization_mode is None:
            owners[id(layer.kernel)] = node.path, layer, "kernel"
    return owners


def _takes_rows(layer: keras.layers.Layer) -> bool:
    """Whether the layer can be computed with an adapter of its own for each row."""
    sites = sites_of(layer).values()
    return bool(sites) and all(site.kind.by_row for site in sites)
