"""KerasHub's converters of Hugging Face checkpoints, and the configurations that they read.

Private API in this package, and why (imported by name when it is needed, since KerasHub is
optional):
    `keras_hub.src.utils.transformers.preset_loader`: its `TransformersPresetLoader` chooses the
        converter module for a Hugging Face model type.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora.checks import invalid

PRESET_LOADER = "keras_hub.src.utils.transformers.preset_loader"


@dataclass(frozen=True)
class Converter:
    """A converter module of KerasHub for one of Hugging Face's model types, and a config."""

    model_type: str
    module: Any
    config: Mapping[str, Any]


class MissingFieldError(ValueError):
    """A converter reads a field of `config.json` that a Keras backbone does not have."""


def find_converter(
    backbone: keras.Model, config: Mapping[str, Any] | None, model_type: str | None
) -> Converter:
    """The converter that loads a backbone of this class.

    Raises:
        ValueError: KerasHub has no converter for this class, or the converter of `model_type`
            loads another class.
    """
    model_type = model_type or (config or {}).get("model_type")
    modules = converter_modules()
    fitting = {t: m for t, m in modules.items() if m.backbone_cls is type(backbone)} or {
        t: m for t, m in modules.items() if _related(m.backbone_cls, type(backbone))
    }
    if model_type is not None:
        fitting = {t: m for t, m in fitting.items() if t == model_type}
    if not fitting:
        raise invalid(
            "model",
            f"a backbone that KerasHub's converter of {model_type or 'any model type'} loads",
            type(backbone).__name__,
            f"the model types are {sorted(modules)}",
        )
    return _most_alike(backbone, fitting, config or {})


def converter_modules() -> dict[str, Any]:
    """`{model type: converter module}`, as KerasHub itself chooses the module.

    KerasHub has no list of model types, and a converter module does not say which ones it is for.
    Only the code that chooses has them, as constants to compare with. So each constant is tried.
    A test makes sure that every converter module of KerasHub is found.
    """
    loader: Any = importlib.import_module(PRESET_LOADER).TransformersPresetLoader
    constants = loader.__init__.__code__.co_consts
    flat = [c for x in constants for c in (x if isinstance(x, tuple) else (x,))]
    modules = {}
    for model_type in dict.fromkeys(c for c in flat if isinstance(c, str)):
        with contextlib.suppress(ValueError):
            modules[model_type] = loader("", {"model_type": model_type}).converter
    return modules


def _related(a: type, b: type) -> bool:
    return issubclass(a, b) or issubclass(b, a)


def _most_alike(
    backbone: keras.Model, fitting: Mapping[str, Any], config: Mapping[str, Any]
) -> Converter:
    """The converter, among several model types', that makes a backbone most like this one."""
    found, ours = [], backbone.get_config()
    for model_type, module in fitting.items():
        fields, constants = _inverted(module, model_type, backbone)
        common = [ours[name] == value for name, value in constants.items() if name in ours]
        score = common.count(True) - common.count(False)
        stand_in = StandIn(module.__name__, fields | dict(config))
        found.append((score, Converter(model_type, module, stand_in)))
    return max(found, key=lambda pair: pair[0])[1]


class StandIn(Mapping[str, Any]):
    """A `config.json` with the fields that a Keras backbone knows."""

    def __init__(self, converter: str, fields: Mapping[str, Any]) -> None:
        self.converter = converter.rpartition(".")[2]
        self.fields = fields

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            raise MissingFieldError(
                f"Expected a `transformers_config` with the field {name!r}, which KerasHub's "
                f"{self.converter} reads and the Keras model does not have. Received: only the "
                f"fields {sorted(self.fields)} of the Keras model. Pass the config.json of the "
                "Hugging Face model as a dictionary."
            )
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


@dataclass(frozen=True, eq=False)
class _Field(np.lib.mixins.NDArrayOperatorsMixin):
    """Stands for the unknown value of a field; a result of computing with it has no name."""

    name: str

    def __array_ufunc__(self, *_: Any, **__: Any) -> _Field:
        return _Field("")

    def __getitem__(self, name: str) -> _Field:
        return _Field(f"{self.name}.{name}")

    def get(self, name: str, default: Any = None) -> _Field:  # noqa: ARG002
        return self[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class _Fields(dict[str, Any]):
    """A configuration in which each field is a `_Field` or, if `defaults`, the reader's default."""

    def __init__(self, model_type: str, defaults: bool) -> None:
        super().__init__(model_type=model_type)
        self.defaults = defaults

    def __missing__(self, name: str) -> _Field:
        return _Field(name)

    def get(self, name: str, default: Any = None) -> Any:
        return default if self.defaults and name not in self else self[name]


def _inverted(
    module: Any, model_type: str, backbone: keras.Model
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`convert_backbone_config` read backwards.

    Returns:
        The fields of `config.json` that became arguments of the backbone, with the backbone's
        values; and the arguments that are the same for each configuration of this model type.
    """
    with_defaults = _converted(module, _Fields(model_type, True), type(backbone))
    without = _converted(module, _Fields(model_type, False), type(backbone))
    ours, fields = backbone.get_config(), {"model_type": model_type}
    for name, value in (*with_defaults.items(), *without.items()):
        if isinstance(value, _Field) and name in ours:
            fields[value.name] = ours[name]
    plain = {n: v for n, v in without.items() if v is None or isinstance(v, (bool, str))}
    return fields, plain


def _converted(module: Any, config: _Fields, backbone_class: type) -> Mapping[str, Any]:
    convert: Callable[..., Mapping[str, Any]] = module.convert_backbone_config
    takes_class = len(inspect.signature(convert).parameters) > 1
    try:
        return convert(config, backbone_class) if takes_class else convert(config)
    except Exception:  # whatever the converter raises where it needs the value of a field
        return {}
