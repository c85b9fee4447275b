"""Which linear layers are the query, key, value and output projections of attention.

A layer computes attention if projections to queries and keys are among its sublayers, which their
names say: `query`, `q_proj`, `_key_dense`, `to_k`, `attention_qkv`. Values may be the keys. Whether
the layer itself, or a layer around it, is called "attention" says nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import keras

from keras_lora.layers import family_of
from keras_lora.walker.heads import has_graph
from keras_lora.walker.tree import Layer, Tree

_INPUTS = frozenset({"query", "key", "value"})
_SCORED = frozenset({"query", "key"})
_OUTPUT = frozenset({"output"})

# The words by which libraries call the projections. The queries of RWKV are its receptance.
_ROLES: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(["q", "wq", "query", "queries", "receptance"], frozenset({"query"})),
    **dict.fromkeys(["k", "wk", "key", "keys"], frozenset({"key"})),
    **dict.fromkeys(["v", "wv", "value", "values"], frozenset({"value"})),
    **dict.fromkeys(["o", "wo", "out", "output", "post"], _OUTPUT),
    "kv": frozenset({"key", "value"}),
    "qk": frozenset({"query", "key"}),
    "qkv": _INPUTS,
}
# Words that say what a layer is, not what for.
_PROJECTIONS = {"proj", "projection", "projector"}
_FORMS = {"dense", "einsum", "layer", "linear", "lin", "fc"} | _PROJECTIONS
_ATTENTIONS = {"attention", "attn", "self", "cross"}
_BEFORE = {"c", "in", "to", "w"} | _ATTENTIONS | _FORMS

# Layers of KerasHub with projections of which those of attention are a part, beside others.
_JOINT = {"keras_hub.src.models.flux.flux_layers.SingleStreamBlock": ("linear1", "linear2")}


@dataclass(frozen=True)
class _Projection:
    """A sublayer that contains one linear layer, itself or inside a wrapper.

    `group` is what the name says before the role: blocks without layers of their own have
    projections of several attentions, such as `block_0_query` and `block_1_query`.
    """

    linear: Layer
    group: str
    roles: frozenset[str]
    wrapped: bool


def attention_projections(tree: Tree) -> set[int]:
    """The ids of the linear layers that project to queries, keys and values, or from attention."""
    linear = {id(layer) for layer in tree.layers if family_of(layer) == "linear"}
    children = {id(parent): _projections(tree, parent, linear) for parent in tree.layers}
    parents = {id(child): parent for parent in tree.layers for child in tree.children[id(parent)]}
    found: set[int] = set()
    for parent in tree.layers:
        projections = children[id(parent)]
        for inputs in _attentions(projections):
            outputs = [x for x in projections if x.roles == _OUTPUT and x.group == inputs[0].group]
            if not outputs:
                outputs = _only_other(parent, projections)
            if not outputs and id(parent) in parents:
                around = parents[id(parent)]
                outputs = _only_other(around, children[id(around)])
            found |= {id(x.linear) for x in [*inputs, *outputs]}
        found |= {id(getattr(parent, name)) for name in _JOINT.get(_class_name(parent), ())}
    return found


def _projections(tree: Tree, parent: Layer, linear: set[int]) -> list[_Projection]:
    found = []
    attributes = dict(_attributes(parent))
    for child in tree.children[id(parent)]:
        inside = [x for x in tree.within(child) if id(x) in linear]
        if len(inside) == 1:
            group, roles = _role([attributes.get(id(child), ""), child.name])
            found.append(_Projection(inside[0], group, roles, inside[0] is not child))
    return found


def _attributes(parent: Layer) -> Iterable[tuple[int, str]]:
    """The name of the attribute, or the key of a dict, of each object that a layer has so."""
    for name, value in vars(parent).items():
        items = value.items() if isinstance(value, dict) else [(name, value)]
        for key, item in items:
            if isinstance(item, keras.layers.Layer):
                yield id(item), str(key)


def _role(names: Sequence[str]) -> tuple[str, frozenset[str]]:
    """What the first name that has a role says before the role, and the role."""
    for name in names:
        words = _words(name)
        form = _popped(words, _FORMS)
        roles: frozenset[str] = frozenset()
        while words and words[-1] in _ROLES and roles != _OUTPUT:
            roles |= _ROLES[words.pop()]
        if not roles and form & _PROJECTIONS and (not words or words[-1] in {"c", *_ATTENTIONS}):
            roles = _OUTPUT  # "proj", "attention_proj", "c_proj"
        _popped(words, _BEFORE)
        if roles:
            return "_".join(words), roles
    return "", frozenset()


def _popped(words: list[str], kind: Collection[str]) -> set[str]:
    """Take the words of a kind, and numbers, from the end."""
    popped = set()
    while words and (words[-1] in kind or words[-1].isdigit()):
        popped.add(words.pop())
    return popped


def _words(name: str) -> list[str]:
    snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace("c_attn", "qkv")
    return re.findall(r"\d+|[^\W\d_]+", snake)


def _attentions(projections: Sequence[_Projection]) -> list[list[_Projection]]:
    """The projections to queries, keys and values, of each attention."""
    groups: dict[str, list[_Projection]] = defaultdict(list)
    for projection in projections:
        if projection.roles & _INPUTS:
            groups[projection.group].append(projection)
    return [
        group
        for group in groups.values()
        if frozenset[str]().union(*(x.roles for x in group)) >= _SCORED
    ]


def _only_other(parent: Layer, projections: Sequence[_Projection]) -> list[_Projection]:
    """The one projection of a layer that is none to queries, keys or values.

    A model with a graph has layers for other ends among its own.
    """
    others = [x for x in projections if not x.roles & _INPUTS]
    others = [x for x in others if x.roles == _OUTPUT or not x.wrapped]
    return others if len(others) == 1 and not has_graph(parent) else []


def _class_name(layer: Layer) -> str:
    return f"{type(layer).__module__}.{type(layer).__name__}"
