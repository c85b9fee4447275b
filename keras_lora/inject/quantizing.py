"""Quantized layers and adapters: quantizing under adapters, and merging into what is quantized.

Private Keras API in this file, and why (`tests/test_private_quantizing.py` watches):
    `should_quantize_layer`, `_check_quantize_args`: which layers `model.quantize` changes, and
        whether it can, asked before it changes any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_lora.checks import invalid, warn
from keras_lora.distribution import strategy_scope
from keras_lora.inject.compiled import changing
from keras_lora.inject.gradients import settle_gradients
from keras_lora.inject.turns import turn
from keras_lora.layers import (
    AdapterBank,
    Drift,
    LoRALayer,
    all_owned,
    attach,
    dequantize,
    detach,
    requantize,
    sites_of,
)
from keras_lora.walker import Layer, Tree

_UNDER_ADAPTERS = ("int8", "int4")
FORMS = ("dequantize", "requantize")


def guard_quantizer() -> None:
    """Let `model.quantize` work under adapters; called once, when this package is imported."""
    plain = keras.Model.quantize
    setattr(keras.Model, "quantize", _under_adapters(plain))  # noqa: B010


def _under_adapters(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def quantize(
        model: Any, mode: Any = None, config: Any = None, filters: Any = None, **options: Any
    ) -> None:
        if not Tree.of(model).adapted:
            plain(model, mode, config, filters, **options)
            return
        with turn(model, "quantize") as tree:
            chosen = _quantizable(tree, mode or getattr(config, "mode", config), filters)
            with changing(tree, tree.adapted), strategy_scope(tree):
                states = [(layer, detach(layer)) for layer in tree.adapted]
                try:
                    plain(model, mode, config, lambda x: id(x) in chosen, **options)
                finally:
                    for layer, state in states:
                        attach(layer, state)
                for bank in tree.banks:
                    bank.measure()
                settle_gradients(tree)

    return quantize


def _quantizable(tree: Tree, mode: Any, filters: Any) -> set[int]:
    """The ids of the layers to quantize: all that the filters choose, without heads that train.

    Raises:
        ValueError: a mode that replaces weights by what it measures, or a layer that cannot be
            quantized.
    """
    if mode not in _UNDER_ADAPTERS:
        raise invalid(
            "mode",
            f"one of {_UNDER_ADAPTERS} for a model with adapters",
            mode,
            "merge first: merge_lora(model), or quantize the base and call apply_lora then",
        )
    chooses = keras.Model.quantize.__wrapped__.__globals__["should_quantize_layer"]
    layers = [x for x in tree.layers if not tree.children[id(x)] and chooses(x, filters)]
    full = {id(item.variable) for item in all_owned(tree.root.variables)}
    heads = [x for x in layers if any(id(s.matrix) in full for s in _sites(x))]
    if heads:
        warn(
            f"Left in floating point, since they train in full: {[x.name for x in heads]}. "
            "Merge before quantizing, to quantize them too."
        )
    left = {id(x) for x in heads}
    for layer in layers:
        if _sites(layer) and id(layer) not in left:
            layer._check_quantize_args(mode, layer.compute_dtype)
    return {id(x) for x in layers} - left


def _sites(layer: Layer) -> Sequence[Any]:
    sites = sites_of(layer).values() if layer.built else ()
    return [site for site in sites if site.kind.quantizes]


def is_merged_apart(bank: AdapterBank) -> bool:
    """Whether merging has to say what becomes of integers."""
    return bank.site.is_quantized and bool(bank.active)


def check_form(tree: Tree, quantized: str | None) -> None:
    """
    Raises:
        ValueError: an unknown form; none, though adapters act on quantized layers.
    """
    if quantized not in (*FORMS, None):
        raise invalid("quantized", f"one of {FORMS}, or None", quantized)
    paths = [path for path, bank in tree.banks_by_path.items() if is_merged_apart(bank)]
    if paths and quantized is None:
        raise invalid(
            "quantized",
            f"what is to become of the quantized layers {paths[:5]}"
            f"{' and others' if len(paths) > 5 else ''}, whose integers cannot take the adapters "
            "exactly",
            None,
            'merge_lora(model, quantized="dequantize") gives layers in floating point that '
            'compute W0 + s A B exactly, and "requantize" the same mode again, rounded anew, '
            "with the drift of each layer",
        )


def merged_layers(tree: Tree, quantized: str | None) -> Iterator[tuple[str, Drift | None]]:
    """Fold the adapters of every layer and take them out; gives what rounding anew changed."""
    for path, layer in tree.adapted_by_path.items():
        if any(map(is_merged_apart, layer.banks.values())):
            weight = ops.stop_gradient(layer.kernel)
            detach(layer)
            yield path, converted(tree, layer, weight, quantized)
        else:
            _fold(layer)


def converted(tree: Tree, layer: Any, weight: Any, quantized: str | None) -> Drift | None:
    """Give a plain quantized layer another weight, in floating point or rounded anew."""
    with strategy_scope(tree):
        if quantized == "requantize":
            return requantize(layer, weight)
        dequantize(layer, weight)
        return None


def _fold(layer: LoRALayer) -> None:
    for bank in layer.banks.values():
        if bank.active:
            bank.fold()
    detach(layer)


def told(drifts: dict[str, Drift]) -> str:
    """The drift of each layer as text."""
    lines = [f"{p}: {d.largest:.2g}, {100 * d.relative:.2g}%" for p, d in drifts.items()]
    return (
        "The merged weights were rounded to integers anew. The largest change of a weight, and the "
        f"change relative to the norm of the weights, of each layer: {'; '.join(lines)}."
    )
