"""`inspect`: a description of a model, an adapter or a SavedModel."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from rich.console import Console

import keras_lora as kl
from keras_lora.summary import shown_bytes
from keras_lora_cli.adapters import Adapter, read_adapter
from keras_lora_cli.bases import Base, load_base
from keras_lora_cli.output import Answer, Steps, facts, shown, shown_shape, table
from keras_lora_cli.paths import ADAPTERS, BASES, Kind, check_kind, is_handle, size_of

_FLOAT_BYTES = 4  # adapters are float32


def inspect(base: Base, config: kl.LoRAConfig, steps: Steps) -> Answer:
    """Describe an adapter, a SavedModel, or a model and the layers that a config would adapt."""
    kind = check_kind(base.path, (*BASES, Kind.SAVED_MODEL, *ADAPTERS))
    with steps.step("reading"):
        if kind is Kind.SAVED_MODEL:
            return _saved_model(base.path)
        if kind in ADAPTERS:
            return _adapter(base.path)
        model = load_base(base, weights=False)
    targets = kl.find_targets(model, config.targets, config.exclude)
    return _model(model, base.path, kind, targets, config.spec().rank)


def _saved_model(path: str) -> Answer:
    report = kl.check_saved_model(path)  # if TensorFlow is missing, this says so
    from keras_lora_cli import saved_models

    return saved_models.inspect(path, report)


def _model(
    model: keras.Model, path: str, kind: Kind, targets: Sequence[kl.Target], rank: int
) -> Answer:
    rows = [_target(target, rank) for target in targets]
    added = sum(row["adapter_parameters"] for row in rows)
    adapted = kl.lora_layers(model)
    summary = kl.lora_summary(model, Console(file=io.StringIO())) if adapted else None
    data = {
        "path": path,
        "format": kind.value,
        "class": type(model).__name__,
        "name": model.name,
        "parameters": model.count_params(),
        "bytes": None if is_handle(path) else size_of(path),
        "adapters": [dataclasses.asdict(row) for row in summary.rows] if summary else [],
        "rank": rank,
        "targets": rows,
        "adapter_parameters": added,
        "adapter_bytes": added * _FLOAT_BYTES,
    }
    return Answer(data, _model_views(data) + ([summary] if summary else []))


def _target(target: kl.Target, rank: int) -> dict[str, Any]:
    shapes = target.site.split().factor_shapes(target.kernel_shape, rank)
    return {
        "path": target.path,
        "kind": target.kind,
        "kernel_shape": list(target.kernel_shape),
        "kernel_parameters": math.prod(target.kernel_shape),
        "adapter_parameters": sum(math.prod(shape) for shape in shapes),
    }


def _model_views(data: Mapping[str, Any]) -> list[Any]:
    rows = [
        (
            row["path"],
            row["kind"],
            shown_shape(row["kernel_shape"]),
            row["kernel_parameters"],
            row["adapter_parameters"],
        )
        for row in data["targets"]
    ]
    headings = ("layer", "kind", "kernel", "parameters", f"adapter of rank {data['rank']}")
    about = {name: data[name] for name in ("path", "format", "class", "name", "parameters")}
    about["size"] = None if data["bytes"] is None else shown_bytes(data["bytes"])
    share = data["adapter_parameters"] / data["parameters"]
    total = {
        "an adapter": f"{shown(data['adapter_parameters'])} parameters ({share:.2%} of the "
        f"model), {shown_bytes(data['adapter_bytes'])}"
    }
    return [facts(about), table("Targets", headings, rows), facts(total)]


def _adapter(path: str) -> Answer:
    adapter = read_adapter(path)
    layers = [_layer(name, adapter) for name in adapter.layers]
    values = [
        {"name": name, "shape": list(value.shape), "parameters": value.size}
        for name, value in adapter.values.items()
    ]
    data = {
        "path": path,
        "format": adapter.kind.value,
        "bytes": size_of(path),
        "parameters": sum(row["parameters"] for row in (*layers, *values)),
        "base": _base_of(adapter),
        "layers": layers,
        "values": values,
        "unknown": list(adapter.unknown),
        "config": dict(adapter.config),
    }
    return Answer(data, _adapter_views(data))


def _layer(name: str, adapter: Adapter) -> dict[str, Any]:
    layer = adapter.layers[name]
    return {
        "name": name,
        "rank": layer.rank,
        "alpha": layer.alpha,
        "scale": layer.scale,
        "shapes": [list(layer.a.shape), list(layer.b.shape)],
        "parameters": layer.parameters,
        "extras": sorted(layer.extras),
    }


def _base_of(adapter: Adapter) -> dict[str, Any] | None:
    """The base that the files name, if they name one."""
    if adapter.kind is Kind.NATIVE:
        return dict(adapter.config["base"])
    name = adapter.config.get("base_model_name_or_path")
    return {"name": name} if name else None


def _adapter_views(data: Mapping[str, Any]) -> list[Any]:
    rows = [
        (
            row["name"],
            row["rank"],
            row["alpha"],
            row["scale"],
            " x ".join(shown_shape(shape) for shape in row["shapes"]),
            row["parameters"],
            *([", ".join(row["extras"])] if any(x["extras"] for x in data["layers"]) else []),
        )
        for row in data["layers"]
    ]
    headings = ["layer", "rank", "alpha", "scale", "factors", "parameters"]
    headings += ["also"] if len(rows[0]) > len(headings) else []
    about = {name: data[name] for name in ("path", "format", "parameters")}
    about["size"] = shown_bytes(data["bytes"])
    about |= {f"base {name}": value for name, value in (data["base"] or {}).items()}
    about["written by"] = data["config"].get("keras_lora_version")
    views: list[Any] = [facts(about), table("Layers", headings, rows)]
    if data["values"]:
        rows = [(x["name"], shown_shape(x["shape"]), x["parameters"]) for x in data["values"]]
        views.append(table("Heads and biases", ("value", "shape", "parameters"), rows))
    if data["unknown"]:
        views.append(table("Not understood", ("tensor",), [[key] for key in data["unknown"]]))
    return views
