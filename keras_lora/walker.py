"""Finding layers in a model: a walk over its tree, and what a `targets` argument selects.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_flatten_layers`: the only way to the sublayers of a layer that is not a model.
    `_keras_history`, `_inbound_nodes`: the only way from a model's outputs back to the layer
        that made them.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras

from keras_lora.config import Targets, invalid
from keras_lora.layers import (
    LoRALayer,
    check_adaptable,
    is_table,
    kernel_shape,
    lora_class_for,
    plain_class,
    split_kernel,
    supported_base,
)

Layer: TypeAlias = "keras.layers.Layer"

_KINDS = "Dense, EinsumDense, Embedding or ReversibleEmbedding"


@dataclass(frozen=True)
class Node:
    """A layer in the tree of a model.

    `path` joins the layers' names from below the root. `stable_path` is what it would be in the
    first model of a process: Keras numbers the layers that are given no name, over all models.
    """

    path: str
    layer: Layer
    parent: Layer
    stable_path: str


@dataclass(frozen=True)
class Target:
    """A layer that can be adapted.

    Attributes:
        path: Its place in the model, the names of the layers joined by `/`. A second sibling of
            the same name is `name#2`.
        layer: The layer itself.
        kind: The Keras class that it is adapted as: `"Dense"`, `"EinsumDense"`, `"Embedding"` or
            `"ReversibleEmbedding"`, or one of `register_lora_class`.
        kernel_shape: Shape of its kernel; of an embedding `(vocabulary, dim)`.
        parent_class: Class name of the layer that holds it.
    """

    path: str
    layer: Layer
    kind: str
    kernel_shape: tuple[int, ...]
    parent_class: str


def walk(model: Layer) -> Iterator[Node]:
    """Every layer below `model`, parents first, each object once: at the first path to it."""
    yield from _walk(model, "", "", {id(model)})


def _walk(parent: Layer, prefix: str, stable_prefix: str, seen: set[int]) -> Iterator[Node]:
    names: Counter[str] = Counter()
    stable_names: Counter[str] = Counter()
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        path = prefix + numbered(layer.name, names)
        stable = stable_prefix + numbered(_unnumbered(layer), stable_names)
        yield Node(path, layer, parent, stable)
        yield from _walk(layer, f"{path}/", f"{stable}/", seen)


def parts(model: Layer) -> list[Layer]:
    """A model and every layer below, in the order of `walk`: without paths, which cost the most."""
    found: dict[int, Layer] = {id(model): model}
    _gather(model, found)
    return list(found.values())


def _gather(parent: Layer, found: dict[int, Layer]) -> None:
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        if id(layer) not in found:
            found[id(layer)] = layer
            _gather(layer, found)


def numbered(name: str, seen: Counter[str]) -> str:
    """`name`, and for further ones of that name `name#2`, `name#3`..."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _unnumbered(layer: Layer) -> str:
    """The layer's name, without the number where Keras made the name from the class."""
    given = re.sub(r"([a-z])([A-Z])", r"\1_\2", type(layer).__name__)
    given = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", given)
    snake = re.sub("_+", "_", given).lower()
    return snake if re.fullmatch(rf"{re.escape(snake)}_\d+", layer.name) else str(layer.name)


def lora_layers(model: Layer) -> dict[str, LoRALayer]:
    """The adapted layers of a model, by path.

    Args:
        model: A model or a layer, adapted or not.

    Returns:
        `{path: layer}`, empty where nothing is adapted.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> kl.lora_layers(model)
    {}
    """
    found = {n.path: n.layer for n in walk(model) if isinstance(n.layer, LoRALayer)}
    return {model.name: model} | found if isinstance(model, LoRALayer) else found


def find_targets(
    model: Layer, targets: Targets = "all-linear", exclude: Sequence[str] = ()
) -> list[Target]:
    """The layers that `apply_lora` would adapt; nothing is changed.

    A `Dense`, `EinsumDense` or embedding is found anywhere: in Functional, Sequential and
    subclassed models, nested models, composite layers, wrappers, lists and dicts of layers. A
    layer that is reached twice is listed once.

    Args:
        model: A built model.
        targets: One of

            - `"all-linear"`: every `Dense` and `EinsumDense` but the output head;
            - `"attention"`: of these, the query, key, value and output projections: layers
              held by a layer whose class name contains "attention", or whose own name contains
              "attention" or "attn";
            - `"all"`: every layer of a kind that can be adapted, embeddings too, but the output
              head;
            - a list of names. A name is a whole path or its end, at a `/` or `.`: `"query"` hits
              `block_0/attention/query` and never `block_0/subquery`;
            - `"re:PATTERN"`, a regular expression that the whole path must match;
            - a function of a `Target` that returns whether to adapt it.

            The output head is the linear layer that makes a model's output. In a Functional
            model it is found by following each output back through operations of one input and
            layers without weights; in a Sequential or subclassed model it is the last layer with
            weights, in the order in which they were assigned. Wrappers and nested models are
            entered. A KerasHub backbone has none. An embedding that is called in reverse is none.
        exclude: Names to leave out, written as above (`"re:..."` counts as a name here).

    Returns:
        The targets, in the order of the walk.

    Raises:
        ValueError: nothing is built, nothing matches, a name matches nothing, everything that
            matches is excluded, or a named layer cannot be adapted.

    Example:

    >>> import keras, keras_lora as kl
    >>> up, head = keras.layers.Dense(5, name="up"), keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((3,)), up, head])
    >>> [(t.path, t.kind, t.kernel_shape) for t in kl.find_targets(model)]
    [('up', 'Dense', (3, 5))]
    """
    nodes = list(walk(model))
    candidates, left_out = _candidates(model, nodes)
    if isinstance(targets, str) and not targets.startswith("re:"):
        selected = _preset(model, targets, candidates, left_out)
    elif callable(targets):
        selected = [t for t in candidates if targets(t)]
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        selected = _named(patterns, nodes, candidates, left_out)
    if not selected:
        raise _nothing_matched(targets, model, candidates)
    kept = _without(selected, exclude, nodes)
    for target in kept:
        if not isinstance(target.layer, LoRALayer):
            check_adaptable(target.layer)
            split_kernel(target.layer)
    return kept


