"""Which layers `targets` selects."""

from __future__ import annotations

from collections.abc import Sequence

from keras_lora.checks import warn
from keras_lora.config import Targets, check_names, check_targets
from keras_lora.layers import family_of
from keras_lora.walker.attention import attention_projections
from keras_lora.walker.candidates import (
    Candidates,
    Target,
    candidates,
    check_target,
    why_left_out,
)
from keras_lora.walker.heads import output_heads, possible_heads
from keras_lora.walker.names import listed, match_names, matches, shortened, unmatched
from keras_lora.walker.tree import Layer, Node, Tree

_KINDS = "Dense, EinsumDense, Embedding, ReversibleEmbedding, a convolution or a recurrent cell"
_FAMILIES = {
    "all-linear": "linear",
    "attention": "linear",
    "convolutions": "convolution",
    "experts": "expert",
}


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
            - `"experts"`: the experts of KerasHub's mixtures;
            - `"all"`: every layer of a kind that can be adapted, embeddings, convolutions,
              recurrent cells and experts too, except the output head;
            - a list of names. A name is a whole path or its end, at a `/` or `.`: `"query"` hits
              `block_0/attention/query` and never `block_0/subquery`;
            - `"re:PATTERN"`, a regular expression that the whole path must match;
            - a function of a `Target` that returns whether to adapt it, for those of `"all"` and
              heads.

            A name or pattern that matches no layer that can be adapted may name a bare variable of
            two axes or more, by the path of its layer and its name:
            `position_embedding/embeddings`. See docs/adapting.md.

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
    found = candidates(tree)
    if isinstance(targets, str) and not targets.startswith("re:"):
        selected = _preset(tree, targets, found.known, found.left_out)
    elif callable(targets):
        selected = [t for t in found.known if targets(t)]
    else:
        selected = _named([targets] if isinstance(targets, str) else targets, tree.nodes, found)
    if not selected:
        raise _nothing_matched(targets, tree.root, found.known)
    kept = _without(tree, selected, exclude)
    for target in kept:
        check_target(target)
    return kept


def _preset(
    tree: Tree, preset: str, candidates: Sequence[Target], left_out: Sequence[Node]
) -> list[Target]:
    family, every = _FAMILIES.get(preset), candidates
    if family is not None:
        candidates = [t for t in candidates if t.site.kind.family == family]
        left_out = [node for node in left_out if family_of(node.layer) == family]
    if preset == "attention":
        wanted = attention_projections(tree)
        candidates = [t for t in candidates if id(t.layer) in wanted]
        left_out = [node for node in left_out if id(node.layer) in wanted]
    if left_out:
        reasons = "; ".join(dict.fromkeys(why_left_out(node) for node in left_out))
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


def _named(patterns: Sequence[str], nodes: Sequence[Node], found: Candidates) -> list[Target]:
    selected: dict[str, Target] = {}
    for pattern in patterns:
        # A pattern that was written for layers means no variables.
        named = [t for t in found.layers if _is_named(pattern, t)]
        _check_left_out(pattern, nodes, found.left_out)
        named = named or [t for t in found.every if _is_named(pattern, t)]
        if not named:
            raise _unnamed(pattern, nodes, found)
        selected |= {t.path: t for t in named}
    return [t for t in found.every if t.path in selected]


def _check_left_out(pattern: str, nodes: Sequence[Node], left_out: Sequence[Node]) -> None:
    refused = [n for n in nodes if n in left_out and matches(pattern, n.path)]
    if refused:
        raise ValueError(
            f"Expected layers that can be adapted. Received: {listed(refused)}, asked for as "
            f"{pattern!r}: {why_left_out(refused[0])}"
        )


def _unnamed(pattern: str, nodes: Sequence[Node], found: Candidates) -> ValueError:
    hits = [n for n in nodes if matches(pattern, n.path)]
    if not hits:
        return unmatched("targets", [pattern], [t.path for t in found.known])
    return ValueError(
        f"Expected a layer of {_KINDS}. Received: {listed(hits)}, asked for as "
        f"{pattern!r}. {_how_to_name(hits[0], found)}"
    )


def _is_named(pattern: str, target: Target) -> bool:
    """Whether a pattern matches a matrix or its layer, where all of the layer is known."""
    whole = target.site.kind.family != "weight" and matches(pattern, target.layer_path)
    return whole or matches(pattern, target.path)


def _how_to_name(node: Node, found: Candidates) -> str:
    """What to do instead of naming a layer that is of no kind that can be adapted."""
    own = [t.path for t in found.every if t.layer is node.layer]
    named = f"To adapt variables of the layer, name them: targets={own}. " if own else ""
    if any(t.path.startswith(f"{node.path}/") for t in found.known):
        return (
            f"{named}To name the layers inside a layer, use a pattern: "
            f"targets='re:.*{node.layer.name}/.*'."
        )
    return (
        f"{named or 'No layer inside it can be adapted either. '}To train it in full beside the "
        f"adapters, write layers_to_save=[{node.path!r}]; to adapt its class, see "
        "register_lora_class."
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
