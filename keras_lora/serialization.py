"""Adapters in files of their own: `save_adapter` and `load_adapter`.

Tensors are named by the path of their layer, with `lora_a` or `lora_b` at the end, or with the name
of the variable where an adapter has its own value of one (a head, a bias). Numbers that Keras gave
to layers without a name are left out of the paths, since another process may count otherwise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import ml_dtypes
import numpy as np

from keras_lora.config import AdapterSpec, LoRAConfig, invalid
from keras_lora.files import AdapterFileError, read_adapter_files, write_adapter_files
from keras_lora.inject import (
    active_names,
    adapted,
    check_names,
    forget_optimizer_states,
    groups,
    install,
    known_models,
    plan_factors,
    reset_optimizer,
)
from keras_lora.layers import (
    DEFAULT_ADAPTER,
    Group,
    Held,
    LoRALayer,
    all_held,
    check_adapter_name,
    hold,
    split_kernel,
)
from keras_lora.version import __version__
from keras_lora.walker import Target, find_targets, lora_layers, numbered, walk

PathLike = str | os.PathLike[str]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_FIELDS = {
    "keras_lora_version",
    "keras_version",
    "config",
    "spec",
    "layer_specs",
    "variables",
    "trained",
    "base",
}


def save_adapter(
    model: keras.Model,
    directory: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
) -> None:
    """Write one adapter: its factors, and its values of biases and `layers_to_save`.

    `adapter.safetensors` holds everything; `adapter_config.json` says the same for people, without
    the tensors. A process that is killed at any moment leaves the old adapter or the new one.

    Args:
        model: An adapted model.
        directory: Where to; made if it does not exist.
        name: The adapter, active or not. Its name is not written: it is given when loading.
        overwrite: Replace an adapter that is there.
        dtype: `"float32"`, or `"float16"` or `"bfloat16"` for half the bytes, rounded once.

    Raises:
        ValueError: the model has no such adapter, or an unknown dtype.
        AdapterFileError: an adapter is there and `overwrite` is false, values are not finite (in
            that dtype), or the files cannot be written.

    Example:

    >>> import tempfile, keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> directory = tempfile.mkdtemp()
    >>> kl.save_adapter(model, directory)
    >>> kl.read_adapter_files(directory).tensors["up/lora_a"].shape
    (3, 2)
    """
    (name,) = check_names(model, [name])
    if dtype not in _DTYPES:
        raise invalid("dtype", f"one of {sorted(_DTYPES)}", dtype)
    tensors = adapter_tensors(model, name)
    with np.errstate(over="ignore"):  # an overflow is refused below, with its key
        tensors = {key: value.astype(_DTYPES[dtype]) for key, value in tensors.items()}
    write_adapter_files(directory, _description(model, name), tensors, overwrite=overwrite)


def load_adapter(
    model: keras.Model,
    directory: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    replace: bool = False,
    allow_other_base: bool = False,
) -> None:
    """Add an adapter from files to a model, which need not be adapted yet.

    Where no adapter acts, it acts and trains at once; else it waits for `set_adapter`, and nothing
    changes for the others.

    With `replace`, it takes the place of the adapter of that name, with another scale and of the
    same rank or a lower one. Only values change: nothing is traced again, and a service changes
    its task between two requests. Layers of the old adapter that the new one lacks have none.

    Args:
        model: A built model of the same architecture as the one that was adapted.
        directory: What `save_adapter` wrote.
        name: The adapter's name in this model.
        replace: Put it in the place of the adapter of that name.
        allow_other_base: Take the adapter of a model with other shapes, as far as it fits; what is
            left out is listed in a warning.

    Raises:
        ValueError: a name that is taken (or, to replace, is not there), or layers that cannot be
            adapted.
        AdapterFileError: the files are damaged, belong to another base, or do not fit; everything
            that does not fit is listed. The model is then as it was.

    Example:

    >>> import tempfile, keras, keras_lora as kl
    >>> def base():
    ...     return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(base(), kl.LoRAConfig(targets=["up"], rank=2))
    >>> directory = tempfile.mkdtemp()
    >>> kl.save_adapter(model, directory)
    >>> other = base()
    >>> kl.load_adapter(other, directory, "fr")
    >>> kl.lora_layers(other)["up"].active_adapters
    ('fr',)
    """
    check_adapter_name(name)
    if not isinstance(model, keras.layers.Layer):
        raise invalid("model", "a built Keras model", model)
    if replace:
        check_names(model, [name])
    loaded = _Loaded.read(model, directory, allow_other_base)
    if replace:
        _replace(model, name, loaded)
        return
    factors = {t.path: (spec, *pair) for t, spec, pair in loaded.layers}
    plan = plan_factors(model, name, loaded.group, factors, loaded.values)
    install(model, plan, acts=not active_names(lora_layers(model)))


def adapter_tensors(model: keras.Model, name: str) -> dict[str, np.ndarray]:
    """What an adapter consists of, by key."""
    tensors = {}
    for path, layer in _stable_layers(model).items():
        if name in layer.adapters:
            tensors[f"{path}/lora_a"] = np.array(layer.adapters[name].a)
            tensors[f"{path}/lora_b"] = np.array(layer.adapters[name].b)
    keys = variable_keys(model)
    return tensors | {keys[id(item.variable)]: item.value(name) for item in _held_by(model, name)}


def variable_keys(model: keras.Model) -> dict[int, str]:
    """The key of each weight of a model: the path of its layer, and its name there."""
    keys: dict[int, str] = {}
    nodes = [("", model), *((f"{node.stable_path}/", node.layer) for node in walk(model))]
    # From below: a layer's weights contain those of the layers in it.
    for prefix, layer in reversed(nodes):
        seen: Counter[str] = Counter()
        for variable in layer.weights:
            if id(variable) not in keys:
                keys[id(variable)] = prefix + numbered(variable.name, seen)
    return keys


def base_fingerprint(model: keras.Model) -> str:
    """A digest of the keys and shapes of the base's weights."""
    ours = {id(v) for x in lora_layers(model).values() for v in x.adapter_variables}
    keys = variable_keys(model)
    shapes = sorted((keys[id(v)], list(v.shape)) for v in model.weights if id(v) not in ours)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _stable_layers(model: keras.Model) -> dict[str, LoRALayer]:
    stable = {node.path: node.stable_path for node in walk(model)}
    return {stable.get(path, path): layer for path, layer in adapted(model).items()}


