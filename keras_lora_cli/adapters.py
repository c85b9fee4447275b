"""Adapters of every format in one form, read from files alone or through their model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_lora as kl
from keras_lora.checks import AdapterFileError
from keras_lora.exchange.keras_hub.h5 import read_keras_hub_lora
from keras_lora.exchange.peft_files import PeftModule, read_peft_adapter
from keras_lora.files.keys import owned_by, stable_banks
from keras_lora.files.ordinary import as_ordinary
from keras_lora.files.saving import adapter_tensors
from keras_lora.lowrank.combining import WeightedFactors
from keras_lora.lowrank.decomposing import Array
from keras_lora.walker import Tree
from keras_lora_cli.paths import ADAPTER_CONFIG_FILE, ADAPTERS, Kind, check_kind, read_json


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An adapter's part on one layer: the delta `scale * a @ b`, in the shapes of the file.

    Attributes:
        rank: The inner size.
        alpha: Numerator of the scale; None if the files have no alpha.
        scale: The factor in front of the product.
        a: The first factor as it is stored.
        b: The second factor as it is stored.
        matrices: The factors as `(shared, d, r)` and `(shared, r, k)`; None if the shapes alone
            do not tell which axes these are.
        extras: Further values of the layer, such as DoRA's magnitude, by name.
    """

    rank: int
    alpha: float | None
    scale: float
    a: Array
    b: Array
    matrices: tuple[Array, Array] | None = None
    extras: Mapping[str, Array] = field(default_factory=dict)

    @property
    def term(self) -> WeightedFactors | None:
        """The delta, with copies of the factors in float64; None if the matrices are not known."""
        return WeightedFactors(*self.matrices, self.scale) if self.matrices else None

    @property
    def parameters(self) -> int:
        return sum(value.size for value in (self.a, self.b, *self.extras.values()))


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter.

    Attributes:
        kind: The format of its files.
        layers: Its parts, by the layer's path or number, or the module's name.
        values: Its heads and biases, by name.
        config: The configuration in its files; empty for a `.lora.h5` file.
        unknown: The names of tensors that are no known part of an adapter.
    """

    kind: Kind
    layers: Mapping[str, Layer]
    values: Mapping[str, Array]
    config: Mapping[str, Any]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PeftOptions:
    """The options of `keras_lora.load_peft_adapter`, which explains each."""

    heads: Mapping[str, str] = field(default_factory=dict)
    model_type: str | None = None
    transformers_config: Mapping[str, Any] | None = None


def read_adapter(path: str) -> Adapter:
    """Read an adapter of any format, without the model that it belongs to.

    Raises:
        ValueError: the path has no adapter.
        AdapterFileError: its files are damaged.
    """
    return _READERS[check_kind(path, ADAPTERS)](path)


def load_into(
    model: keras.Model,
    path: str,
    name: str,
    options: PeftOptions,
    *,
    rank: int | None = None,
) -> list[kl.ConvertedLayer]:
    """Add an adapter of any format to a model.

    Returns:
        The converted layers of a KerasHub file; an empty list for the other formats.
    """
    kind = check_kind(path, ADAPTERS)
    if kind is Kind.KERAS_HUB:
        return kl.load_keras_hub_lora(model, path, name, rank=rank)
    if kind is Kind.PEFT:
        kl.load_peft_adapter(model, path, name, **vars(options))
    else:
        kl.load_adapter(model, path, name)
    return []


def adapter_of(model: keras.Model, name: str, path: str) -> Adapter:
    """The adapter that `load_into` has added to a model from a path, in this module's form."""
    kind, tree = check_kind(path, ADAPTERS), Tree.of(model)
    keys, tensors = tree.variable_keys, adapter_tensors(tree, name, ordinary=True)
    values = {keys[id(item.variable)]: item.value(name) for item in owned_by(tree, name)}
    factors = {key: value for key, value in tensors.items() if key not in values}
    layers = {}
    for owner, bank in stable_banks(tree).items():
        if name in bank.adapters:
            found = _layer(bank.ordinary(name).acting_spec, _at(owner, factors))
            site = bank.site
            matrices = site.split().matrices(found.a, found.b, site.shape)
            layers[owner] = replace(found, matrices=matrices)
    config = _CONFIG_READERS[kind](path)
    return Adapter(kind=kind, layers=layers, values=values, config=config)


