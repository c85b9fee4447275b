"""`merge`: a base and adapters as one plain model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

import keras_lora as kl
from keras_lora.files.atomic import replaced
from keras_lora.inject import active_names
from keras_lora.summary import shown_bytes
from keras_lora.walker import Tree
from keras_lora_cli.adapters import PeftOptions, load_into
from keras_lora_cli.bases import Base, keras_hub, load_base
from keras_lora_cli.output import Answer, Steps, facts
from keras_lora_cli.paths import (
    ADAPTERS,
    BASES,
    NAMES,
    Kind,
    check_free,
    check_kind,
    refused,
    size_of,
)


def merge(
    base: Base,
    adapters: Sequence[str],
    out: str,
    kind: Kind | None,
    options: PeftOptions,
    *,
    quantized: str | None,
    overwrite: bool,
    steps: Steps,
) -> Answer:
    """Fold the sum of adapters into a base, and write a plain model."""
    kind = kind or _default_kind(base.path, out)
    check_paths(base, adapters, out, kind, overwrite)
    named = {f"adapter_{i}": path for i, path in enumerate(adapters)}
    model = adapted_base(base, named, options, steps)
    with steps.step("merging and writing"):
        activate(model, named)
        if kind is not Kind.SAVED_MODEL:
            model = kl.merge_lora(model, quantized=quantized)
        found = _WRITERS[kind](model, out)
    return answer(model, out, kind, list(adapters), found)


def _default_kind(base: str, out: str) -> Kind:
    """The format that the path tells: `.keras`, a number for a SavedModel, or a preset."""
    if out.endswith(".keras"):
        return Kind.KERAS
    if Path(out).name.isdecimal():
        return Kind.SAVED_MODEL
    if check_kind(base, BASES) is Kind.PRESET:
        return Kind.PRESET
    fix = "pass --format, or write to model.keras or to a version's directory such as served/1"
    raise refused(out, "a path that tells the format", "a directory", fix)


def check_paths(base: Base, adapters: Sequence[str], out: str, kind: Kind, overwrite: bool) -> None:
    """Refuse wrong paths before the base is loaded, which may take long."""
    check_kind(base.path, BASES)
    for path in adapters:
        check_kind(path, ADAPTERS)
    if kind is Kind.KERAS and not out.endswith(".keras"):
        raise refused(
            out, "a name that ends in .keras", "another", "rename it, since Keras demands this"
        )
    check_free(out, kind, overwrite)


def adapted_base(
    base: Base, adapters: Mapping[str, str], options: PeftOptions, steps: Steps
) -> keras.Model:
    """The base with these adapters added. The first is active if the base has no active one."""
    with steps.step("loading the base"):
        model = load_base(base)
    for name, path in adapters.items():
        with steps.step(f"loading {path}"):
            load_into(model, path, name, options)
    return model


def activate(model: keras.Model, names: Collection[str]) -> None:
    """Make these adapters active too."""
    before = active_names(Tree.of(model))
    if names:
        kl.set_adapter(model, [*before, *(name for name in names if name not in before)])


def _write_keras(model: keras.Model, out: str) -> dict[str, Any]:
    with replaced(Path(out)) as path:
        model.save(path)
    return {}


def _write_preset(model: keras.Model, out: str) -> dict[str, Any]:
    models = keras_hub().models
    if not isinstance(model, models.Task | models.Backbone):
        received = type(model).__name__
        fix = "use --format keras or saved-model"
        raise refused(out, f"a model of KerasHub for {NAMES[Kind.PRESET]}", received, fix)
    with replaced(Path(out)) as path:
        model.save_to_preset(str(path))
    return {}


def _write_saved_model(model: keras.Model, out: str) -> dict[str, Any]:
    # `check_free` has made sure that only a SavedModel is overwritten.
    report = kl.export_saved_model(model, out, overwrite=True)
    from keras_lora_cli import saved_models  # now, since the export has loaded TensorFlow

    return saved_models.described(out, report)


_WRITERS: dict[Kind, Callable[[keras.Model, str], dict[str, Any]]] = {
    Kind.KERAS: _write_keras,
    Kind.PRESET: _write_preset,
    Kind.SAVED_MODEL: _write_saved_model,
}


def answer(
    model: keras.Model, out: str, kind: Kind, adapters: Sequence[str], found: Mapping[str, Any]
) -> Answer:
    """The answer of `merge` and `export`: the written model, and the findings of its writer."""
    data: dict[str, Any] = {
        "out": out,
        "format": kind.value,
        "class": type(model).__name__,
        "bytes": size_of(out),
        **found,
        "adapters": list(adapters),
    }
    shown = {
        "out": out,
        "format": data["format"],
        "adapters": ", ".join(adapters) or None,
        "class": data["class"],
        "size": shown_bytes(data["bytes"]),
    }
    return Answer(data, [facts(shown)])
