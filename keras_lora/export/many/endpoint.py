"""Endpoints for mixed batches: each row names its adapter, in one more input.

The base's weights are stored once. A request reads only the tensors of its rows' adapters. A layer
in which the adapters differ computes each row with the tensors of that row's adapter:

    y_i = x_i W0 + (x_i A_i) B_i        for each row i of the batch; the scale is part of B_i

So the first axis of the input of such a layer must be the batch. This is checked before
anything is written, by tracing the model with a batch of a size that no other axis has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lora.adapters import disable_adapter
from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint, write_endpoints
from keras_lora.export.many.requests import (
    INPUT,
    numbers_of_indices,
    numbers_of_names,
    one_for_each_row,
)
from keras_lora.export.many.served_layers import ServedLayer, adapted_layers, add_owned, unplaced
from keras_lora.export.many.stacks import AdapterStacks, AdapterTensor, Array
from keras_lora.export.many.stored import StoredStacks, write_stacks
from keras_lora.export.serving import AdapterIds
from keras_lora.files.keys import base_fingerprint
from keras_lora.files.saving import adapter_tensors
from keras_lora.inject import check_names
from keras_lora.layers import BASE, LoRALayer, OwnedValues, attach, detach
from keras_lora.walker import Tree

DESCRIPTION = Path("assets.extra", "keras_lora.json")
FORMAT_VERSION = 1
# A prime that is unlikely as a dimension of a model: a reshaped batch has another size.
_TRIAL_BATCH = 1009


@dataclass(frozen=True)
class ServedAdapters:
    """The adapters of a model that one SavedModel serves in mixed batches.

    Attributes:
        tree: The layers of the model.
        names: The adapters, in the order of their indices.
        layers: The layers in which the adapters differ.
        owned: The kernels and biases in which they differ, by key.
        refusals: Reasons why a row cannot have an adapter of its own; empty if every row can.
    """

    tree: Tree
    names: Sequence[str]
    layers: Sequence[ServedLayer]
    owned: Mapping[str, OwnedValues]
    refusals: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: keras.Model, names: Sequence[str]) -> ServedAdapters:
        """Raises:
        ValueError: unknown names, or values that cannot differ from row to row.
        """
        tree = Tree.of(model)
        names = check_names(tree, names)
        if not names:
            raise invalid("adapters", "at least one name", names, "leave it out to merge instead")
        refusals: list[str] = []
        layers = adapted_layers(tree, names, refusals)
        owned = add_owned(tree, names, layers, refusals)
        served = cls(tree, names, list(layers.values()), owned, refusals)
        served.check()
        return served

    @property
    def tensors(self) -> list[AdapterTensor]:
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def check(self) -> None:
        if self.refusals:
            reasons = "; ".join(dict.fromkeys(self.refusals))
            raise ValueError(
                "Expected a model in which each row of a batch can have an adapter of its own. "
                f"Received: {self.tree.root.name!r}, tried with a batch of {_TRIAL_BATCH} rows: "
                f"{reasons}. Leave these layers out of the adapters (exclude, "
                "layers_to_save, bias), or export one merged model for each adapter."
            )

    def stacks(self) -> AdapterStacks:
        """Raises:
        ValueError: an adapter has values that cannot differ from row to row, or NaN or infinity.
        """
        stacks = AdapterStacks(self.tensors)
        gains = [layer.gain for layer in self.layers if layer.gain is not None]
        ones = {gain.key: np.ones(gain.vector_shape, "float32") for gain in gains}
        stacks.add(BASE, ones | {key: item.value(BASE) for key, item in self.owned.items()})
        for name in self.names:
            values = self._values(name)
            rest = unplaced(self.tree, name, values, self.tensors)
            self.refusals.extend(f"'{key}': it cannot differ from row to row" for key in rest)
            stacks.add(name, values)
        self.check()
        return stacks

    def description(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "base": base_fingerprint(self.tree),
            "pieces": [[tensor.key, tensor.shape] for tensor in self.tensors],
        }

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within the context the base alone is active, and `layers` can compute row by row."""
        plain = [each.layer for each in self.layers if not isinstance(each.layer, LoRALayer)]
        with disable_adapter(self.tree.root), contextlib.ExitStack() as stack:
            for layer in self.tree.adapted:
                stack.enter_context(layer.without_adapters())
            for layer in plain:
                stack.callback(detach, attach(layer))
            yield

    def for_mixed_batches(
        self, endpoint: Endpoint, stored: StoredStacks, ids: AdapterIds
    ) -> Endpoint:
        """The endpoint with one more input, which names each row's adapter."""
        names = _input_names(endpoint)
        leaves = keras.tree.flatten(endpoint.signature)
        signature = dict(zip(names, leaves, strict=True))
        batched = [name for name, leaf in signature.items() if leaf.shape[:1] == (None,)]
        dtype, find = _IDS[ids]
        signature[INPUT] = tf.TensorSpec((None,), dtype, name=INPUT)

        def call(inputs: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
            named = one_for_each_row(inputs[INPUT], [inputs[name] for name in batched])
            numbers = find(named, stored.names)
            values = [inputs[name] for name in names]
            with self._computing_by_row(stored.take(numbers)):
                outputs = endpoint.call(keras.tree.pack_sequence_as(endpoint.signature, values))
            # An output that no adapter changes must fail too if a name is unknown.
            with tf.control_dependencies([numbers]):
                return {name: tf.identity(output) for name, output in outputs.items()}

        resources = (*endpoint.resources, stored)
        return dataclasses.replace(endpoint, call=call, signature=signature, resources=resources)

    def try_out(self, endpoint: Endpoint) -> None:
        """Trace an endpoint with a batch of a size that no other axis has.

        Raises:
            ValueError: the first axis of a layer's input is not the batch, or a value that
                differs from row to row is read by another layer than its own.
        """
        specs = {name: _with_batch(spec) for name, spec in endpoint.signature.items()}
        traced = tf.function(endpoint.call, autograph=False).get_concrete_function(specs)
        read = {id(variable) for variable in traced.variables}
        self.refusals.extend(
            f"'{key}': it is read by another layer than its own"
            for key, item in self.owned.items()
            if id(item.variable.value) in read
        )
        self.check()

    @contextlib.contextmanager
    def _computing_by_row(self, taken: Mapping[str, tf.Tensor]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in self.layers:
                stack.enter_context(each.layer.computing(each.by_row(taken, self.refusals)))
            yield

    def _values(self, name: str) -> dict[str, Array]:
        """An adapter's values by key, as they are served."""
        values = adapter_tensors(self.tree, name, ordinary=True)
        for layer in self.layers:
            layer.scale_values(name, values)
        broken = [key for key, value in values.items() if not np.isfinite(value).all()]
        if broken:
            received = f"NaN or infinity in {broken} of {name!r}"
            raise invalid("adapters", "finite values", received, "train it again or leave it out")
        return values


# The type of the input `adapter`, and the function from it to the numbers of adapters.
_IDS: dict[AdapterIds, tuple[tf.DType, Any]] = {
    "name": (tf.string, numbers_of_names),
    "index": (tf.int32, numbers_of_indices),
}


def write_mixed(
    served: ServedAdapters,
    endpoints: Sequence[Endpoint],
    tried: Sequence[Endpoint],
    ids: AdapterIds,
    path: Path,
) -> None:
    """Write a SavedModel of these endpoints, each with the input `adapter`.

    Args:
        served: The adapters.
        endpoints: The endpoints to write.
        tried: Endpoints that use the model in the same ways, to trace before anything is written.
        ids: Whether requests give names or indices.
        path: The directory to write.

    Raises:
        ValueError: the first axis of a layer's input is not the batch.
    """
    folder = path.with_name(f"{path.name}.stacks")
    stored = StoredStacks(served.tensors, folder)
    description = json.dumps(served.description())
    with served.ready():
        for endpoint in tried:
            served.try_out(served.for_mixed_batches(endpoint, stored, ids))
        write_stacks(served.stacks().stored(), folder)
        mixed = [served.for_mixed_batches(endpoint, stored, ids) for endpoint in endpoints]
        write_endpoints(served.tree.root, mixed, path)
    served.check()
    (path / DESCRIPTION).parent.mkdir()
    (path / DESCRIPTION).write_text(description)


def _input_names(endpoint: Endpoint) -> list[str]:
    names = [leaf.name for leaf in keras.tree.flatten(endpoint.signature)]
    if INPUT in names or len(set(names)) < len(names):
        raise invalid(
            "model",
            f"inputs with names of their own, none of them {INPUT!r}",
            names,
            "pass input_signature with other names",
        )
    return names


def _with_batch(spec: tf.TensorSpec) -> tf.TensorSpec:
    if spec.shape[:1] != (None,):
        return spec
    return tf.TensorSpec((_TRIAL_BATCH, *spec.shape[1:]), spec.dtype, name=spec.name)
