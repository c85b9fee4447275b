"""Which layers `targets` selects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keras_lora.checks import warn
from keras_lora.config import Targets, check_names, check_targets
from keras_lora.layers import (
    LoRALayer,
    Site,
    check_adaptable,
    family_of,
    lora_class_for,
    plain_class,
    sites_of,
    supported_base,
)
from keras_lora.walker.attention import attention_projections
from keras_lora.walker.heads import output_heads, possible_heads
from keras_lora.walker.names import listed, match_names, matches, shortened, unmatched
from keras_lora.walker.tree import Layer, Node, Tree, site_path

_KINDS = "Dense, EinsumDense, Embedding, ReversibleEmbedding, a convolution or a recurrent cell"
_FAMILIES = {"all-linear": "linear", "attention": "linear", "convolutions": "convolution"}


@dataclass(frozen=True)
class Target:
    """A layer that can be adapted.

    Attributes:
        path: Its place in the model, the names of the layers joined by `/`. A second sibling of
            the same name is `name#2`.
        layer: The layer itself.
        kind: The Keras class that it is adapted as: `"Dense"`, `"EinsumDense"`, `"Embedding"`,
            `"ReversibleEmbedding"`, a convolution such as `"Conv2D"`, a cell such as `"LSTMCell"`,
            or one given to `register_lora_class`.
        kernel_shape: Shape of its kernel; of an embedding `(vocabulary, dim)`.
        parent_class: Class name of the layer that contains it.
        matrix: Which matrix of the layer, where the layer has several; then `path` ends in it.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> kl.find_targets(model, ["up"])[0].kernel_shape
    (3, 5)
    """

    path: str
    layer: Layer
    kind: str
    kernel_shape: tuple[int, ...]
    parent_class: str
    matrix: str = ""

    @property
    def site(self) -> Site:
        """The matrix itself."""
        return sites_of(self.layer)[self.matrix]


def find_targets(
    model: Layer, targets: Targets = "all-linear", exclude: Sequence[str] = ()
) -> list[Target]:
    """The layers that `apply_lora` would adapt; nothing is changed.

    A layer of a kind that can be adapted is found anywhere: in Functional, Sequential and
    subclassed models, nested models, composite layers, wrappers, lists and dicts of layers. A
    layer that is reached twice is listed once.

    Args:
        model: A built model.
        targets: One of

            - `"all-linear"`: every `Dense` and `EinsumDense` except the output head;
            - `"attention"`: the query, key, value and output projections among these, joint ones
              too. A layer computes attention if sublayers of it are named as projections to
              queries and keys: `query`, `q_proj`, `to_q`, `qkv`; its own name says nothing;
            - `"convolutions"`: every convolution except an output head;
            - `"all"`: every layer of a kind that can be adapted, embeddings, convolutions and
              recurrent cells too, except the output head;
            - a list of names. A name is a whole path or its end, at a `/` or `.`: `"query"` hits
              `block_0/attention/query` and never `block_0/subquery`;
            - `"re:PATTERN"`, a regular expression that the whole path must match;
            - a function of a `Target` that returns whether to adapt it.

            The output head is the linear layer or the convolution that makes a model's output. In a
            Functional model it is found by following each output back through operations of one
            input and layers without weights; in a Sequential or subclassed model it is the last
            layer with weights, in the order in which they were assigned. Wrappers and nested models
            are entered. A KerasHub backbone has no output head. An embedding that is called in
            reverse is not an output head. A warning names layers that may be heads and are
            selected: those before a mask or a concatenation, and in a subclassed model those that
            are named so.
        exclude: Names to leave out, written as above (`"re:..."` counts as a name too).

    Returns:
        The targets, in the order of the walk.

    Raises:
        ValueError: a preset that does not exist, nothing is built, nothing matches, a name matches
            nothing, everything that matches is excluded, or a named layer cannot be adapted.

    Example:

    >>> import keras, keras_lora as kl
    >>> up, head = keras.layers.Dense(5, name="up"), keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((3,)), up, head])
    >>> [(t.path, t.kind, t.kernel_shape) for t in kl.find_targets(model)]
    [('up', 'Dense', (3, 5))]
    """
    check_targets(targets)
    tree = Tree.of(model)
    selected = select_targets(tree, targets, check_names("exclude", exclude))
    warn_of_heads(tree, targets, selected)
    return selected


def warn_of_heads(tree: Tree, targets: Targets, selected: Sequence[Target]) -> None:
    """Warn of layers that a preset selects although they may be output heads."""
    if isinstance(targets, str) and not targets.startswith("re:"):
        possible = possible_heads(tree)
        paths = [t.path for t in selected if id(t.layer) in possible]
        if paths:
            warn(
                f"targets={targets!r} adapts {paths}, which may make the model's outputs: several "
                "layers make an output, or the model has no graph that would tell. To leave an "
                f"output head out, write exclude=[{paths[-1]!r}]; to train it in full, "
                f"layers_to_save=[{paths[-1]!r}]."
            )


def select_targets(
    tree: Tree, targets: Targets = "all-linear", exclude: Sequence[str] = ()
) -> list[Target]:
    """`find_targets` for a model whose tree is known."""
    candidates, left_out = _candidates(tree)
    if isinstance(targets, str) and not targets.startswith("re:"):
        selected = _preset(tree, targets, candidates, left_out)
    elif callable(targets):
        selected = [t for t in candidates if targets(t)]
    else:
        patterns = [targets] if isinstance(targets, str) else targets
        selected = _named(patterns, tree.nodes, candidates, left_out)
    if not selected:
        raise _nothing_matched(targets, tree.root, candidates)
    kept = _without(tree, selected, exclude)
    for target in kept:
        check_target(target)
    return kept


def check_target(target: Target) -> None:
    """Refuse a layer that cannot be adapted though its kind can.

    Raises:
        ValueError: see `check_adaptable`; or the layer's equation has a diagonal.
    """
    if not isinstance(target.layer, LoRALayer):
        check_adaptable(target.layer)
        target.site.split()
        _check_saving(target)
        if 0 in target.kernel_shape:
            raise ValueError(
                f"Layer {target.path!r}: expected a kernel without a side of 0. Received: the "
                f"shape {target.kernel_shape}. Exclude the layer."
            )


def _check_saving(target: Target) -> None:
    """Refuse a matrix that no rank factors with fewer parameters, where its kind says so."""
    inputs, outputs = target.site.split().matrix_shape(target.kernel_shape)
    if target.site.kind.must_save and inputs * outputs <= inputs + outputs:
        raise ValueError(
            f"Layer {target.path!r}: expected a kernel with more parameters than factors of rank 1 "
            f"have. Received: the shape {target.kernel_shape}, {inputs} positions of "
            f"{outputs} channels. Exclude the layer, or train it in full: "
            f"layers_to_save=[{target.path!r}]."
        )


def all_targets(tree: Tree) -> list[Target]:
    """Every layer of a kind that can be adapted, also those that `check_target` refuses."""
    return _candidates(tree)[0]


def _check_built(tree: Tree) -> None:
    model, nodes = tree.root, tree.nodes
    supported = [n for n in nodes if supported_base(plain_class(n.layer))]
    if not model.built or (supported and not any(n.layer.built for n in supported)):
        raise ValueError(
            f"Expected a built model. Received: {model.name!r} ({type(model).__name__}), in which "
            "no layer has weights yet. Call the model on a batch, or model.build(input_shape)."
        )


def _candidates(tree: Tree) -> tuple[list[Target], list[Node]]:
    """The layers that can be adapted, and those of a fitting kind that cannot.

    A layer cannot if it is not built, or if its class overrides the computation of the Keras layer.
    """
    _check_built(tree)
    targets, left_out = [], []
    for node in tree.nodes:
        layer_class = plain_class(node.layer)
        base = supported_base(layer_class)
        if base is None:
            continue
        if not node.layer.built or lora_class_for(layer_class) is None:
            left_out.append(node)
            continue
        parent = type(node.parent).__name__
        for name, site in sites_of(node.layer).items():
            path = site_path(node.path, name)
            targets.append(Target(path, node.layer, base.__name__, site.shape, parent, name))
    return targets, left_out


def _preset(
    tree: Tree, preset: str, candidates: Sequence[Target], left_out: Sequence[Node]
) -> list[Target]:
    family, every = _FAMILIES.get(preset), candidates
    if family is not None:
        candidates = [t for t in candidates if family_of(t.layer) == family]
        left_out = [node for node in left_out if family_of(node.layer) == family]
    if preset == "attention":
        wanted = attention_projections(tree)
        candidates = [t for t in candidates if id(t.layer) in wanted]
        left_out = [node for node in left_out if id(node.layer) in wanted]
    if left_out:
        reasons = "; ".join(dict.fromkeys(_why_left_out(node) for node in left_out))
        warn(f"targets={preset!r} leaves out {listed(left_out)}: {reasons}")
    heads = output_heads(tree)
    selected = [t for t in candidates if id(t.layer) not in heads]
    if candidates and not selected:
        others = {t.kind: None for t in every if id(t.layer) not in heads}
        raise _only_a_head(tree, preset, candidates, list(others))
    return selected


def _only_a_head(
    tree: Tree, preset: str, heads: Sequence[Target], other_kinds: Sequence[str]
) -> ValueError:
    paths, ids = [t.path for t in heads], {id(t.layer) for t in heads}
    if other_kinds:
        return ValueError(
            f"targets={preset!r} leaves out the output head {paths}, and the other layers that can "
            f"be adapted are of other kinds: {list(other_kinds)}. Write targets='all'."
        )
    others = [
        node
        for node in tree.nodes
        if id(node.layer) not in ids
        and not tree.children[id(node.layer)]
        and any(len(v.shape) > 1 for v in node.layer.weights)
    ]
    if not others:
        return ValueError(
            f"targets={preset!r} leaves out the output head {paths}, and the model has no other "
            f"matrix. Name it: targets=[{paths[0]!r}]."
        )
    return ValueError(
        f"targets={preset!r} leaves out the output head {paths}, and the other layers cannot be "
        f"adapted: {listed(others)}. Say how to adapt these classes with register_lora_class; or "
        "train the head in full, without adapters, and freeze the others (layer.trainable = "
        "False): a low-rank head learns less than a whole one."
    )


def _why_left_out(node: Node) -> str:
    if not node.layer.built:
        return "not built: call the part of the model that uses it first."
    return (
        "its class overrides the computation of the Keras layer; say how to adapt the class "
        "with register_lora_class(layer_class, lora_class)."
    )


def _named(
    patterns: Sequence[str],
    nodes: Sequence[Node],
    candidates: Sequence[Target],
    left_out: Sequence[Node],
) -> list[Target]:
    for pattern in patterns:
        hits = [n for n in nodes if matches(pattern, n.path)]
        found = any(_is_named(pattern, t) for t in candidates)
        if not hits and not found:
            raise unmatched("targets", [pattern], [t.path for t in candidates])
        refused = [n for n in hits if n in left_out]
        if refused:
            raise ValueError(
                f"Expected layers that can be adapted. Received: {listed(refused)}, asked for as "
                f"{pattern!r}: {_why_left_out(refused[0])}"
            )
        if not found:
            raise ValueError(
                f"Expected a layer of {_KINDS}. Received: {listed(hits)}, asked for as "
                f"{pattern!r}. {_how_to_name(hits[0], candidates)}"
            )
    return [t for t in candidates if any(_is_named(p, t) for p in patterns)]


def _is_named(pattern: str, target: Target) -> bool:
    """Whether a pattern matches a matrix or, where the layer has several, the layer."""
    layer_path = target.path.removesuffix(f"/{target.matrix}")
    return matches(pattern, target.path) or matches(pattern, layer_path)


def _how_to_name(node: Node, candidates: Sequence[Target]) -> str:
    """What to do instead of naming a layer that is of no kind that can be adapted."""
    if any(t.path.startswith(f"{node.path}/") for t in candidates):
        return (
            "To name the layers inside a layer, use a pattern: "
            f"targets='re:.*{node.layer.name}/.*'."
        )
    return (
        f"No layer inside it can be adapted either. To train it in full beside the adapters, write "
        f"layers_to_save=[{node.path!r}]; to adapt its class, see register_lora_class."
    )


def _without(tree: Tree, selected: Sequence[Target], exclude: Sequence[str]) -> list[Target]:
    excluded = match_names(exclude, tree.nodes, "exclude")
    left_out = tree.ids_within(node.layer for node in excluded)
    kept = [t for t in selected if id(t.layer) not in left_out]
    if not kept:
        raise ValueError(
            f"Expected at least one target to remain. Received: exclude={list(exclude)}, which "
            f"leaves out every one of {[t.path for t in selected]}. Narrow `exclude`."
        )
    return kept


def _nothing_matched(targets: Targets, model: Layer, candidates: Sequence[Target]) -> ValueError:
    if not candidates:
        return ValueError(
            f"Expected a model with layers of {_KINDS}. Received: {model.name!r} "
            f"({type(model).__name__}), which has none."
        )
    return ValueError(
        f"Expected `targets` to match a layer. Received: targets={targets!r}, which matches none. "
        f"The model has: {shortened([t.path for t in candidates])}."
    )
