"""Adapters of a KerasHub backbone, from and to its `.lora.h5` files.

KerasHub gives the layers of a backbone numbers, and no names, in these files (`kerashub_h5`);
and Keras factors each kernel in its own way (`per_axis`). Here both meet a model.

Private Keras API in this file, and why:
    `_flatten_layers`: KerasHub numbers the layers of a backbone in its order.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_lora.checks import check_rank, invalid, warn
from keras_lora.config import AdapterSpec
from keras_lora.exchange.keras_hub.h5 import (
    file_error,
    read_keras_hub_lora,
    write_keras_hub_arrays,
)
from keras_lora.files.adapter_files import PathLike
from keras_lora.inject import (
    active_names,
    check_names,
    check_no_dora,
    install,
    plan_factors,
    plan_layers,
)
from keras_lora.layers import (
    DEFAULT_ADAPTER,
    Adapter,
    is_table,
    kernel_shape,
    lora_class_for,
    plain_class,
    split_kernel,
)
from keras_lora.lowrank.combining import truncate
from keras_lora.lowrank.equations import Shape
from keras_lora.lowrank.per_axis import Pair, from_per_axis, to_per_axis
from keras_lora.walker import Node, Tree, backbone_of, walk


@dataclass(frozen=True)
class ConvertedLayer:
    """How a layer's factors came out of a KerasHub file.

    `error` is `|dW - dW_file| / |dW_file|` (Frobenius): 0 where nothing was truncated.
    """

    path: str
    file_rank: int
    rank: int
    error: float


def load_keras_hub_lora(
    model: keras.Model,
    path: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    rank: int | None = None,
    skip_unsupported: bool = False,
) -> list[ConvertedLayer]:
    """Add an adapter from a file of KerasHub's `backbone.save_lora_weights`.

    Keras factors the last axis of a kernel only, so that a query kernel `(d, n, h)` has a factor
    for each of `n` heads: its delta has the rank `n r`, or `min(d, n h)` if that is less. The
    conversion is exact at that rank.

    It acts at once where no other adapter does, and else waits for `set_adapter`.

    Args:
        model: The backbone, or a model that holds it, without Keras's own LoRA enabled.
        path: A file whose name ends in `.lora.h5`.
        name: The adapter's name.
        rank: Truncate to this rank, to the best approximation there is (SVD).
        skip_unsupported: Leave out, with a warning, layers that cannot be adapted here.

    Returns:
        The rank in the file, the rank here and the error of each layer.

    Raises:
        ValueError: a name that is taken, or a rank that is not a positive integer.
        AdapterFileError: the file is not such a file, or not one of this model.

    Example:

    >>> import tempfile, keras_hub, keras_lora as kl
    >>> def backbone():
    ...     return keras_hub.models.GPT2Backbone(
    ...         vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ...     )
    >>> saved = backbone()
    >>> saved.enable_lora(rank=1)
    >>> file = f"{tempfile.mkdtemp()}/x.lora.h5"
    >>> saved.save_lora_weights(file)
    >>> [(layer.file_rank, layer.rank) for layer in kl.load_keras_hub_lora(backbone(), file)]
    [(1, 2), (1, 2)]
    """
    if rank is not None:
        check_rank(rank)
    exact = keras_hub_factors(model, path, skip_unsupported=skip_unsupported)
    nodes = {node.path: node for node in walk(model)}
    file_ranks = _file_ranks(model, path)
    factors, report = {}, []
    for layer_path, pair in exact.items():
        a, b, error = _at_rank(nodes[layer_path], pair, rank)
        factors[layer_path] = AdapterSpec(rank=a.shape[-1], alpha=a.shape[-1]), a, b
        report.append(ConvertedLayer(layer_path, file_ranks[layer_path], a.shape[-1], error))
    tree = Tree.of(model)
    plan = plan_factors(tree, name, Adapter(None), plan_layers(tree, factors))
    install(tree, plan, active=not active_names(tree))
    return report


def save_keras_hub_lora(
    model: keras.Model,
    path: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    target_layer_names: Sequence[str] | None = None,
) -> int:
    """Write an adapter for KerasHub's `backbone.load_lora_weights`: see `write_keras_hub_lora`.

    Args:
        model: An adapted backbone, or a model that holds one.
        path: A file name that ends in `.lora.h5`. A file of that name is replaced.
        name: The adapter.
        target_layer_names: As in `backbone.enable_lora`; the backbone's own names by default.

    Returns:
        The rank of the file.

    Raises:
        ValueError: no such adapter, or what such a file cannot hold, layer by layer.
        AdapterFileError: the file cannot be written.
    """
    tree = Tree.of(model)
    (name,) = check_names(tree, [name])
    check_no_dora(tree, [name], "Save it with save_adapter or save_peft_adapter")
    factors = {
        layer_path: (adapter.scaling * np.array(adapter.a, "float64"), np.array(adapter.b))
        for layer_path, layer in tree.adapted_by_path.items()
        for adapter in [layer.adapters.get(name)]
        if adapter is not None
    }
    return write_keras_hub_lora(path, model, factors, target_layer_names=target_layer_names)


def _file_ranks(model: keras.Model, path: PathLike) -> dict[str, int]:
    pairs, layers = read_keras_hub_lora(path), keras_hub_layers(model)
    return {layers[i].path: len(b) for i, (_, b) in pairs.items()}


def _at_rank(node: Node, pair: Pair, rank: int | None) -> tuple[np.ndarray, np.ndarray, float]:
    a, b = pair
    if rank is None or a.shape[-1] <= rank:
        return a, b, 0.0
    split, shape = split_kernel(node.layer), kernel_shape(node.layer)
    kept = truncate(*split.matrices(a, b, shape), rank)
    return *split.factors(kept.a, kept.b, shape), kept.relative_error


def keras_hub_layers(model: keras.layers.Layer) -> dict[int, Node]:
    """The layers of a model's KerasHub backbone, by the number that KerasHub gives them.

    Args:
        model: A backbone, a task, or any model that holds one backbone. The nodes' paths are
            from this model on.

    Raises:
        ValueError: there is no backbone, or more than one.
    """
    nodes = {id(node.layer): node for node in walk(model)}
    layers = backbone_of(model)._flatten_layers(include_self=False)
    return {i: nodes[id(v)] for i, v in enumerate(v for v in layers if v.weights)}


def keras_hub_factors(
    model: keras.layers.Layer, path: PathLike, *, skip_unsupported: bool = False
) -> dict[str, Pair]:
    """Read a file of `backbone.save_lora_weights` as factors for the layers of a model.

    Args:
        model: The backbone, or a model that holds it.
        path: A file whose name ends in `.lora.h5`.
        skip_unsupported: Leave out, with a warning, layers that cannot be adapted here, such as
            a convolution.

    Returns:
        `{path of the layer: (A, B)}` in float64, at scale 1: the delta is `A B`.

    Raises:
        AdapterFileError: the file is not such a file, or not one of this model.

    Example:

    >>> import tempfile, keras_hub
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> backbone.enable_lora(rank=1)
    >>> file = f"{tempfile.mkdtemp()}/x.lora.h5"
    >>> backbone.save_lora_weights(file)
    >>> for path, (a, b) in keras_hub_factors(backbone, file).items():
    ...     print(path, a.shape, b.shape)
    transformer_layer_0/self_attention/value (6, 2) (2, 2, 3)
    transformer_layer_0/self_attention/query (6, 2) (2, 2, 3)
    """
    pairs = read_keras_hub_lora(path)
    nodes = match_keras_hub_layers(model, pairs, path, skip_unsupported=skip_unsupported)
    return {n.path: from_per_axis(split_kernel(n.layer), *pairs[i]) for i, n in nodes.items()}


def match_keras_hub_layers(
    model: keras.layers.Layer,
    pairs: Mapping[int, Pair],
    source: PathLike,
    *,
    skip_unsupported: bool = False,
) -> dict[int, Node]:
    """The layer of a model that each number of a file stands for, after checking that it fits.

    A file has no names, so one of another model could fit by chance. But KerasHub enables all
    layers of a name, or none: a file that has some of them only is of another model.

    Raises:
        AdapterFileError: every way in which file and model differ.
    """
    layers = keras_hub_layers(model)
    named = {i: layers[i] for i in pairs if i in layers}
    supported = {i: n for i, n in named.items() if _is_supported(n.layer)}
    skipped = [
        f"lora/{i} ('{n.path}')"
        for i, n in named.items()
        if i not in supported and np.tensordot(*pairs[i], 1).any()
    ]
    problems = _not_as_enabled(layers, pairs)
    problems += [p for i, n in supported.items() if (p := _misfit(i, n, pairs[i]))]
    if not skip_unsupported:
        hint = "skip_unsupported=True leaves it out"
        problems += [f"{s}, which cannot be adapted here ({hint})" for s in skipped]
    if problems:
        fix = "build the backbone that the file was saved from"
        raise file_error(source, "factors for layers of this model", problems, fix)
    if skipped:
        warn(f"{os.fspath(source)}: left out {', '.join(skipped)}")
    return supported


def _not_as_enabled(layers: Mapping[int, Node], numbers: Collection[int]) -> list[str]:
    """Where the numbers of a file are not those of all layers of some names."""
    expected = _enabled(layers, {layers[i].layer.name for i in numbers if i in layers})
    beyond = [f"lora/{i}, of {len(layers)} layers with weights" for i in numbers if i not in layers]
    surplus = [
        f"lora/{i} ('{layers[i].path}'), a layer without LoRA in Keras"
        for i in numbers
        if i in layers and i not in expected
    ]
    missing = [
        f"nothing for lora/{i} ('{node.path}'), but for others called {node.layer.name!r}"
        for i, node in expected.items()
        if i not in numbers
    ]
    return beyond + surplus + missing


def _misfit(i: int, node: Node, pair: Pair) -> str | None:
    a, b = pair
    shape, rank = kernel_shape(node.layer), len(b)
    if (*a.shape[:-1], b.shape[-1]) == shape:
        return None
    return (
        f"lora/{i} ('{node.path}') of shapes {a.shape} and {b.shape}, not "
        f"{(*shape[:-1], rank)} and {(rank, shape[-1])}"
    )


def _is_supported(layer: keras.layers.Layer) -> bool:
    # KerasHub neither writes the factors of an embedding nor reads them.
    if lora_class_for(plain_class(layer)) is None or is_table(layer):
        return False
    try:
        split_kernel(layer)
    except ValueError:  # a diagonal
        return False
    return True


def _enabled(layers: Mapping[int, Node], names: Collection[str]) -> dict[int, Node]:
    """What `backbone.enable_lora(rank, target_layer_names=names)` enables, by its own test."""
    return {
        i: node
        for i, node in layers.items()
        if node.layer.name in names and hasattr(node.layer, "enable_lora")
    }


def write_keras_hub_lora(
    path: PathLike,
    model: keras.layers.Layer,
    factors: Mapping[str, Pair],
    *,
    rank: int | None = None,
    target_layer_names: Sequence[str] | None = None,
) -> int:
    """Write factors so that `backbone.load_lora_weights(path)` of KerasHub reads them.

    KerasHub enables every layer whose name is among `target_layer_names`, all with one rank, and
    demands each of them of the file: a layer without factors is written as zeros, and lower
    ranks are filled up with zeros, which load exactly and do not train further.

    A kernel of several free axes needs more rank there than here: factors of rank `R` of
    `btd,dnh->btnh` need `min(n R, h, d n)` in general. See `to_per_axis`.

    Args:
        path: A file name that ends in `.lora.h5`. A file of that name is replaced.
        model: The backbone, or a model that holds it.
        factors: `{path of the layer: (A, B)}`; the delta is `A B`, the scale being folded in.
        rank: The rank that the file is to have; by default the least that all layers need.
        target_layer_names: As in `backbone.enable_lora`, which has then to be called with the
            same names and the rank of the file before loading. By default the backbone's own
            `default_lora_layer_names()`, and loading enables them itself.

    Returns:
        The rank of the file.

    Raises:
        ValueError: everything that such a file cannot hold, layer by layer; nothing is written.
        AdapterFileError: the file cannot be written.
    """
    names = target_layer_names or backbone_of(model).default_lora_layer_names()
    layers = keras_hub_layers(model)
    enabled = _enabled(layers, set(names))
    _check_writable(layers, enabled, factors, names)
    pairs = {
        i: to_per_axis(split_kernel(n.layer), kernel_shape(n.layer), *factors[n.path])
        for i, n in enabled.items()
        if n.path in factors
    }
    rank = _file_rank(rank, max(len(b) for _, b in pairs.values()))
    shapes = {i: kernel_shape(node.layer) for i, node in enabled.items()}
    padded = {i: _padded(pairs.get(i), shape, rank) for i, shape in shapes.items()}
    write_keras_hub_arrays(path, rank, padded)
    return rank


def _check_writable(
    layers: Mapping[int, Node],
    enabled: Mapping[int, Node],
    factors: Mapping[str, Pair],
    names: Collection[str],
) -> None:
    nodes = {node.path: node for node in enabled.values()}
    asked = nodes.keys() | factors.keys()
    tables = [n.path for n in layers.values() if is_table(n.layer) and n.path in asked]
    problems = [
        f"'{path}' is an embedding, whose factors KerasHub neither writes nor reads"
        for path in tables
    ]
    problems += [
        p
        for path, pair in factors.items()
        if path not in tables and (p := _unwritable(nodes.get(path), path, pair))
    ]
    if problems or not factors:
        raise ValueError(
            "Expected factors of layers of the backbone that "
            f"enable_lora(target_layer_names={list(names)}) reaches. Received: "
            f"{'; '.join(problems) or 'none'}. Give `target_layer_names` the names of the layers, "
            "or leave layers out."
        )


def _unwritable(node: Node | None, path: str, pair: Pair) -> str | None:
    if node is None:
        return f"'{path}', which it does not reach"
    if not _is_supported(node.layer):
        return f"'{path}', which cannot be adapted here"
    a, b = pair
    rank = a.shape[-1] if a.ndim and a.size else 1
    expected = split_kernel(node.layer).factor_shapes(kernel_shape(node.layer), rank)
    if (a.shape, b.shape) != expected:
        return f"'{path}' of shapes {a.shape} and {b.shape}, not {expected[0]} and {expected[1]}"
    if not all((abs(x) <= np.finfo("float32").max).all() for x in pair):
        return f"'{path}' of values that are not finite in float32"
    return None


def _file_rank(rank: int | None, needed: int) -> int:
    if rank is None:
        return needed
    check_rank(rank)
    if rank < needed:
        expected = f"{needed} or more, which these factors need"
        raise invalid("rank", expected, rank, "truncate the factors, or leave it out")
    return rank


def _padded(pair: Pair | None, shape: Shape, rank: int) -> Pair:
    a, b = np.zeros((*shape[:-1], rank)), np.zeros((rank, shape[-1]))
    if pair is not None:
        a[..., : len(pair[1])], b[: len(pair[1])] = pair
    return a, b
