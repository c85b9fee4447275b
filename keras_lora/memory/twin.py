"""A model as it would be: its layers in a graph that never runs, so that no variable has values.

On TensorFlow a variable that is made in a graph has a shape and a dtype, and memory only once a
session runs. In such a graph a model is made from its config, quantized, adapted, rematerialized
and compiled like any other.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.chunks import chunk_logits, chunked_tokens
from keras_lora.config import DEFAULT_INIT, LoRAConfig, check_settled
from keras_lora.inject import (
    Plan,
    PlannedLayer,
    active_names,
    adapter_names,
    apply_lora,
    bare_copy,
    base_variables,
    install,
    rematerialize,
    switch,
    turn,
    whole_adapters,
    without_values,
)
from keras_lora.layers import Adapter
from keras_lora.memory.quantizing import quantize_without_values
from keras_lora.walker import Blocks, Tree, all_targets

_MODES = ("int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What would be done with a model before it trains; None leaves it as it is."""

    config: LoRAConfig | None = None
    rematerialize: Blocks | None = None
    chunk_tokens: int | None = None
    quantized: Any = None

    def __post_init__(self) -> None:
        if self.config is not None and not isinstance(self.config, LoRAConfig):
            raise invalid("config", "a LoRAConfig or None", self.config)
        if self.config is not None:
            check_settled(self.config)
        mode = getattr(self.quantized, "mode", self.quantized)
        if mode is not None and mode not in _MODES:
            expected = f"one of {_MODES}, or a quantization config of Keras for one of them"
            fix = "quantize the model itself, and plan it without this argument"
            raise invalid("quantized", expected, self.quantized, fix)


@contextmanager
def nowhere(graph: Any) -> Iterator[None]:
    """Within it layers, variables and operations are made in a graph that never runs."""
    with graph.as_default(), without_values():
        yield


def twin_of(model: keras.Model, changes: Changes, graph: Any) -> keras.Model:
    """A model like another one after these changes, in a graph that never runs.

    Raises:
        ValueError: a model that cannot be made from its config, or that cannot be changed so.
    """
    with turn(model, "memory_plan") as tree, nowhere(graph):
        if tree.adapted and changes.config is not None:
            fix = "it is planned with the adapters that it has; to plan others, unload_lora(model)"
            raise invalid("config", "None for a model with adapters", changes.config, fix)
        twin: keras.Model = bare_copy(tree, "memory_plan", "Plan a model that can")
        pairs = zip(base_variables(tree), twin.variables, strict=True)
        variables = {id(original): variable for original, variable in pairs}
        if changes.quantized is not None:
            trained = whole_adapters(tree, adapter_names(tree)).values()
            kept = {id(variables[id(v)]) for whole in trained for v in whole.trained}
            quantize_without_values(twin, changes.quantized, kept)
        _adapt_like(tree, twin, variables)
        tokens = chunked_tokens(model) if changes.chunk_tokens is None else changes.chunk_tokens
        if changes.config is not None:
            apply_lora(twin, _without_start(changes.config))
        if changes.rematerialize is not None:
            rematerialize(twin, changes.rematerialize)
        if tokens is not None:
            # KerasHub's tasks come compiled, with an optimizer that has no values.
            twin.compile(None, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            chunk_logits(twin, tokens)
    return twin


def _without_start(config: LoRAConfig) -> LoRAConfig:
    """A config whose start computes nothing, where the start does not decide what is kept."""
    kept = config.spec().has_counterpart
    return config if kept else dataclasses.replace(config, init=DEFAULT_INIT)


def _adapt_like(tree: Tree, twin: keras.Model, variables: Mapping[int, Any]) -> None:
    """Give the twin the adapters that the model has.

    `variables` are the twin's, by the id of the model's.
    """
    active = active_names(tree)
    names = dict.fromkeys([*active, *adapter_names(tree)])
    if not names:
        return
    if not active:
        fix = "activate what is to train: set_adapter(model, name)"
        raise invalid("model", "a model with an active adapter", list(names), fix)
    like = Tree.of(twin)
    targets = {target.path: target for target in all_targets(like)}
    wholes = whole_adapters(tree, names)
    for name in names:
        whole = wholes.get(name, Adapter(None))
        trained = [variables[id(v)] for v in whole.trained]
        layers = _planned(tree, name, targets)
        plan = Plan(name, layers, Adapter(whole.config, trained), trained)
        install(like, plan, active=name == active[0])
    if len(active) > 1:
        switch(like, active)


def _planned(tree: Tree, name: str, targets: Mapping[str, Any]) -> Sequence[PlannedLayer]:
    found = {
        path: bank.adapters[name].spec
        for path, bank in tree.banks_by_path.items()
        if name in bank.adapters
    }
    specs = {
        path: spec if spec.has_counterpart else dataclasses.replace(spec, init=DEFAULT_INIT)
        for path, spec in found.items()
    }
    return [PlannedLayer(targets[path], spec) for path, spec in specs.items()]


def tensorflow() -> Any:
    """TensorFlow, on whose backend a model can be made without values.

    Raises:
        ValueError: another backend.
    """
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            "memory_plan: expected the TensorFlow backend, whose graphs it reads. Received: "
            f"{backend}. Plan with KERAS_BACKEND=tensorflow: weights, factors, gradients and "
            "optimizer state are the same on all backends."
        )
    return importlib.import_module("tensorflow")
