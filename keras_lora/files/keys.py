"""Names of a model's layers and weights that another process gives them too.

Numbers that Keras gave to layers without a name are left out, since it may count otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import keras

from keras_lora.config import AdapterSpec
from keras_lora.inject import adapted
from keras_lora.layers import LoRALayer, OwnedValues, all_owned, factor_names
from keras_lora.walker import lora_layers, numbered, walk


def variable_keys(model: keras.Model) -> dict[int, str]:
    """The key of each weight of a model: the path of its layer, and its name there."""
    keys: dict[int, str] = {}
    nodes = [("", model), *((f"{node.stable_path}/", node.layer) for node in walk(model))]
    # From below: a layer's weights contain those of the layers in it.
    for prefix, layer in reversed(nodes):
        seen: Counter[str] = Counter()
        for variable in layer.weights:
            if id(variable) not in keys:
                keys[id(variable)] = prefix + numbered(variable.name, seen)
    return keys


def factor_keys(path: str, spec: AdapterSpec) -> list[str]:
    """The keys of an adapter's factors, in their order."""
    return [f"{path}/lora_{name}" for name in factor_names(spec)]


def base_fingerprint(model: keras.Model) -> str:
    """A digest of the keys and shapes of the base's weights."""
    ours = {id(v) for x in lora_layers(model).values() for v in x.adapter_variables}
    keys = variable_keys(model)
    shapes = sorted((keys[id(v)], list(v.shape)) for v in model.weights if id(v) not in ours)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def stable_layers(model: keras.Model) -> dict[str, LoRALayer]:
    """The adapted layers by key."""
    stable = {node.path: node.stable_path for node in walk(model)}
    return {stable.get(path, path): layer for path, layer in adapted(model).items()}


def owned_by(model: keras.Model, name: str) -> list[OwnedValues]:
    """The variables of which an adapter has a value of its own."""
    return [item for item in all_owned(model.variables) if name in item.names]
