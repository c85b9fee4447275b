"""Descriptions of SavedModels, for `check`, `inspect`, `merge` and `export`; needs TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

import keras_lora as kl
from keras_lora.export.checking import read_graph
from keras_lora.export.many.endpoint import DESCRIPTION
from keras_lora.export.many.stored import stored_names
from keras_lora.summary import shown_bytes
from keras_lora_cli.output import Answer, facts, shown_shape, table
from keras_lora_cli.paths import Kind, check_kind, size_of


def check(path: str) -> Answer:
    """List what a server could not run; the answer is negative if the list has an item."""
    check_kind(path, [Kind.SAVED_MODEL])
    data = {"path": path, **_reported(kl.check_saved_model(path))}
    return Answer(data, _report_views(data), negative=bool(data["problems"]))


def inspect(path: str, report: kl.GraphReport) -> Answer:
    """Describe a SavedModel: its adapters, its signatures and the report."""
    data = {
        "path": path,
        "format": Kind.SAVED_MODEL.value,
        "bytes": size_of(path),
        **described(path, report),
    }
    rows = [
        (signature, kind.removesuffix("s"), name, tensor["dtype"], shown_shape(tensor["shape"]))
        for signature, kinds in data["signatures"].items()
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
    ]
    headings = ("signature", "kind", "name", "dtype", "shape")
    about = {name: data[name] for name in ("path", "format", "adapters")}
    about["size"] = shown_bytes(data["bytes"])
    views = [facts(about), table("Signatures", headings, rows), *_report_views(data)]
    return Answer(data, views)


def described(path: str, report: kl.GraphReport) -> dict[str, Any]:
    """A SavedModel as plain values; `adapters` is None unless requests name an adapter."""
    mixed = Path(path, DESCRIPTION).exists()
    return {
        "adapters": stored_names(Path(path)) if mixed else None,
        "signatures": _signatures(path),
        **_reported(report),
    }


def _reported(report: kl.GraphReport) -> dict[str, Any]:
    fields = vars(report).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


def _signatures(path: str) -> dict[str, Any]:
    """`{signature: {"inputs": {name: {"dtype": ..., "shape": ...}}, "outputs": ...}}`."""
    return {
        name: {"inputs": _tensors(signature.inputs), "outputs": _tensors(signature.outputs)}
        for meta in read_graph(Path(path)).meta_graphs
        for name, signature in sorted(meta.signature_def.items())
        if not name.startswith("__")  # TensorFlow's own, for initialisation
    }


def _tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"dtype": tf.dtypes.as_dtype(info.dtype).name, "shape": _shape(info.tensor_shape)}
        for name, info in sorted(tensors.items())
    }


def _shape(shape: Any) -> list[int | None] | None:
    if shape.unknown_rank:
        return None
    return [None if axis.size < 0 else axis.size for axis in shape.dim]


def _report_views(data: Mapping[str, Any]) -> list[Any]:
    report = {
        "operations": data["operations"],
        "tensorflow-text": ", ".join(data["text_operations"]) or None,
        "a server can run it": not data["problems"],
    }
    views: list[Any] = [facts(report)]
    if data["problems"]:
        problems = [[problem] for problem in data["problems"]]
        views.append(table("Problems", ("what a server cannot run",), problems))
    return views
