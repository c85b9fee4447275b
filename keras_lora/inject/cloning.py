"""A second model with the same architecture and weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_lora.checks import warn
from keras_lora.inject.freezing import original_flag
from keras_lora.layers import LoRALayer, plain_class
from keras_lora.walker import Tree


def plain_copy(tree: Tree) -> Any:
    """A copy without adapters: the base's architecture, values, flags and compile settings.

    Raises:
        ValueError: the model cannot be made from its config, or the model made from it has other
            variables. (`LlamaBackbone.get_config` of KerasHub 0.32 forgets tied embeddings.)
    """
    model: Any = tree.root
    with _as_plain(tree.adapted):
        copy = _from_config(model)
    originals, copies = base_variables(tree), copy.variables
    shapes = [[(tuple(v.shape), v.dtype) for v in variables] for variables in (originals, copies)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"inplace=False: expected the model made from {type(model).__name__}.get_config() to "
            f"have the variables of the original, {len(originals)} of them. Received: "
            f"{len(copies)}, or other shapes: its get_config is incomplete. Use inplace=True."
        )
    for original, variable in zip(originals, copies, strict=True):
        # A copy: on JAX training donates the arrays of the original.
        variable.assign(ops.copy(original.value))
    pairs = list(zip(tree.layers, Tree.of(copy).layers, strict=True))
    for original, layer in pairs + list(zip(originals, copies, strict=True)):
        layer.trainable = original_flag(original)
    _compile_like(copy, model)
    return copy


def base_variables(tree: Tree) -> list[keras.Variable]:
    """The variables of a model without those of its adapters."""
    ours = {id(v) for bank in tree.banks for v in bank.variables}
    return [v for v in tree.root.variables if id(v) not in ours]


def _from_config(model: keras.Model) -> keras.Model:
    try:
        copy = type(model).from_config(model.get_config())
        if not copy.built:
            copy.build_from_config(model.get_build_config())
    except Exception as error:
        raise ValueError(
            "inplace=False: expected a model that can be made from its get_config(). Received: "
            f"{type(model).__name__}, which cannot ({str(error).splitlines()[0]}). Use "
            "inplace=True, or implement get_config."
        ) from error
    return copy


@contextlib.contextmanager
def _as_plain(layers: Sequence[LoRALayer]) -> Iterator[None]:
    """Within the context the layers have their plain classes, so that configs are plain."""
    classes = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = plain_class(layer)
    try:
        yield
    finally:
        for layer, lora_class in zip(layers, classes, strict=True):
            layer.__class__ = lora_class


def _compile_like(copy: keras.Model, model: keras.Model) -> None:
    if not getattr(model, "compiled", False) or copy.compiled:
        return  # a KerasHub task compiles itself, and its settings cannot be read back
    try:
        copy.compile_from_config(model.get_compile_config())
    except Exception as error:
        warn(
            f"The copy was not compiled, since the compile settings could not be read back "
            f"({error}). Compile it."
        )
