"""One adapter more for an exported model: another version beside it, of the same base and graph."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_lora.checks import invalid
from keras_lora.config import AdapterSpec
from keras_lora.export.many.endpoint import DESCRIPTION, FORMAT_VERSION
from keras_lora.export.many.served_layers import MAGNITUDE
from keras_lora.export.many.stored import DATA, INDEX, read_tensors, write_tensors
from keras_lora.export.many.tables import Array, Piece, Tables
from keras_lora.files.adapter_files import (
    TENSORS_FILE,
    AdapterFiles,
    PathLike,
    read_adapter_files,
)
from keras_lora.files.atomic import replaced
from keras_lora.files.matching import check_fields, misfit, spec_of_layer
from keras_lora.layers import check_adapter_name

_ASSETS = "assets"
_PEFT_FILE = "adapter_model.safetensors"


def add_adapter_to_saved_model(
    path: PathLike, directory: PathLike, name: str, *, target: PathLike | None = None
) -> Path:
    """Write the next version of an exported model, with one adapter more.

    The graph and the base's weights are the same files, hard links where the file system has them,
    and are not read: only the adapters are written anew. No model is needed. There is room for any
    number of adapters and every rank, on the layers that the adapters of the export have. The
    version is made whole beside its place and then renamed, as TensorFlow Serving expects, which
    loads it, moves requests over and drops the old one.

    Args:
        path: A version that `export_saved_model(model, path, adapters=[...])` wrote, or this
            function.
        directory: What `save_adapter` wrote, of the same base.
        name: The adapter's name in requests. Where they give an index, it is the next one.
        target: The directory to write; by default the next number beside `path`.

    Returns:
        The directory of the new version.

    Raises:
        ValueError: no such export, a name that is taken, or a target that exists.
        AdapterFileError: damaged files, an adapter of PEFT, or one that does not fit; everything
            that does not fit is listed. Nothing is written then.

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
    """
    source = Path(path)
    description = _description(source)
    goal = _next_version(source) if target is None else Path(target)
    if goal.exists():
        raise invalid("target", "a path that does not exist", str(goal), "choose another")
    pieces = [Piece(key, tuple(shape)) for key, shape in description["pieces"]]
    values = _values(directory, pieces, description["base"])
    tables = Tables.of(pieces, read_tensors(source / _ASSETS))
    if check_adapter_name(name) in tables.names:
        raise invalid("name", f"a name that is not among {tables.names[1:]}", name)
    tables.add(name, values)
    with replaced(goal) as written:
        _link_all_but_adapters(source, written)
        write_tensors(tables.tensors(), written / _ASSETS)
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
        f"{os.fspath(source)!r}, where {DESCRIPTION} is: {received}",
        "export the model with adapters",
    )


def _next_version(source: Path) -> Path:
    if not source.name.isdecimal():
        fix = "pass target, or name versions by number"
        raise invalid("path", "a directory with a number for its name", str(source), fix)
    versions = [int(p.name) for p in source.absolute().parent.iterdir() if p.name.isdecimal()]
    return source.parent / str(max(versions) + 1)


def _values(directory: PathLike, pieces: Sequence[Piece], base: str) -> dict[str, Array]:
    """An adapter's values by the keys of pieces, the scale in `B`.

    Raises:
        AdapterFileError: all that does not fit.
    """
    files = _read(directory)
    by_key = {piece.key: piece for piece in pieces}
    paths = {key.rpartition("/")[0] for key in files.tensors if _is_factor(by_key.get(key))}
    specs = {path: spec_of_layer(directory, files.config, path) for path in sorted(paths)}
    problems = [*_other_base(files, base), *_misfits(files, by_key, specs)]
    if problems:
        fix = "export the model with this adapter among the others"
        raise misfit(directory, "an adapter that the export has room for", "; ".join(problems), fix)
    values = {key: value.astype("float32") for key, value in files.tensors.items()}
    for path, spec in specs.items():
        values[f"{path}/lora_b"] *= np.float32(spec.scaling)
    return values


def _read(directory: PathLike) -> AdapterFiles:
    root = Path(directory)
    if (root / _PEFT_FILE).exists() and not (root / TENSORS_FILE).exists():
        fix = "convert it, with the model: load_peft_adapter, then save_adapter"
        raise misfit(directory, "an adapter of keras_lora", "one of PEFT", fix)
    files = read_adapter_files(root)
    check_fields(directory, files.config)
    return files


def _other_base(files: AdapterFiles, base: str) -> list[str]:
    received = files.config["base"]
    if received.get("fingerprint") == base:
        return []
    return [f"an adapter of another base, {received.get('name')!r} ({received.get('class')})"]


def _misfits(
    files: AdapterFiles, pieces: Mapping[str, Piece], specs: Mapping[str, AdapterSpec]
) -> list[str]:
    found = []
    for key, tensor in files.tensors.items():
        path = key.rpartition("/")[0]
        if key.endswith(f"/{MAGNITUDE}"):
            found.append(f"{key}: DoRA needs the norms of the base, which is not read here")
        elif key not in pieces:
            found.append(f"{key}: no adapter of the export has this")
        elif tensor.shape != pieces[key].at(specs[path].rank if path in specs else 0):
            found.append(f"{key}: shape {tensor.shape}, expected {pieces[key].shape}")
    factors = [f"{path}/{factor}" for path in specs for factor in ("lora_a", "lora_b")]
    return found + [f"{key}: missing" for key in factors if key not in files.tensors]


def _is_factor(piece: Piece | None) -> bool:
    return piece is not None and piece.is_factor


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
