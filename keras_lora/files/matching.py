"""Match an adapter from files with a model: find its layers, and report misfits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_lora.checks import AdapterFileError, invalid_file, warn
from keras_lora.config import AdapterSpec, LoRAConfig, check_settled
from keras_lora.files.adapter_files import PathLike, read_adapter_files
from keras_lora.files.keys import base_fingerprint, factor_keys
from keras_lora.inject import PlannedLayer
from keras_lora.layers import Adapter, adapter_shapes, grid_of
from keras_lora.walker import Node, Target, Tree, all_targets

_FIELDS = {
    "keras_lora_version",
    "keras_version",
    "config",
    "spec",
    "layer_specs",
    "variables",
    "trained",
    "base",
    "quantization",  # the grid of each layer that was quantized; in files of such models alone
}


@dataclass(frozen=True)
class Loaded:
    """An adapter read from files, and the layers and variables of a model that it is for."""

    layers: Sequence[PlannedLayer]
    values: Sequence[tuple[keras.Variable, np.ndarray]]
    adapter: Adapter
    directory: str

    @classmethod
    def read(cls, tree: Tree, directory: PathLike, allow_other_base: bool) -> Loaded:
        files = read_adapter_files(directory)
        reader = _Reader(tree, directory, files.config, files.tensors)
        if not allow_other_base:
            reader.check_base()
        layers, values = reader.layers(), reader.values()
        reader.report(allow_other_base, bool(layers))
        reader.compare_grids(layers)
        return cls(layers, values, reader.adapter(), os.fspath(directory))


class _Reader:
    """Matches the content of files with a model, and gathers all that does not fit."""

    def __init__(
        self,
        tree: Tree,
        directory: PathLike,
        config: dict[str, Any],
        tensors: dict[str, np.ndarray],
    ) -> None:
        check_fields(directory, config)
        self._directory = os.fspath(directory)
        self._config = config
        self._tree = self._as_named(tree)
        self._tensors = tensors
        self._used: set[str] = set()
        self._absent: list[str] = []
        self._wrong: list[str] = []

    def _as_named(self, tree: Tree) -> Tree:
        """The tree with the stable paths of the version that wrote the files."""
        earlier = tree.named_as_in_0_1()
        return earlier if not self._is_base(tree) and self._is_base(earlier) else tree

    def _is_base(self, tree: Tree) -> bool:
        return self._config["base"].get("fingerprint") == base_fingerprint(tree)

    def check_base(self) -> None:
        base = self._config["base"]
        if not self._is_base(self._tree):
            model = self._tree.root
            raise self._error(
                "an adapter of a base whose layers have the names and shapes of those of "
                f"{model.name!r} ({type(model).__name__})",
                f"one of {base.get('name')!r} ({base.get('class')})",
                self._part_to_load_into()
                or "load it into that base; allow_other_base=True takes the layers that fit",
            )

    def _part_to_load_into(self) -> str:
        """Which model inside this one the adapter is of, as advice; empty where none is."""
        for node in self._tree.nodes:
            if isinstance(node.layer, keras.Model) and self._is_base(Tree.of(node.layer)):
                part = _expression(self._tree.root, node)
                return f"it belongs to {node.path!r} in this model: load_adapter({part}, ...)"
        return ""

    def layers(self) -> list[PlannedLayer]:
        wanted = [key.removesuffix("/lora_a") for key in self._tensors if key.endswith("/lora_a")]
        targets = {self._tree.stable_path(t.path): t for t in all_targets(self._tree)}
        missing = [path for path in wanted if path not in targets]
        self._absent += missing
        self._used |= {
            key
            for path in missing
            for key in factor_keys(path, spec_of_layer(self._directory, self._config, path))
        }
        found = [self._layer(path, targets[path]) for path in wanted if path in targets]
        return [layer for layer in found if layer is not None]

    def values(self) -> list[tuple[keras.Variable, np.ndarray]]:
        by_key = {key: identity for identity, key in self._tree.variable_keys.items()}
        variables = {id(v): v for v in self._tree.root.weights}
        found = []
        for key in self._config["variables"]:
            value, variable = self._take(key), variables.get(by_key.get(key, 0))
            if variable is None:
                self._absent.append(key)
            elif self._fits(key, value, tuple(variable.shape)):
                found.append((variable, value))
        return found

    def adapter(self) -> Adapter:
        keys, trained = self._tree.variable_keys, set(self._config["trained"])
        config = self._config["config"]
        return Adapter(
            None
            if config is None
            else _parsed(self._directory, "config", lambda: _settled(config)),
            [v for v in self._tree.root.weights if keys[id(v)] in trained],
        )

    def report(self, allow_absent: bool, any_layer: bool) -> None:
        """Raise all misfits as one error; warn of keys that are left out."""
        problems = [*self._wrong, *(f"{key}: not expected" for key in self._surplus())]
        if not allow_absent:
            problems += [f"{key}: the model has no such layer or variable" for key in self._absent]
        if problems or not any_layer:
            raise self._error(
                "tensors for layers of this model",
                "; ".join(problems) or "none",
                self._part_to_load_into() or "build the model that the adapter was saved from",
            )
        if self._absent:
            warn(
                f"{self._directory!r}: left out, since the model has no such layer or variable: "
                f"{self._absent}"
            )

    def compare_grids(self, layers: Sequence[PlannedLayer]) -> None:
        """Warn of layers that were quantized otherwise when the adapter was saved."""
        then = self._config.get("quantization", {})
        targets = {self._tree.stable_path(x.target.path): x.target for x in layers}
        pairs = {p: (then.get(p), grid_of(target.layer)) for p, target in targets.items()}
        other = [
            f"{p}: {a or 'floating point'}, now {b or 'floating point'}"
            for p, (a, b) in pairs.items()
            if a != b
        ]
        if other:
            warn(
                f"{self._directory!r}: expected a base that is quantized as when the adapter was "
                f"saved. Received another: {'; '.join(other[:5])}"
                f"{f' and {len(other) - 5} more' if len(other) > 5 else ''}. The adapter is loaded "
                "and acts, on a W0 that it was not trained with."
            )

    def _layer(self, path: str, target: Target) -> PlannedLayer | None:
        spec = self._spec(path)
        names = factor_keys(path, spec)
        shapes = adapter_shapes(target.site.split(), target.kernel_shape, spec)
        factors = [self._take(name) for name in names]
        fit = [self._fits(n, x, s) for n, x, s in zip(names, factors, shapes, strict=True)]
        return PlannedLayer(target, spec, factors) if all(fit) else None

    def _spec(self, path: str) -> AdapterSpec:
        return spec_of_layer(self._directory, self._config, path)

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

    def _error(self, expected: str, received: object, fix: str) -> AdapterFileError:
        return invalid_file(self._directory, expected, received, fix)


def _expression(root: keras.layers.Layer, node: Node) -> str:
    """How to write a layer of a model in code."""
    names = [name for name, value in vars(root).items() if value is node.layer and name[0] != "_"]
    return f"model.{names[0]}" if names else f"<the model at {node.path!r}>"


def check_fields(directory: PathLike, config: dict[str, Any]) -> None:
    """Raises:
    AdapterFileError: a config without a field that every adapter's config has.
    """
    kinds = {"spec": dict, "layer_specs": dict, "base": dict, "variables": list}
    kinds |= {"trained": list}
    wrong = [f for f, kind in kinds.items() if not isinstance(config.get(f), kind)]
    if not isinstance(config.get("quantization", {}), dict):
        wrong.append("quantization")
    if "config" not in config or not isinstance(config["config"], dict | None):
        wrong.append("config")
    for name in {"variables", "trained"} - set(wrong):
        if not all(isinstance(key, str) for key in config[name]):
            wrong.append(name)
    if wrong:
        raise invalid_file(
            directory,
            "the fields of an adapter of keras_lora",
            f"missing or malformed: {wrong}",
            "save the adapter again",
        )
    unknown = sorted(config.keys() - _FIELDS)
    if unknown:
        warn(
            f"{os.fspath(directory)!r}: ignored the unknown fields {unknown}; a newer keras_lora "
            "than this one may have written them."
        )


def spec_of_layer(directory: PathLike, config: dict[str, Any], path: str) -> AdapterSpec:
    """The spec that an adapter's config has for the layer at `path`.

    Raises:
        AdapterFileError: an invalid spec.
    """
    fields = config["layer_specs"].get(path, config["spec"])
    return _parsed(directory, f"the spec of {path!r}", lambda: AdapterSpec(**fields))


def _settled(config: Mapping[str, Any]) -> LoRAConfig:
    """The config of an adapter that exists, whose ranks are therefore known."""
    found = LoRAConfig.from_dict(config)
    check_settled(found)
    return found


def _parsed(directory: PathLike, what: str, parse: Any) -> Any:
    try:
        return parse()
    except (TypeError, ValueError) as error:
        raise invalid_file(
            directory, f"{what} to be valid", error, "save the adapter again"
        ) from error
