"""Adapters of a KerasHub backbone, from and to its `.lora.h5` files.

KerasHub gives the layers of a backbone numbers, and no names, in these files (`numbering`), and
Keras factors each kernel in its own way (`per_axis`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import keras
import numpy as np

from keras_lora.checks import check_rank, invalid, warn
from keras_lora.config import AdapterSpec
from keras_lora.exchange.keras_hub.converted import ConvertedLayer
from keras_lora.exchange.keras_hub.h5 import read_keras_hub_lora, write_keras_hub_arrays
from keras_lora.exchange.keras_hub.numbering import (
    enabled_layers,
    is_exchanged,
    keras_hub_layers,
    match_keras_hub_layers,
    matrix_shape,
)
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import PathLike
from keras_lora.files.keys import values_beside
from keras_lora.inject import (
    CHOOSING,
    active_names,
    check_names,
    check_no_dora,
    install,
    plan_factors,
    plan_layers,
    turn,
)
from keras_lora.layers import DEFAULT_ADAPTER, Adapter, LayerAdapter, family_of, site_of
from keras_lora.lowrank.decomposing import truncate
from keras_lora.lowrank.equations import Shape
from keras_lora.lowrank.per_axis import Pair, from_per_axis, to_per_axis
from keras_lora.walker import Node, Tree, backbone_of


def load_keras_hub_lora(
    model: keras.Model,
    path: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    rank: int | None = None,
    skip_unsupported: bool = False,
) -> list[ConvertedLayer]:
    """Add an adapter from a file of KerasHub's `backbone.save_lora_weights`.

    Keras factors only the last axis of a kernel, so that a query kernel `(d, n, h)` has a factor
    for each of `n` heads: its delta has the rank `n r`, or `min(d, n h)` if that is less. The
    conversion is exact at that rank.

    If no other adapter is active, this one is active at once. Otherwise activate it with
    `set_adapter`.

    Args:
        model: The backbone, or a model that has it inside, without Keras's own LoRA enabled.
        path: A file whose name ends in `.lora.h5`.
        name: The adapter's name in the model.
        rank: Truncate each layer to this rank at most, by SVD: the best approximation.
        skip_unsupported: Leave out, with a warning, layers that this package cannot adapt.

    Returns:
        For each layer the rank in the file, the rank in the model and the error.

    Raises:
        ValueError: a name that is taken, or a rank that is not a positive integer.
        AdapterFileError: the file is damaged or of another kind, or does not fit this model.

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

    Reference:
        `Backbone.save_lora_weights` in `keras_hub/src/models/backbone.py` of KerasHub 0.32.
    """
    if rank is not None:
        check_rank(rank)
    with turn(model, "load_keras_hub_lora") as tree:
        exact = keras_hub_factors(model, path, skip_unsupported=skip_unsupported)
        nodes = {node.path: node for node in tree.nodes}
        file_ranks = _file_ranks(model, path)
        factors, report = {}, []
        for layer_path, pair in exact.items():
            a, b, error = _at_rank(nodes[layer_path], pair, rank)
            factors[layer_path] = AdapterSpec(rank=a.shape[-1], alpha=a.shape[-1]), a, b
            report.append(ConvertedLayer(layer_path, file_ranks[layer_path], a.shape[-1], error))
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

    Such a file has factors alone: a warning names the heads and biases that trained beside them.

    Args:
        model: An adapted backbone, or a model that has one inside.
        path: A file name that ends in `.lora.h5`. A file of that name is replaced.
        name: The adapter, active or not.
        target_layer_names: As in `backbone.enable_lora`; the backbone's own names by default.

    Returns:
        The rank of the file.

    Raises:
        ValueError: no adapter of that name, or an adapter that such a file cannot express: the
            reasons are listed, layer by layer.
        AdapterFileError: the file cannot be written.

    Example:

    >>> import tempfile, keras_hub, keras_lora as kl
    >>> backbone = keras_hub.models.GPT2Backbone(
    ...     vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    ... )
    >>> config = kl.LoRAConfig(rank=1, targets=["query", "value"])
    >>> save_keras_hub_lora(kl.apply_lora(backbone, config), f"{tempfile.mkdtemp()}/x.lora.h5")
    1

    Reference:
        `Backbone.load_lora_weights` in `keras_hub/src/models/backbone.py` of KerasHub 0.32.
    """
    with turn(model, "save_keras_hub_lora", CHOOSING) as tree:
        (name,) = check_names(tree, [name])
        check_no_dora(tree, [name], "Save it with save_adapter or save_peft_adapter")
        _warn_of_values(tree, name)
        factors = {
            layer_path: (adapter.scaling * np.array(adapter.a, "float64"), np.array(adapter.b))
            for layer_path, bank in tree.banks_by_path.items()
            if name in bank.adapters and bank.adapters[name].spec.rank
            for adapter in [bank.ordinary(name)]
        }
    return write_keras_hub_lora(path, model, factors, target_layer_names=target_layer_names)


def _warn_of_values(tree: Tree, name: str) -> None:
    left_out = [tree.variable_keys[id(variable)] for variable, _ in values_beside(tree, name)]
    rows = [p for p, x in tree.banks_by_path.items() if _has_rows(x.adapters.get(name))]
    left_out += [f"{path}/lora_tokens" for path in rows]
    if left_out:
        warn(
            f"A `.lora.h5` file has factors alone. What trained beside {name!r} is left out: "
            f"{left_out}. Save it with save_adapter or save_peft_adapter too."
        )