def _held_by(model: keras.Model, name: str) -> list[Held]:
    return [item for item in all_held(model.variables) if name in item.names]


def _description(model: keras.Model, name: str) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    layers = {p: x.adapters[name] for p, x in _stable_layers(model).items() if name in x.adapters}
    specs = {path: dataclasses.asdict(adapter.acting_spec) for path, adapter in layers.items()}
    common = next(iter(specs.values()))
    keys, group = variable_keys(model), groups(adapted(model)).get(name)
    return {
        "keras_lora_version": __version__,
        "keras_version": keras.__version__,
        "config": _plain_config(group, list(layers)),
        "spec": common,
        "layer_specs": {path: spec for path, spec in specs.items() if spec != common},
        "variables": [keys[id(item.variable)] for item in _held_by(model, name)],
        "trained": [keys[id(v)] for v in (group.trained if group else ()) if id(v) in keys],
        "base": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "name": model.name,
            "fingerprint": base_fingerprint(model),
        },
    }


def _plain_config(group: Group | None, paths: Sequence[str]) -> dict[str, Any] | None:
    if group is None or group.config is None:
        return None
    config = group.config
    # A function has no place in a file, and what it selected has.
    return (
        dataclasses.replace(config, targets=paths) if callable(config.targets) else config
    ).to_dict()


@dataclass(frozen=True)
class _Loaded:
    """An adapter read from files, and what of a model it is for."""

    layers: Sequence[tuple[Target, AdapterSpec, tuple[np.ndarray, np.ndarray]]]
    values: Sequence[tuple[keras.Variable, np.ndarray]]
    group: Group
    directory: str

    @classmethod
    def read(cls, model: keras.Model, directory: PathLike, allow_other_base: bool) -> _Loaded:
        files = read_adapter_files(directory)
        reader = _Reader(model, directory, files.config, files.tensors)
        if not allow_other_base:
            reader.check_base()
        layers, values = reader.layers(), reader.values()
        reader.report(allow_other_base, bool(layers))
        return cls(layers, values, reader.group(), os.fspath(directory))


