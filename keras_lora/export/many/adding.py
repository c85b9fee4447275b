"""One more adapter for an exported model: the next version, of the same base and graph."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_lora.checks import given_path, invalid, invalid_file
from keras_lora.config import AdapterSpec
from keras_lora.export.many.endpoint import DESCRIPTION, FORMAT_VERSION
from keras_lora.export.many.served_layers import MAGNITUDE
from keras_lora.export.many.stacks import AdapterStacks, AdapterTensor, Array
from keras_lora.export.many.stored import DATA, INDEX, read_stacks, write_stacks
from keras_lora.files.adapter_files import (
    TENSORS_FILE,
    AdapterFiles,
    PathLike,
    read_adapter_files,
)
from keras_lora.files.atomic import replaced
from keras_lora.files.matching import check_fields, spec_of_layer
from keras_lora.files.ordinary import as_ordinary
from keras_lora.layers import check_adapter_name

_ASSETS = "assets"
_PEFT_FILE = "adapter_model.safetensors"


def add_adapter_to_saved_model(
    path: PathLike, directory: PathLike, name: str, *, target: PathLike | None = None
) -> Path:
    """Write the next version of an exported model, with one more adapter.

    The files of the graph and of the base's weights are not read: the new version has hard links
    to them, or copies if the file system has no hard links. Only the adapters are written anew,
    and no model is needed. An export has room for any number of adapters of every rank, on the
    layers that its first adapters have. The version is written under another name and renamed
    when it is whole, as TensorFlow Serving expects: the server loads it, moves requests over and
    drops the old version.

    Args:
        path: A version that `export_saved_model(model, path, adapters=[...])` or this function
            wrote.
        directory: A directory that `save_adapter` wrote, of the same base.
        name: The adapter's name in requests. If requests give an index, the adapter gets the next.
        target: The directory to write; by default the next number beside `path`.

    Returns:
        The directory of the new version.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: `path` is no such export, the name is taken, or the target exists.
        AdapterFileError: the files are damaged, or the adapter is one of PEFT, or it does not fit
            the export; everything that does not fit is listed. Nothing is written.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> folder = tempfile.mkdtemp()
    >>> report = kl.export_saved_model(model, f"{folder}/served/1", adapters=["fr"])
    >>> kl.save_adapter(model, f"{folder}/de", "de")
    >>> kl.add_adapter_to_saved_model(f"{folder}/served/1", f"{folder}/de", "de").name
    '2'

    Reference:
        TensorFlow Serving Configuration, https://www.tensorflow.org/tfx/serving/serving_config
    """
    source = given_path(path)
    description = _description(source)
    goal = _next_version(source) if target is None else given_path(target)
    if goal.exists():
        raise invalid("target", "a path that does not exist", str(goal), "choose another")
    tensors = [AdapterTensor(key, tuple(shape)) for key, shape in description["pieces"]]
    values = _values(directory, tensors, description["base"])
    stacks = AdapterStacks.of(tensors, read_stacks(source / _ASSETS))
    if check_adapter_name(name) in stacks.names:
        raise invalid("name", f"a name that is not among {stacks.names[1:]}", name)
    stacks.add(name, values)
    with replaced(goal) as written:
        _link_all_but_adapters(source, written)
        write_stacks(stacks.stored(), written / _ASSETS)
    return goal


def _description(source: Path) -> dict[str, Any]:
    file = source / DESCRIPTION
    try:
        description = json.loads(file.read_text())
        if description["format_version"] == FORMAT_VERSION:
            return description
        received: object = f"format_version {description['format_version']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        received = f"{type(error).__name__}: {error}"
    raise invalid(
        "path",
        "a version that export_saved_model(model, path, adapters=[...]) wrote",
        f"{os.fspath(source)!r}, whose {DESCRIPTION} gives {received}",
        "export the model with adapters",
    )


def _next_version(source: Path) -> Path:
    if not source.name.isdecimal():
        fix = "pass target, or name versions by number"
        raise invalid("path", "a directory with a number for its name", str(source), fix)
    versions = [int(p.name) for p in source.absolute().parent.iterdir() if p.name.isdecimal()]
    return source.parent / str(max(versions) + 1)


def _values(directory: PathLike, tensors: Sequence[AdapterTensor], base: str) -> dict[str, Array]:
    """An adapter's values by key, with the scale in `B`.

    Raises:
        AdapterFileError: the adapter does not fit the export; each misfit is listed.
    """
    files = _read(directory)
    by_key = {tensor.key: tensor for tensor in tensors}
    paths = {key.rpartition("/")[0] for key in files.tensors if _is_factor(by_key.get(key))}
    specs, found = {}, files.tensors
    for path in sorted(paths):
        spec, axis = spec_of_layer(directory, files.config, path), _rank_axis(by_key, path)
        specs[path], found = as_ordinary(path, spec, found, axis)
    problems = [*_other_base(files, base), *_misfits(found, by_key, specs)]
    if problems:
        fix = "export the model with this adapter among the others"
        raise invalid_file(
            directory, "an adapter that the export has room for", "; ".join(problems), fix
        )
    values = {key: value.astype("float32") for key, value in found.items()}
    for path, spec in specs.items():
        values[f"{path}/lora_b"] *= np.float32(spec.scaling)
    return values


def _read(directory: PathLike) -> AdapterFiles:
    root = given_path(directory)
    if (root / _PEFT_FILE).exists() and not (root / TENSORS_FILE).exists():
        fix = "convert it, with the model: load_peft_adapter, then save_adapter"
        raise invalid_file(directory, "an adapter of keras_lora", "one of PEFT", fix)
    files = read_adapter_files(root)
    check_fields(directory, files.config)
    return files


def _other_base(files: AdapterFiles, base: str) -> list[str]:
    received = files.config["base"]
    if received.get("fingerprint") == base:
        return []
    return [f"an adapter of another base, {received.get('name')!r} ({received.get('class')})"]


def _rank_axis(tensors: Mapping[str, AdapterTensor], path: str) -> int:
    return tensors[f"{path}/lora_b"].shape.index(None)


def _misfits(
    tensors: Mapping[str, Array],
    expected: Mapping[str, AdapterTensor],
    specs: Mapping[str, AdapterSpec],
) -> list[str]:
    found = []
    for key, tensor in tensors.items():
        path = key.rpartition("/")[0]
        if key.endswith(f"/{MAGNITUDE}"):
            found.append(f"{key}: DoRA needs the norms of the base's weights, which are not read")
        elif key not in expected:
            found.append(f"{key}: no adapter of the export has this")
        elif tensor.shape != expected[key].shape_at(specs[path].rank if path in specs else 0):
            found.append(f"{key}: shape {tensor.shape}, expected {expected[key].shape}")
    factors = [f"{path}/{factor}" for path in specs for factor in ("lora_a", "lora_b")]
    return found + [f"{key}: missing" for key in factors if key not in tensors]


def _is_factor(tensor: AdapterTensor | None) -> bool:
    return tensor is not None and tensor.is_factor


def _link_all_but_adapters(source: Path, goal: Path) -> None:
    left_out = {Path(_ASSETS, INDEX), Path(_ASSETS, DATA)}
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        if file.is_file() and inside not in left_out:
            (goal / inside).parent.mkdir(parents=True, exist_ok=True)
            _link(file, goal / inside)


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without hard links
        shutil.copy2(file, link)