def _has_rows(adapter: LayerAdapter | None) -> bool:
    return adapter is not None and adapter.tokens is not None


def _file_ranks(model: keras.Model, path: PathLike) -> dict[str, int]:
    pairs, layers = read_keras_hub_lora(path), keras_hub_layers(model)
    return {layers[i].path: len(b) for i, (_, b) in pairs.items()}


def _at_rank(node: Node, pair: Pair, rank: int | None) -> tuple[np.ndarray, np.ndarray, float]:
    a, b = pair
    if rank is None or a.shape[-1] <= rank:
        return a, b, 0.0
    split, shape = site_of(node.layer).split(), site_of(node.layer).shape
    kept = truncate(*split.matrices(a, b, shape), rank)
    return *split.factors(kept.a, kept.b, shape), kept.relative_error


def keras_hub_factors(
    model: keras.layers.Layer, path: PathLike, *, skip_unsupported: bool = False
) -> dict[str, Pair]:
    """Read a file of `backbone.save_lora_weights` as factors for the layers of a model.

    Args:
        model: The backbone, or a model that has it inside.
        path: A file whose name ends in `.lora.h5`.
        skip_unsupported: Leave out, with a warning, layers that this package cannot adapt, such
            as a convolution.

    Returns:
        `{path of the layer: (A, B)}` in float64, at scale 1: the delta is `A B`.

    Raises:
        AdapterFileError: the file is damaged or of another kind, or does not fit this model.

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
    return {n.path: from_per_axis(site_of(n.layer).split(), *pairs[i]) for i, n in nodes.items()}


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
    demands that the file has all these layers. So a layer without factors is written as zeros,
    and a lower rank is padded with zeros, which load exactly and do not train further.

    A kernel with several free axes needs a higher rank in Keras: factors of rank `R` of
    `btd,dnh->btnh` need `min(n R, h, d n)` in general. See `to_per_axis`.

    Args:
        path: A file name that ends in `.lora.h5`. A file of that name is replaced.
        model: The backbone, or a model that has it inside.
        factors: `{path of the layer: (A, B)}`. The delta is `A B`: a scale is part of `A` or `B`.
        rank: The rank of the file; by default the least rank that suffices for all layers.
        target_layer_names: The names to give to `backbone.enable_lora` before the file is
            loaded, with the rank of the file. By default the backbone's own
            `default_lora_layer_names()`, which KerasHub enables itself when it loads the file.

    Returns:
        The rank of the file.

    Raises:
        ValueError: everything that such a file cannot express, layer by layer. Nothing is
            written then.
        AdapterFileError: the file cannot be written.
    """
    names = target_layer_names or backbone_of(model).default_lora_layer_names()
    layers = keras_hub_layers(model)
    enabled = enabled_layers(layers, set(names))
    _check_writable(layers, enabled, factors, names)
    pairs = {
        i: to_per_axis(site_of(n.layer).split(), site_of(n.layer).shape, *factors[n.path])
        for i, n in enabled.items()
        if n.path in factors
    }
    rank = _file_rank(rank, max(len(b) for _, b in pairs.values()))
    shapes = {i: matrix_shape(node.layer) for i, node in enabled.items()}
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
    embeddings = [
        n.path for n in layers.values() if family_of(n.layer) == "embedding" and n.path in asked
    ]
    problems = Problems()
    reason = "an embedding, whose factors KerasHub neither writes nor reads"
    problems.add(*(f"'{path}' is {reason}" for path in embeddings))
    for path, pair in factors.items():
        if path not in embeddings:
            problems.add(*_unwritable(nodes.get(path), path, pair))
    if not factors and not problems:
        problems.add("none")
    problems.raise_any(
        lambda received: ValueError(
            "Expected factors of layers of the backbone that "
            f"enable_lora(target_layer_names={list(names)}) reaches. Received: {received}. Give "
            "`target_layer_names` the names of all layers with factors, or leave layers out."
        )
    )


def _unwritable(node: Node | None, path: str, pair: Pair) -> Iterator[str]:
    """Why the factors of a layer cannot be written."""
    if node is None:
        yield f"'{path}', which it does not reach"
        return
    if not is_exchanged(node.layer):
        yield f"'{path}', which cannot be adapted"
        return
    a, b = pair
    rank = a.shape[-1] if a.ndim and a.size else 1
    expected = site_of(node.layer).split().factor_shapes(site_of(node.layer).shape, rank)
    if (a.shape, b.shape) != expected:
        yield (
            f"'{path}' of shapes {a.shape} and {b.shape}, expected {expected[0]} and {expected[1]}"
        )
    elif not all((abs(x) <= np.finfo("float32").max).all() for x in pair):
        yield f"'{path}' of values that are not finite in float32"


def _file_rank(rank: int | None, needed: int) -> int:
    if rank is None:
        return needed
    check_rank(rank)
    if rank < needed:
        expected = f"{needed} or more, which these factors need"
        raise invalid("rank", expected, rank, "truncate the factors, or leave `rank` out")
    return rank


def _padded(pair: Pair | None, shape: Shape, rank: int) -> Pair:
    a, b = np.zeros((*shape[:-1], rank)), np.zeros((rank, shape[-1]))
    if pair is not None:
        a[..., : len(pair[1])], b[: len(pair[1])] = pair
    return a, b