class _Reader:
    """Matches the content of files with a model, and gathers all that does not fit."""

    def __init__(
        self,
        model: keras.Model,
        directory: PathLike,
        config: dict[str, Any],
        tensors: dict[str, np.ndarray],
    ) -> None:
        self._model = model
        self._directory = os.fspath(directory)
        self._config = config
        self._tensors = tensors
        self._used: set[str] = set()
        self._absent: list[str] = []
        self._wrong: list[str] = []
        self._check_fields()

    def check_base(self) -> None:
        base = self._config["base"]
        if base.get("fingerprint") != base_fingerprint(self._model):
            raise self._error(
                f"an adapter of a base with the shapes of {self._model.name!r} "
                f"({type(self._model).__name__})",
                f"one of {base.get('name')!r} ({base.get('class')})",
                "load it into that base; allow_other_base=True takes what fits",
            )

    def layers(self) -> list[tuple[Target, AdapterSpec, tuple[np.ndarray, np.ndarray]]]:
        stable = {node.path: node.stable_path for node in walk(self._model)}
        wanted = [key.removesuffix("/lora_a") for key in self._tensors if key.endswith("/lora_a")]
        targets = {stable.get(t.path, t.path): t for t in find_targets(self._model, lambda _: True)}
        missing = [path for path in wanted if path not in targets]
        self._absent += missing
        self._used |= {f"{path}/lora_{which}" for path in missing for which in "ab"}
        found = [
            (targets[path], self._layer(path, targets[path])) for path in wanted if path in targets
        ]
        return [(target, *layer) for target, layer in found if layer is not None]

    def values(self) -> list[tuple[keras.Variable, np.ndarray]]:
        by_key = {key: identity for identity, key in variable_keys(self._model).items()}
        variables = {id(v): v for v in self._model.weights}
        found = []
        for key in self._config["variables"]:
            value, variable = self._take(key), variables.get(by_key.get(key, 0))
            if variable is None:
                self._absent.append(key)
            elif self._fits(key, value, tuple(variable.shape)):
                found.append((variable, value))
        return found

    def group(self) -> Group:
        keys, trained = variable_keys(self._model), set(self._config["trained"])
        config = self._config["config"]
        return Group(
            None
            if config is None
            else self._parsed("config", lambda: LoRAConfig.from_dict(config)),
            [v for v in self._model.weights if keys[id(v)] in trained],
        )

    def report(self, allow_absent: bool, any_layer: bool) -> None:
        """Raises all that does not fit as one error; warns of what is left out."""
        problems = [*self._wrong, *(f"{key}: not expected" for key in self._surplus())]
        if not allow_absent:
            problems += [f"{key}: the model has no such layer or variable" for key in self._absent]
        if problems or not any_layer:
            raise self._error(
                "tensors for layers of this model",
                "; ".join(problems) or "none",
                "build the model that the adapter was saved from",
            )
        if self._absent:
            warnings.warn(
                f"{self._directory!r}: left out, since the model has no such layer or variable: "
                f"{self._absent}",
                stacklevel=5,
            )

    def _layer(
        self, path: str, target: Target
    ) -> tuple[AdapterSpec, tuple[np.ndarray, np.ndarray]] | None:
        names = (f"{path}/lora_a", f"{path}/lora_b")
        spec = self._spec(path)
        shapes = split_kernel(target.layer).factor_shapes(target.kernel_shape, spec.rank)
        a, b = (self._take(name) for name in names)
        fit = [self._fits(n, x, s) for n, x, s in zip(names, (a, b), shapes, strict=True)]
        return (spec, (a, b)) if all(fit) else None

    def _spec(self, path: str) -> AdapterSpec:
        fields = self._config["layer_specs"].get(path, self._config["spec"])
        return self._parsed(f"the spec of {path!r}", lambda: AdapterSpec(**fields))

    def _take(self, key: str) -> np.ndarray:
        """The tensor, or an empty one with a note that it is missing."""
        self._used.add(key)
        if key not in self._tensors:
            self._wrong.append(f"{key}: missing")
            return np.empty(0, "float32")
        return self._tensors[key].astype("float32", copy=False)

    def _fits(self, key: str, value: np.ndarray, expected: Sequence[int]) -> bool:
        fits = value.shape == tuple(expected)
        if not fits and key in self._tensors:
            self._wrong.append(f"{key}: shape {value.shape}, expected {tuple(expected)}")
        return fits

    def _surplus(self) -> list[str]:
        return [key for key in self._tensors if key not in self._used]

    def _check_fields(self) -> None:
        kinds = {"spec": dict, "layer_specs": dict, "base": dict, "variables": list}
        kinds |= {"trained": list}
        wrong = [f for f, kind in kinds.items() if not isinstance(self._config.get(f), kind)]
        if "config" not in self._config or not isinstance(self._config["config"], dict | None):
            wrong.append("config")
        for field in {"variables", "trained"} - set(wrong):
            if not all(isinstance(key, str) for key in self._config[field]):
                wrong.append(field)
        if wrong:
            raise self._error(
                "the fields of an adapter of keras_lora",
                f"others for {wrong}",
                "save the adapter again",
            )
        unknown = sorted(self._config.keys() - _FIELDS)
        if unknown:
            warnings.warn(
                f"{self._directory!r}: ignored the unknown fields {unknown}; a newer keras_lora "
                "than this one may have written them.",
                stacklevel=6,
            )

    def _parsed(self, what: str, parse: Any) -> Any:
        try:
            return parse()
        except (TypeError, ValueError) as error:
            raise self._error(f"{what} to be valid", error, "save the adapter again") from error

    def _error(self, expected: str, received: object, fix: str) -> AdapterFileError:
        return AdapterFileError(
            f"Invalid {self._directory!r}: expected {expected}. Received: {received}; {fix}."
        )


