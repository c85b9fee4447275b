"""Endpoints that serve many adapters: each row of a batch names the one that it wants.

The base's weights are stored once. Of the adapters, each request takes the factors of its rows
alone, and every adapted layer multiplies a row with that row's factors:

    y_i = x_i W0 + (x_i A_i) B_i        for each row i of the batch; the scale is part of B_i

So the first axis of what such a layer is given must be the batch. This is established before
anything is written, by tracing the model with a batch of a size that nothing else has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import keras
import numpy as np
import tensorflow as tf

from keras_lora.adapters import disable_adapter
from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint, write_endpoints
from keras_lora.export.many.requests import (
    INPUT,
    one_for_each_row,
    slots_of_indices,
    slots_of_names,
)
from keras_lora.export.many.served_layers import Use, adapted_uses, add_owned, unplaced
from keras_lora.export.many.stored import StoredTables, write_tensors
from keras_lora.export.many.tables import Array, Piece, Tables
from keras_lora.files.keys import base_fingerprint
from keras_lora.files.saving import adapter_tensors
from keras_lora.inject import check_names
from keras_lora.layers import BASE, LoRALayer, OwnedValues, attach, detach
from keras_lora.walker import Tree, lora_layers

DESCRIPTION = Path("assets.extra", "keras_lora.json")
FORMAT_VERSION = 1
AdapterIds = Literal["name", "index"]
# A prime, so that a reshaped batch is told from it; no dimension of a model is likely to be it.
_TRIAL_BATCH = 1009


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a model that one SavedModel is to serve."""

    model: keras.Model
    names: Sequence[str]
    uses: Sequence[Use]
    owned: Mapping[str, OwnedValues]
    refusals: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: keras.Model, names: Sequence[str]) -> RowAdapters:
        """Raises:
        ValueError: unknown names, or values that cannot differ from row to row.
        """
        names = check_names(Tree.of(model), names)
        if not names:
            raise invalid("adapters", "at least one name", names, "leave it out to export merged")
        refusals: list[str] = []
        uses = adapted_uses(model, names, refusals)
        owned = add_owned(model, names, uses, refusals)
        rows = cls(model, names, list(uses.values()), owned, refusals)
        rows.check()
        return rows

    @property
    def pieces(self) -> list[Piece]:
        return [piece for use in self.uses for piece in use.pieces]

    def check(self) -> None:
        if self.refusals:
            reasons = "; ".join(dict.fromkeys(self.refusals))
            raise ValueError(
                "Expected a model in which each row of a batch can have an adapter of its own. "
                f"Received: {self.model.name!r} (tried with a batch of {_TRIAL_BATCH} rows), of "
                f"which {reasons}. Leave these layers out of the adapters (exclude, "
                "layers_to_save, bias), or export one merged model for each adapter."
            )

    def tables(self) -> Tables:
        """Raises:
        ValueError: an adapter is more than factors, kernels and biases, or is not finite.
        """
        tables = Tables(self.pieces)
        gains = [use.gain for use in self.uses if use.gain is not None]
        ones = {piece.key: np.ones(piece.inner, "float32") for piece in gains}
        tables.add(BASE, ones | {key: item.value(BASE) for key, item in self.owned.items()})
        for name in self.names:
            values = self._values(name)
            strange = unplaced(self.model, name, values, self.pieces)
            self.refusals.extend(f"'{key}': it has no form by row" for key in strange)
            tables.add(name, values)
        self.check()
        return tables

    def description(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "base": base_fingerprint(Tree.of(self.model)),
            "pieces": [[piece.key, piece.shape] for piece in self.pieces],
        }

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within the context the base alone acts, and every layer of `uses` can take rows."""
        plain = [use.layer for use in self.uses if not isinstance(use.layer, LoRALayer)]
        with disable_adapter(self.model), contextlib.ExitStack() as stack:
            for layer in lora_layers(self.model).values():
                stack.enter_context(layer.without_slots())
            for layer in plain:
                stack.callback(detach, attach(layer))
            yield

    def by_row(self, endpoint: Endpoint, stored: StoredTables, ids: AdapterIds) -> Endpoint:
        """The endpoint with an input more, which says for each row which adapter acts."""
        names = _input_names(endpoint)
        leaves = keras.tree.flatten(endpoint.signature)
        dtype = tf.string if ids == "name" else tf.int32
        signature = dict(zip(names, leaves, strict=True))
        batched = [name for name, leaf in signature.items() if leaf.shape[:1] == (None,)]
        signature[INPUT] = tf.TensorSpec((None,), dtype, name=INPUT)
        find = slots_of_names if ids == "name" else slots_of_indices

        def call(inputs: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
            wanted = one_for_each_row(inputs[INPUT], [inputs[name] for name in batched])
            slots = find(wanted, stored.names)
            values = [inputs[name] for name in names]
            with self._rows(stored.take(slots)):
                outputs = endpoint.call(keras.tree.pack_sequence_as(endpoint.signature, values))
            with tf.control_dependencies([slots]):  # those too in which no adapter acts
                return {name: tf.identity(output) for name, output in outputs.items()}

        resources = (*endpoint.resources, stored)
        return dataclasses.replace(endpoint, call=call, signature=signature, resources=resources)

    def try_out(self, endpoint: Endpoint) -> None:
        """Trace an endpoint with a batch of a size of its own.

        Raises:
            ValueError: a layer is given something else than the batch.
        """
        specs = {name: _with_batch(spec) for name, spec in endpoint.signature.items()}
        traced = tf.function(endpoint.call, autograph=False).get_concrete_function(specs)
        read = {id(variable) for variable in traced.variables}
        self.refusals.extend(
            f"'{key}': it is read by something else than its own layer"
            for key, item in self.owned.items()
            if id(item.variable.value) in read
        )
        self.check()

    @contextlib.contextmanager
    def _rows(self, taken: Mapping[str, tf.Tensor]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for use in self.uses:
                stack.enter_context(use.layer.with_rows(use.rows(taken, self.refusals)))
            yield

    def _values(self, name: str) -> dict[str, Array]:
        """What an adapter consists of, by the keys of pieces."""
        values = adapter_tensors(Tree.of(self.model), name)
        for use in self.uses:
            use.put_update(name, values)
        broken = [key for key, value in values.items() if not np.isfinite(value).all()]
        if broken:
            received = f"NaN or infinity in {broken} of {name!r}"
            raise invalid("adapters", "finite values", received, "train it again or leave it out")
        return values


def check_adapter_ids(ids: str) -> None:
    if ids not in get_args(AdapterIds):
        raise invalid("adapter_ids", f"one of {get_args(AdapterIds)}", ids)


def write_rows(
    rows: RowAdapters,
    endpoints: Sequence[Endpoint],
    tried: Sequence[Endpoint],
    ids: AdapterIds,
    path: Path,
) -> None:
    """Write a SavedModel of these endpoints, each with the input `adapter`.

    Args:
        rows: The adapters.
        endpoints: What to serve.
        tried: Endpoints that use the model in the same ways, to find what is not by row.
        ids: Names or indices.
        path: Where to.

    Raises:
        ValueError: a layer is given something else than the batch.
    """
    tables = path.with_name("tables")
    stored = StoredTables(rows.pieces, tables)
    description = json.dumps(rows.description())
    with rows.ready():
        for endpoint in tried:
            rows.try_out(rows.by_row(endpoint, stored, ids))
        write_tensors(rows.tables().tensors(), tables)
        write_endpoints([rows.by_row(endpoint, stored, ids) for endpoint in endpoints], path)
    rows.check()
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
