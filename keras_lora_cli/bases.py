"""Loading the model that an adapter belongs to."""

from __future__ import annotations

import importlib
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora_cli.paths import (
    BASES,
    CONFIG_FILE,
    TASK_FILE,
    Kind,
    check_kind,
    is_handle,
    read_json,
)


@dataclass(frozen=True, kw_only=True)
class Base:
    """The path of a model, and how to load it.

    Attributes:
        path: A `.keras` file, the directory of a preset or of a Hugging Face model, or a handle
            that KerasHub's `from_preset` takes.
        task: The KerasHub class to load a preset as; by default the class in its `task.json`,
            or the backbone.
        arguments: Further arguments of `from_preset`.
        preprocessor: Whether a task gets its preprocessor, for which a directory needs the
            tokenizer's files.
        modules: Modules to import first, which register the user's own classes.
    """

    path: str
    task: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: bool = True
    modules: Sequence[str] = ()


def load_base(base: Base, *, weights: bool = True) -> keras.Model:
    """Load a model; nothing is unpickled.

    Args:
        base: The model to load.
        weights: False if the architecture is enough. A preset then gets random weights and no
            preprocessor.

    Raises:
        ValueError: the path has no such model, or the model cannot be loaded.
    """
    kind = check_kind(base.path, BASES)
    _import(base.modules)
    if kind is Kind.PRESET:
        return _from_preset(base, weights)
    given = [name for name, value in (("--task", base.task), ("--set", base.arguments)) if value]
    if given:
        raise invalid("base", f"a preset for {' and '.join(given)}", base.path, "leave them out")
    return _from_file(base.path)


def keras_hub() -> Any:
    """KerasHub, which is optional.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("keras_hub")
    except ImportError as error:
        raise ImportError(
            f"Expected KerasHub, which this model needs. Received: {error}; "
            'pip install "keras-lora[nlp]".'
        ) from error


def _from_file(path: str) -> keras.Model:
    try:
        with zipfile.ZipFile(path) as archive:
            config = archive.read(CONFIG_FILE)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        fix = f"copy it or save it again ({error})"
        raise invalid("base", "a whole .keras file", path, fix) from error
    if re.search(rb'"keras_(hub|nlp)', config):
        keras_hub()  # registers its classes
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except TypeError as error:
        unknown = re.search(r"Could not locate (class|function) '(.+?)'", str(error))
        if unknown is None:
            raise
        fix = "give --import the module that registers it"
        raise invalid("base", "a model of classes that are known", unknown[2], fix) from error


def _from_preset(base: Base, weights: bool) -> keras.Model:
    models = keras_hub().models
    if is_handle(base.path) and "://" not in base.path and base.path not in models.Backbone.presets:
        expected = "a path that exists, or the name of a preset of KerasHub"
        raise invalid("base", expected, base.path, "check the path")
    loader = _task_class(base, models) or models.Backbone
    arguments = dict(base.arguments)
    if issubclass(loader, models.Task) and not (weights and base.preprocessor):
        arguments["preprocessor"] = None
    return loader.from_preset(base.path, load_weights=weights, **arguments)


def _task_class(base: Base, models: Any) -> Any:
    """The class of `--task`, or the class that a local preset was saved from."""
    if base.task is not None:
        if not isinstance(vars(models).get(base.task), type):
            fix = "for example CausalLM, TextClassifier or BertTextClassifier"
            raise invalid("task", "the name of a class in keras_hub.models", base.task, fix)
        return vars(models)[base.task]
    name = read_json(Path(base.path) / TASK_FILE).get("registered_name")
    if name is None:
        return None
    found = keras.saving.get_registered_object(name)
    if found is None:
        fix = "give --import the module that registers it, or --task a class of KerasHub"
        raise invalid("base", "a preset of a class that is known", name, fix)
    return found


def _import(modules: Sequence[str]) -> None:
    # The working directory, from which `python -m` imports and an installed command does not.
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    for module in modules:
        importlib.import_module(module)