def _replace(model: keras.Model, name: str, loaded: _Loaded) -> None:
    layers = adapted(model)
    active = active_names(layers)
    _check_replaceable(model, name, loaded)
    for target, spec, (a, b) in loaded.layers:
        layer = layers[target.path]
        layer.put_adapter(name, layer.adapter_of(_maskable(layer, spec), a, b, loaded.group))
    new = {target.path for target, _, _ in loaded.layers}
    for path, layer in layers.items():
        if name in layer.adapters and path not in new:
            layer.remove_adapter(name)
        names = [n for n in active if n in layer.adapters]
        if names != list(layer.active_adapters):
            layer.activate(names, layer.trains_adapters)
    for variable, value in loaded.values:
        hold(variable, name).assign(name, value)
    for inner in known_models(model):
        forget_optimizer_states(inner, name)
        if name in active:
            reset_optimizer(inner)


def _maskable(layer: LoRALayer, spec: AdapterSpec) -> AdapterSpec:
    return spec if layer.masks else dataclasses.replace(spec, dropout=0.0)


def _check_replaceable(model: keras.Model, name: str, loaded: _Loaded) -> None:
    """Whether the adapter fits where the old one is, so that no function is traced again."""
    layers = adapted(model)
    problems = [p for t, spec, _ in loaded.layers if (p := _misfit(t.path, layers, name, spec))]
    received, live = (
        {id(v) for v, _ in loaded.values},
        {id(i.variable) for i in _held_by(model, name)},
    )
    keys = variable_keys(model)
    problems += [f"{keys[i]}: of one of the two only" for i in received ^ live]
    if problems:
        raise AdapterFileError(
            f"Invalid {loaded.directory!r}: expected an adapter that fits in the place of "
            f"{name!r} without a new trace. Received: {'; '.join(problems)}; use delete_adapter "
            "and then load_adapter without replace."
        )
    if any(spec.dropout and not layers[t.path].masks for t, spec, _ in loaded.layers):
        warnings.warn(
            f"{loaded.directory!r}: its dropout is left out, since the model was compiled without. "
            "Inference is the same; to train it, load it without replace.",
            stacklevel=4,
        )


def _misfit(path: str, layers: Mapping[str, LoRALayer], name: str, spec: AdapterSpec) -> str | None:
    if path not in layers:
        return f"{path}: not adapted in this model"
    layer = layers[path]
    acting = [n for n in active_names(layers) if n == name or n in layer.adapters]
    specs = [spec if n == name else layer.adapters[n].spec for n in acting]
    if layer.fits([dataclasses.replace(spec, dropout=0.0) for spec in specs]):
        return None
    return f"{path}: rank {spec.rank} among slots of rank {[slot.rank for slot in layer.slots]}"