def all_targets(model: Layer) -> list[Target]:
    """Every layer of a kind that can be adapted, whatever speaks against it in the layer itself."""
    return _candidates(model, list(walk(model)))[0]


def matches(name: str, path: str) -> bool:
    """Whether a name, as a user writes it, names the layer at `path`.

    Example:

    >>> matches("attention.query", "block/attention/query"), matches("foo", "block/foobar")
    (True, False)
    >>> matches("re:.*/query", "block/attention/query")
    True
    """
    if name.startswith("re:"):
        return re.fullmatch(name[3:], path) is not None
    wanted, segments = _segments(name), _segments(path)
    exact = segments[-len(wanted) :] == wanted
    return exact or _segments(re.sub(r"#\d+", "", path))[-len(wanted) :] == wanted


def match_names(names: Iterable[str], nodes: Sequence[Node], argument: str) -> list[Node]:
    """The nodes that the names match.

    Raises:
        ValueError: a name matches no layer.
    """
    names = list(names)
    missing = [n for n in names if not any(matches(n, node.path) for node in nodes)]
    if missing:
        raise _unmatched(argument, missing, [node.path for node in nodes])
    return [node for node in nodes if any(matches(name, node.path) for name in names)]


def _segments(path: str) -> list[str]:
    return path.replace(".", "/").split("/")


def _check_built(model: Layer, nodes: Sequence[Node]) -> None:
    supported = [n for n in nodes if supported_base(plain_class(n.layer))]
    if not model.built or (supported and not any(n.layer.built for n in supported)):
        raise ValueError(
            f"Expected a built model. Received: {model.name!r} ({type(model).__name__}), in which "
            "no layer has weights yet. Call the model on a batch, or model.build(input_shape)."
        )


def _candidates(model: Layer, nodes: Sequence[Node]) -> tuple[list[Target], list[Node]]:
    """What can be adapted; and what cannot, being unbuilt or of a class that computes its own."""
    _check_built(model, nodes)
    targets, left_out = [], []
    for node in nodes:
        layer_class = plain_class(node.layer)
        base = supported_base(layer_class)
        if base is None:
            continue
        if not node.layer.built or lora_class_for(layer_class) is None:
            left_out.append(node)
            continue
        parent = type(node.parent).__name__
        shape = kernel_shape(node.layer)
        targets.append(Target(node.path, node.layer, base.__name__, shape, parent))
    return targets, left_out


def _preset(
    model: Layer, preset: str, candidates: Sequence[Target], left_out: Sequence[Node]
) -> list[Target]:
    tables = preset == "all"
    candidates = [t for t in candidates if tables or not is_table(t.layer)]
    left_out = [node for node in left_out if tables or not is_table(node.layer)]
    if left_out:
        reasons = "; ".join(dict.fromkeys(_why_left_out(node) for node in left_out))
        warnings.warn(f"targets={preset!r} leaves out {_listed(left_out)}: {reasons}", stacklevel=4)
    heads = output_heads(model)
    selected = [t for t in candidates if id(t.layer) not in heads]
    if candidates and not selected:
        raise ValueError(
            f"targets={preset!r} leaves out the output head, and the head is all there is: "
            f"{[t.path for t in candidates]}. Name it: targets=[{candidates[0].path!r}]."
        )
    return [t for t in selected if _is_attention(t)] if preset == "attention" else selected


def _why_left_out(node: Node) -> str:
    if not node.layer.built:
        return "not built, call the part of the model that uses it first."
    return (
        "its class overrides what the Keras layer computes; say how it is adapted with "
        "register_lora_class(layer_class, lora_class)."
    )


def _is_attention(target: Target) -> bool:
    name = target.layer.name.lower()
    return "attention" in target.parent_class.lower() or "attention" in name or "attn" in name


