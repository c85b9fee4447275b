"""Names of a model's layers and weights that are the same in every process.

The numbers that Keras gives to layers without a name are left out, since they may differ.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.checks import warn
from keras_lora.config import AdapterSpec
from keras_lora.inject import adapted, thawed_by_others, trained_by_none
from keras_lora.layers import AdapterBank, OwnedValues, all_owned, factor_names, shapes_in_float
from keras_lora.walker import Tree


def factor_keys(path: str, spec: AdapterSpec) -> list[str]:
    """The keys of an adapter's factors, in their order."""
    return [f"{path}/lora_{name}" for name in factor_names(spec)]


def base_fingerprint(tree: Tree) -> str:
    """A digest of the keys and shapes of the base's weights, as they are in floating point."""
    ours: dict[int, Any] = {id(v): None for bank in tree.banks for v in bank.variables}
    for layer in tree.layers:
        ours |= shapes_in_float(layer)
    keys = tree.variable_keys
    found = [(keys[id(v)], ours.get(id(v), v.shape)) for v in tree.root.weights]
    shapes = sorted((key, list(shape)) for key, shape in found if shape is not None)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def stable_banks(tree: Tree) -> dict[str, AdapterBank]:
    """The bank of each adapted matrix, by stable path.

    Raises:
        ValueError: the model has no adapters.
    """
    return {tree.stable_path(path): bank for path, bank in adapted(tree).items()}


def values_beside(tree: Tree, name: str) -> list[tuple[keras.Variable, np.ndarray]]:
    """The variables of the base that are saved with an adapter, and their values for it.

    They are those that it owns, and those that train and that no adapter owns: without them the
    model would compute something else. A warning names a frozen base that trains again.
    """
    thawed = thawed_by_others(tree.root.trainable_variables)
    if thawed:
        warn(
            f"{len(thawed)} frozen variables of the base train again, such as "
            f"{thawed[0].path!r}, and belong in no adapter's files. Freeze them: "
            f"set_adapter(model, {name!r})."
        )
    owned = [(item.variable, item.value(name)) for item in owned_by(tree, name)]
    free = [(v, np.array(ops.convert_to_numpy(v))) for v in trained_by_none(tree)]
    return owned + free


def owned_by(tree: Tree, name: str) -> list[OwnedValues]:
    """The variables of which an adapter has a value of its own."""
    return [item for item in all_owned(tree.root.variables) if name in item.names]
