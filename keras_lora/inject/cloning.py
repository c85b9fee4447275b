"""A second model with the same architecture, weights and other state."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_lora.checks import warn
from keras_lora.distribution import strategy_scope
from keras_lora.inject.freezing import original_flag
from keras_lora.inject.optimizers import carry_exclusions
from keras_lora.layers import LoRALayer, is_recomputed, parts_of, plain_class, recompute
from keras_lora.walker import Layer, Tree


def plain_copy(tree: Tree) -> Any:
    """A copy without adapters: the base's architecture, state, flags and compile settings.

    Raises:
        ValueError: the model cannot be made from its config, or the model made from it has other
            layers or variables (`LlamaBackbone.get_config` of KerasHub 0.32 forgets tied
            embeddings), or the state of a layer cannot be written or read.
    """
    copy = bare_copy(tree, "inplace=False", "Use inplace=True")
    originals, copies = base_variables(tree), copy.variables
    for original, layer in zip(tree.layers, Tree.of(copy).layers, strict=True):
        _carry_state(original, layer)
    for original, variable in zip(originals, copies, strict=True):
        # A copy: on JAX training donates the arrays of the original.
        variable.assign(ops.copy(original.value))
    with strategy_scope(tree):
        _compile_like(copy, tree.root, list(zip(originals, copies, strict=True)))
    return copy


def bare_copy(tree: Tree, asked: str, fix: str) -> Any:
    """A copy without adapters and without the base's state: its architecture and its flags.

    Args:
        tree: The model.
        asked: What asks for a copy, for errors.
        fix: What to do instead, for errors.

    Raises:
        ValueError: as `plain_copy`.
    """
    with _as_plain(tree.adapted), strategy_scope(tree):
        copy = _from_config(tree.root, asked, fix)
    layers = list(Tree.of(copy).layers)
    _check_alike(tree, layers, copy.variables, asked, fix)
    pairs = list(zip(tree.layers, layers, strict=True))
    for original, layer in pairs:
        if is_recomputed(original):
            recompute(layer)
    for original, layer in pairs + list(zip(base_variables(tree), copy.variables, strict=True)):
        layer.trainable = original_flag(original)
    return copy


def base_variables(tree: Tree) -> list[keras.Variable]:
    """The variables of a model without those of its adapters."""
    ours = {id(v) for bank in tree.banks for v in bank.variables}
    return [v for v in tree.root.variables if id(v) not in ours]


def _from_config(model: keras.Model, asked: str, fix: str) -> keras.Model:
    try:
        copy = type(model).from_config(model.get_config())
        if not copy.built:
            copy.build_from_config(model.get_build_config())
    except Exception as error:
        raise ValueError(
            f"{asked}: expected a model that can be made from its get_config(). Received: "
            f"{type(model).__name__}, which cannot ({str(error).splitlines()[0]}). {fix}, or "
            "implement get_config."
        ) from error
    return copy


def _check_alike(
    tree: Tree, layers: Sequence[Layer], variables: Sequence[keras.Variable], asked: str, fix: str
) -> None:
    originals = base_variables(tree)
    # By name: a notebook may have made the class anew.
    classes = [[type(layer).__name__ for layer in each] for each in (tree.layers, layers)]
    shapes = [[(tuple(v.shape), v.dtype) for v in each] for each in (originals, variables)]
    if classes[0] != classes[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"{asked}: expected the model made from {type(tree.root).__name__}.get_config() to "
            f"have the layers and variables of the original, {len(tree.layers)} and "
            f"{len(originals)} of them. Received: {len(layers)} and {len(variables)}, or other "
            f"classes or shapes: its get_config is incomplete. {fix}."
        )


def _carry_state(original: Layer, layer: Layer) -> None:
    """Carry over what a `.keras` file has of a layer: vocabularies, measured means and the like.

    Not all of that is in variables, or in the config.
    """
    stored: dict[str, Any] = {}
    try:
        if isinstance(original, LoRALayer):
            original.save_base_variables(stored)
        else:
            original.save_own_variables(stored)
        layer.load_own_variables(stored)
        if hasattr(original, "save_assets"):  # as Keras asks: the base class has none
            with tempfile.TemporaryDirectory() as folder:
                original.save_assets(folder)
                layer.load_assets(folder)
    except Exception as error:
        raise ValueError(
            "inplace=False: expected layers whose state can be written and read. Received: "
            f"{type(original).__name__} {original.name!r}, which cannot "
            f"({type(error).__name__}: {error}). Use inplace=True."
        ) from error


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


def _compile_like(
    copy: keras.Model, model: keras.Model, pairs: Sequence[tuple[keras.Variable, keras.Variable]]
) -> None:
    if not getattr(model, "compiled", False) or copy.compiled:
        return  # a KerasHub task compiles itself, and its settings cannot be read back
    try:
        copy.compile_from_config(model.get_compile_config())
    except Exception as error:
        warn(
            f"The copy was not compiled, since the compile settings could not be read back "
            f"({error}). Compile it."
        )
        return
    replaced = {id(original): variable for original, variable in pairs}
    parts = zip(parts_of(model.optimizer), parts_of(copy.optimizer), strict=True)
    for old, new in parts if model.optimizer is not None else ():
        carry_exclusions(old, new, [original for original, _ in pairs], replaced)