def _named(
    patterns: Sequence[str],
    nodes: Sequence[Node],
    candidates: Sequence[Target],
    left_out: Sequence[Node],
) -> list[Target]:
    for pattern in patterns:
        hits = [n for n in nodes if matches(pattern, n.path)]
        if not hits:
            raise _unmatched("targets", [pattern], [t.path for t in candidates])
        refused = [n for n in hits if n in left_out]
        if refused:
            raise ValueError(
                f"Expected layers that can be adapted. Received: {_listed(refused)}, asked for as "
                f"{pattern!r}: {_why_left_out(refused[0])}"
            )
        if not any(matches(pattern, t.path) for t in candidates):
            raise ValueError(
                f"Expected a layer of {_KINDS}. Received: {_listed(hits)}, asked for as "
                f"{pattern!r}. To name the layers inside a layer, use a pattern: "
                f"targets='re:.*{hits[0].layer.name}/.*'."
            )
    return [t for t in candidates if any(matches(p, t.path) for p in patterns)]


def _without(
    selected: Sequence[Target], exclude: Sequence[str], nodes: Sequence[Node]
) -> list[Target]:
    excluded = {id(node.layer) for node in match_names(exclude, nodes, "exclude")}
    inside = {id(n.layer) for e in nodes if id(e.layer) in excluded for n in walk(e.layer)}
    kept = [t for t in selected if id(t.layer) not in excluded | inside]
    if not kept:
        raise ValueError(
            f"Expected at least one target to remain. Received: exclude={list(exclude)}, which "
            f"leaves out every one of {[t.path for t in selected]}. Narrow `exclude`."
        )
    return kept


def output_heads(model: Layer) -> set[int]:
    """The ids of the linear layers that make a model's outputs; see `find_targets`."""
    if is_backbone(model):
        return set()
    if isinstance(model, keras.Sequential) or not _is_functional(model):
        children = model._flatten_layers(include_self=False, recursive=False)
        weighted = [layer for layer in children if layer.weights]
        return _heads_at(weighted[-1]) if weighted else set()
    outputs = keras.tree.flatten(model.outputs)
    makers = [maker for output in outputs if (maker := _maker(output)) is not None]
    return {head for maker in makers for head in _heads_at(maker)}


def _heads_at(layer: Layer) -> set[int]:
    if supported_base(plain_class(layer)) is not None:
        return set() if is_table(layer) else {id(layer)}
    if isinstance(layer, keras.layers.Wrapper):
        return _heads_at(layer.layer)
    return output_heads(layer) if isinstance(layer, keras.Model) else set()


def _maker(tensor: Any) -> Layer | None:
    """The layer with weights that a tensor comes from, through operations of one input."""
    while True:
        history = tensor._keras_history
        operation = history.operation
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            return operation
        if not operation._inbound_nodes:
            return None
        inputs = operation._inbound_nodes[history.node_index].input_tensors
        if len(inputs) != 1:
            return None
        (tensor,) = inputs


def _is_functional(model: Layer) -> bool:
    return isinstance(model, keras.Model) and getattr(model, "outputs", None) is not None


def is_backbone(model: Layer) -> bool:
    """Whether this is a KerasHub backbone, told by name so that KerasHub is not imported."""
    names = {f"{c.__module__}.{c.__name__}" for c in type(model).__mro__}
    return "keras_hub.src.models.backbone.Backbone" in names


def backbone_of(model: Layer) -> Any:
    """The KerasHub backbone that a model is or holds; the outermost, where one is in another.

    Raises:
        ValueError: there is none, or several side by side.
    """
    found = [v for v in (model, *(n.layer for n in walk(model))) if is_backbone(v)]
    inside = {id(node.layer) for backbone in found for node in walk(backbone)}
    outermost = [backbone for backbone in found if id(backbone) not in inside]
    if len(outermost) != 1:
        raise invalid(
            "model",
            "a KerasHub backbone, or a model that holds one",
            [backbone.name for backbone in outermost] or model,
            "pass the backbone itself",
        )
    return outermost[0]


def _listed(nodes: Sequence[Node]) -> str:
    classes = (type(n.layer) for n in nodes)
    return ", ".join(
        f"'{n.path}' ({c.__module__}.{c.__qualname__})"
        for n, c in zip(nodes[:5], classes, strict=False)
    ) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")


def _unmatched(argument: str, missing: Sequence[str], paths: Sequence[str]) -> ValueError:
    close = {
        match
        for name in missing
        for match in difflib.get_close_matches(
            name, sorted({p.split("/")[-1] for p in paths} | set(paths)), n=3, cutoff=0.4
        )
    }
    return ValueError(
        f"Expected every name in `{argument}` to match a layer. Received: {list(missing)}, which "
        f"match none. Closest: {sorted(close)}. There are: {_shortened(paths)}."
    )


def _nothing_matched(targets: Targets, model: Layer, there: Sequence[Target]) -> ValueError:
    if not there:
        return ValueError(
            f"Expected a model with layers of {_KINDS}. Received: {model.name!r} "
            f"({type(model).__name__}), which has none."
        )
    return ValueError(
        f"Expected `targets` to match a layer. Received: targets={targets!r}, which matches none. "
        f"There are: {_shortened([t.path for t in there])}."
    )


def _shortened(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:20])
    return f"{shown} and {len(paths) - 20} more" if len(paths) > 20 else shown
