"""`convert`: an adapter from one format to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

import keras_lora as kl
from keras_lora.checks import invalid
from keras_lora.exchange.peft_files import read_peft_adapter, write_peft_adapter
from keras_lora.files.adapter_files import write_adapter_files
from keras_lora.files.reading import CODES, DTYPES
from keras_lora.summary import shown_bytes
from keras_lora_cli.adapters import PeftOptions, load_into, read_adapter
from keras_lora_cli.bases import Base, load_base
from keras_lora_cli.output import Answer, Steps, complain, facts, table
from keras_lora_cli.paths import ADAPTERS, NAMES, Kind, check_free, check_kind, size_of

_NAME = "converted"


@dataclass(frozen=True, kw_only=True)
class Target:
    """The adapter to write.

    Attributes:
        path: The path to write.
        kind: The format; if None, the path and the source decide.
        dtype: The type of the tensors; a `.lora.h5` file has float32 only.
        rank: The rank to truncate a `.lora.h5` source to.
        prefix: As in `keras_lora.save_peft_adapter`.
        base_model_name: As in `keras_lora.save_peft_adapter`.
        layer_names: The `target_layer_names` of `keras_lora.save_keras_hub_lora`.
        overwrite: Replace an adapter at the path.
    """

    path: str
    kind: Kind | None = None
    dtype: str = "float32"
    rank: int | None = None
    prefix: str | None = None
    base_model_name: str | None = None
    layer_names: Sequence[str] = ()
    overwrite: bool = False


def convert(
    source: str, target: Target, base: Base | None, options: PeftOptions, steps: Steps
) -> Answer:
    """Write an adapter in another format, or in the same one with another dtype."""
    kind = check_kind(source, ADAPTERS)
    to = target.kind or _default_kind(kind, target.path)
    check_free(target.path, to, target.overwrite)
    if target.dtype not in CODES:
        raise invalid("dtype", f"one of {sorted(CODES)}", target.dtype)
    truncated: list[kl.ConvertedLayer] = []
    if base is None:
        with steps.step("converting"):
            _rewrite(source, kind, to, target)
    else:
        with steps.step("loading the base"):
            model = load_base(base, weights=False)
        with steps.step("converting"):
            truncated = load_into(model, source, _NAME, options, rank=target.rank)
            _write(model, to, target, options)
    return _answer(source, kind, target.path, to, truncated)


def _default_kind(source: Kind, path: str) -> Kind:
    if path.endswith(".lora.h5"):
        return Kind.KERAS_HUB
    return Kind.PEFT if source is Kind.NATIVE else Kind.NATIVE


def _rewrite(source: str, kind: Kind, to: Kind, target: Target) -> None:
    """Write the tensors under the names that they have, without a model."""
    if kind is not to or kind is Kind.KERAS_HUB:
        raise ValueError(
            "Expected a --base, whose layers give the names and the shapes. Received: none, to "
            f"convert {NAMES[kind]} to {NAMES[to]}; give the model that the adapter belongs to."
        )
    if kind is Kind.PEFT:
        _rewrite_peft(source, target)
        return
    files = kl.read_adapter_files(source)
    dtype = DTYPES[CODES[target.dtype]]
    with np.errstate(over="ignore"):  # an overflow is refused below, with its key
        tensors = {key: value.astype(dtype) for key, value in files.tensors.items()}
    write_adapter_files(target.path, files.config, tensors, overwrite=target.overwrite)


def _rewrite_peft(source: str, target: Target) -> None:
    adapter = read_peft_adapter(source)
    if adapter.unknown:
        complain("warning", f"unknown tensors are left out: {list(adapter.unknown)}")
    named = {"base_model_name_or_path": target.base_model_name} if target.base_model_name else {}
    write_peft_adapter(
        target.path,
        adapter.modules,
        adapter.saved,
        {**adapter.config, **named},
        dtype=target.dtype,
        overwrite=target.overwrite,
    )


def _write(model: keras.Model, to: Kind, target: Target, options: PeftOptions) -> None:
    if to is Kind.KERAS_HUB:
        names = target.layer_names or None
        kl.save_keras_hub_lora(model, target.path, _NAME, target_layer_names=names)
        return
    common: dict[str, Any] = {"dtype": target.dtype, "overwrite": target.overwrite}
    if to is Kind.NATIVE:
        kl.save_adapter(model, target.path, _NAME, **common)
    else:
        common |= {"prefix": target.prefix, "base_model_name": target.base_model_name}
        kl.save_peft_adapter(model, target.path, _NAME, **vars(options), **common)


def _answer(
    source: str, kind: Kind, path: str, to: Kind, converted: Sequence[kl.ConvertedLayer]
) -> Answer:
    """A description of the adapter that was written, read again from its files."""
    written = read_adapter(path)
    data: dict[str, Any] = {
        "source": source,
        "source_format": kind.value,
        "out": path,
        "format": to.value,
        "layers": len(written.layers),
        "ranks": sorted({layer.rank for layer in written.layers.values()}),
        "parameters": sum(layer.parameters for layer in written.layers.values()),
        "bytes": size_of(path),
        "converted": [asdict(layer) for layer in converted],
    }
    shown = {name: data[name] for name in ("out", "format", "layers", "ranks", "parameters")}
    views: list[Any] = [facts({**shown, "size": shown_bytes(data["bytes"])})]
    if converted:
        rows = [(x.path, x.file_rank, x.rank, x.error) for x in converted]
        views.append(table("Converted", ("layer", "rank in the file", "rank", "error"), rows))
    return Answer(data, views)
