"""Taking adapters out of a model again: folded into the kernels, or dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import keras
import numpy as np
from keras import ops

from keras_lora.checks import warn
from keras_lora.inject.cloning import plain_copy
from keras_lora.inject.compiled import around, changing, refresh
from keras_lora.inject.freezing import freeze, thaw
from keras_lora.inject.leaving import leaving
from keras_lora.inject.quantizing import (
    check_form,
    converted,
    is_merged_apart,
    merged_layers,
    told,
)
from keras_lora.inject.saving import prepare_saving
from keras_lora.inject.showing import name_none
from keras_lora.inject.switching import (
    activate,
    active_names,
    adapted,
    adapter_names,
    check_adapted,
)
from keras_lora.inject.trial import check_readers
from keras_lora.inject.turns import CHOOSING, context, turn
from keras_lora.layers import Drift, attach, detach, sites_of
from keras_lora.rates import remove_rates, without_rates
from keras_lora.walker import Tree


def merge_lora(
    model: keras.Model,
    inplace: bool = True,
    quantized: str | None = None,
    drift: dict[str, Drift] | None = None,
) -> keras.Model:
    """Fold the active adapters into the kernels and return a plain Keras model.

        W = W0 + sum_i s_i A_i B_i        summed in float32 or wider, rounded once to W0's dtype

    An adapter with DoRA adds `m_i (W0 + s_i A_i B_i) / |W0 + s_i A_i B_i| - W0` instead.

    No class, variable or config of keras_lora is left: the model saves, loads and exports without
    this package. Every trainable flag is what it was before `apply_lora`, in models around this one
    too; what a model shares with another that still has adapters stays frozen until they go.
    Adapters that are not active are dropped, with a warning that names them. To merge a copy needs
    no warning: `model` keeps them.

    A quantized layer cannot take `s A B` into its integers exactly, so `quantized` says what is
    wanted. Layers on which no adapter acts stay as they are.

    Args:
        model: An adapted model.
        inplace: False leaves the adapted model as it is and returns a merged copy.
        quantized: For adapted layers that are quantized: `"dequantize"` for layers in floating
            point with the weight `W`, where `W0` is what the integers stand for (their product
            rounds the inputs no more, as that of `int8` does); `"requantize"` for the same mode
            again, `W` being rounded anew.
        drift: With `"requantize"`: a dictionary that gets the `Drift` of each layer by path,
            instead of a warning with them.

    Returns:
        The plain model: `model` itself, or the copy.

    Raises:
        ValueError: no adapters, none that is active, a kernel that is not finite after merging,
            a matrix that another layer reads as a variable, or quantized layers and no
            `quantized`. The model is then as it was.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> type(kl.merge_lora(model).get_layer("up")).__name__
    'Dense'

    Reference: Hu et al. 2021, section 4.1, "No Additional Inference Latency".
    """
    with turn(model, "merge_lora", () if inplace else CHOOSING) as tree:
        _mergeable(tree, quantized)
        merged, drifts = (_merge if inplace else _merged_copy)(tree, quantized)
    if drift is not None:
        drift.update(drifts)
    elif drifts:
        warn(told(drifts))
    return merged


def _merge(tree: Tree, quantized: str | None) -> tuple[keras.Model, dict[str, Drift]]:
    dropped = sorted({*adapter_names(tree)} - {*active_names(tree)})
    if dropped:
        warn(f"Merging drops the adapters that are not active: {dropped}.")
    with changing(tree, tree.adapted), leaving(tree, merged=True) as plain:
        drifts = {p: drift for p, drift in merged_layers(tree, quantized) if drift is not None}
    remove_rates(plain)
    return tree.root, drifts


def unload_lora(model: keras.Model) -> keras.Model:
    """Drop every adapter: the base again, bit for bit, with its trainable flags.

    Layers of `layers_to_save` and biases that were trained have the base's values again: the
    trained values belong to the adapter, and are dropped with it.

    Args:
        model: An adapted model.

    Returns:
        `model`, plain.

    Raises:
        ValueError: the model has no adapters.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> len(kl.unload_lora(model).weights)
    2
    """
    with turn(model, "unload_lora") as tree:
        unload(tree)
    return model


def unload(tree: Tree) -> None:
    """`unload_lora` for a model whose tree is known."""
    check_adapted(tree)
    with changing(tree, tree.adapted), leaving(tree) as plain:
        activate(tree, [])
        _strip(tree)
    remove_rates(plain)


@contextlib.contextmanager
def merged(model: keras.Model) -> Iterator[keras.Model]:
    """Within the context the model is merged and plain; afterwards it is as it was, bit for bit.

    The kernels are kept aside meanwhile, so the context costs their size in memory. The
    optimizer is kept too: save, evaluate or export inside, and train outside. No verb of this
    package may adapt, switch or merge the model inside; other threads that call one wait for the
    end of the context.

    Args:
        model: An adapted model.

    Yields:
        The same model, plain.

    Raises:
        ValueError: as `merge_lora`.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> with kl.merged(model) as plain:
    ...     len(plain.weights)
    2
    >>> [v.name for v in model.trainable_weights]
    ['lora_a', 'lora_b']
    """
    with turn(model, "merged", CHOOSING) as tree:
        _mergeable(tree, None)
        with context(tree, "merged"), _folded(tree):
            yield model


@contextlib.contextmanager
def _folded(tree: Tree) -> Iterator[None]:
    """Within the context every kernel is merged, and the layers are plain."""
    layers, banks = tree.adapted, tree.banks
    models = around(tree, layers)
    trainable = list(tree.root.trainable_variables)
    with contextlib.ExitStack() as stack:  # which goes on where one step fails
        stack.callback(refresh, models)
        stack.callback(_close, tree.root, trainable)
        stack.enter_context(without_rates(models))
        for bank in [bank for bank in banks if bank.active]:
            # A copy: on torch the array would share the memory of the variable.
            kernel = np.array(ops.convert_to_numpy(bank.site.matrix), copy=True)
            stack.callback(bank.assign_base, kernel)
            bank.fold()
        for layer in layers:
            stack.callback(attach, layer, detach(layer))
        thaw(tree)
        name_none(tree)
        refresh(models)
        yield


def _close(model: keras.Model, trainable: Iterable[keras.Variable]) -> None:
    tree = Tree.of(model)  # anew: the model may have changed within the context
    freeze(tree, trainable)
    prepare_saving(tree)


def _merged_copy(tree: Tree, quantized: str | None) -> tuple[keras.Model, dict[str, Drift]]:
    with without_rates([tree.root]):
        copy: keras.Model = plain_copy(tree)
    twins = dict(zip(map(id, tree.layers), Tree.of(copy).layers, strict=True))
    drifts = {}
    for path, layer in tree.adapted_by_path.items():
        twin = twins[id(layer)]
        for name, bank in layer.banks.items():
            weight = ops.stop_gradient(bank.kernel) if bank.active else None
            if is_merged_apart(bank):
                drifts[path] = converted(tree, twin, weight, quantized)
            elif bank.active:
                sites_of(twin)[name].matrix.assign(weight)
    return copy, {path: drift for path, drift in drifts.items() if drift is not None}


def _strip(tree: Tree) -> None:
    for layer in tree.adapted:
        detach(layer)


def _mergeable(tree: Tree, quantized: str | None) -> None:
    """Refuse what cannot be merged; every kernel is to be finite then."""
    banks = adapted(tree)
    if not active_names(tree):
        raise ValueError(
            "Expected at least one active adapter to merge. Received: a model whose adapters are "
            "all inactive. Activate one with set_adapter, or drop them with unload_lora."
        )
    check_form(tree, quantized)
    check_readers(tree, [bank.site for bank in banks.values()])
    # Each kernel is computed here and again for its assignment: to keep all doubles the memory.
    broken = [p for p, x in banks.items() if not bool(ops.all(ops.isfinite(x.kernel)))]
    if broken:
        raise ValueError(
            f"Expected finite kernels after merging. Received: NaN or infinity in {broken}, from "
            "adapter weights (or base weights) that are not finite, or from a delta too large "
            "for the dtype of the base. Train again, or drop the adapters: unload_lora(model)."
        )