def _read_native(path: str) -> Adapter:
    files = kl.read_adapter_files(path)
    config, tensors = files.config, files.tensors
    values = {key: tensors[key] for key in config.get("variables", ()) if key in tensors}
    factors = {key: value for key, value in tensors.items() if key not in values}
    layers, unknown = {}, []
    for owner in dict.fromkeys(key.rpartition("/")[0] for key in factors):
        found = _at(owner, factors)
        if found.keys() >= {"lora_a", "lora_b"}:
            spec = _native_spec(path, owner, config)
            axes = _rank_axes(found["lora_a"], found["lora_b"], spec.rank)
            if len(axes) == 1:
                spec, ordinary = as_ordinary(owner, spec, factors, *axes)
                found = _at(owner, ordinary)
            layer = _layer(spec, found)
            layers[owner] = replace(layer, matrices=_matrices(layer, axes))
        else:
            unknown += [f"{owner}/{name}" for name in found]
    return Adapter(
        kind=Kind.NATIVE, layers=layers, values=values, config=config, unknown=tuple(unknown)
    )


def _at(owner: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of one layer, by the last part of their keys."""
    keys = {key: key.rpartition("/") for key in tensors}
    return {name: tensors[key] for key, (of, _, name) in keys.items() if of == owner}


def _native_spec(path: str, owner: str, config: Mapping[str, Any]) -> kl.AdapterSpec:
    try:
        return kl.AdapterSpec(**config["layer_specs"].get(owner, config["spec"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(
            f"Invalid {path!r}: expected a spec for each layer. Received for {owner!r}: "
            f"{type(error).__name__}: {error}; save the adapter again."
        ) from error


def _layer(spec: kl.AdapterSpec, tensors: Mapping[str, Array]) -> Layer:
    """A layer from the tensors of a native adapter, without its matrices."""
    extras = dict(tensors)
    a, b = extras.pop("lora_a"), extras.pop("lora_b")
    return Layer(rank=spec.rank, alpha=spec.alpha, scale=spec.scaling, a=a, b=b, extras=extras)


def _rank_axes(a: Array, b: Array, rank: int) -> list[int]:
    """Where the rank may be in `b`: factors `(shared..., d..., r)` and `(shared..., r, k...)`."""
    return [
        i
        for i in range(b.ndim)
        if a.shape[:i] == b.shape[:i] and b.shape[i] == rank == a.shape[-1] and i < a.ndim
    ]


def _matrices(layer: Layer, rank_axes: Sequence[int]) -> tuple[Array, Array] | None:
    """The matrices of the factors; None if the shapes do not tell where the rank is."""
    if len(rank_axes) != 1:
        return None
    a, b, rank = layer.a, layer.b, layer.rank
    shared = int(np.prod(a.shape[: rank_axes[0]]))
    return a.reshape(shared, -1, rank), b.reshape(shared, rank, -1)


def _read_peft(path: str) -> Adapter:
    found = read_peft_adapter(path)
    return Adapter(
        kind=Kind.PEFT,
        layers={name: _peft_layer(module) for name, module in found.modules.items()},
        values=found.saved,
        config=found.config,
        unknown=found.unknown,
    )


def _peft_layer(module: PeftModule) -> Layer:
    extras = {"lora_magnitude_vector": module.magnitude, "lora_B.bias": module.bias}
    rank, a, b = module.rank, module.a, module.b
    grouped = b.shape[1] != rank
    matrices = a.reshape(rank, -1).T[None], b.reshape(len(b), -1).T[None]
    return Layer(
        rank=rank,
        alpha=module.alpha,
        scale=module.scaling,
        a=a,
        b=b,
        matrices=None if grouped else matrices,
        extras={name: value for name, value in extras.items() if value is not None},
    )


def _read_keras_hub(path: str) -> Adapter:
    pairs = read_keras_hub_lora(path)
    layers = {
        str(i): Layer(
            rank=len(b),
            alpha=None,
            scale=1.0,
            a=a,
            b=b,
            matrices=(a.reshape(1, -1, len(b)), b[None]),
        )
        for i, (a, b) in pairs.items()
    }
    return Adapter(kind=Kind.KERAS_HUB, layers=layers, values={}, config={})


_READERS: dict[Kind, Callable[[str], Adapter]] = {
    Kind.NATIVE: _read_native,
    Kind.PEFT: _read_peft,
    Kind.KERAS_HUB: _read_keras_hub,
}
_CONFIG_READERS: dict[Kind, Callable[[str], Mapping[str, Any]]] = {
    Kind.NATIVE: kl.read_adapter_config,
    Kind.PEFT: lambda path: read_json(Path(path) / ADAPTER_CONFIG_FILE),
    Kind.KERAS_HUB: lambda _: {},
}
