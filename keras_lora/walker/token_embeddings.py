"""Which embeddings `train_tokens` means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keras_lora.checks import invalid
from keras_lora.walker.candidates import Target, all_targets, check_target
from keras_lora.walker.heads import is_backbone
from keras_lora.walker.names import match_names, matches
from keras_lora.walker.tree import Tree

Tokens = Sequence[int]


def token_targets(
    tree: Tree, train_tokens: Tokens | Mapping[str, Tokens]
) -> list[tuple[Target, Tokens]]:
    """Embeddings and the tokens whose rows train in them.

    Raises:
        ValueError: a name of no embedding, several embeddings that ids without a name could mean,
            or tokens that an embedding does not have.
    """
    if not train_tokens:
        return []
    embeddings = [t for t in all_targets(tree) if t.site.kind.family == "embedding"]
    if isinstance(train_tokens, Mapping):
        chosen = _named(tree, embeddings, train_tokens)
    else:
        chosen = [(_input_embedding(tree, embeddings), train_tokens)]
    for target, tokens in chosen:
        check_target(target)
        target.site.check_tokens(tokens, target.path)
    return chosen


def _named(
    tree: Tree, embeddings: Sequence[Target], by_name: Mapping[str, Tokens]
) -> list[tuple[Target, Tokens]]:
    match_names(by_name, tree.nodes, "train_tokens")
    others = [name for name in by_name if not any(matches(name, t.path) for t in embeddings)]
    if others:
        expected = f"names of embeddings: {[t.path for t in embeddings]}"
        raise invalid("train_tokens", expected, others)
    chosen = [(t, next((n for n in by_name if matches(n, t.path)), None)) for t in embeddings]
    return [(target, by_name[name]) for target, name in chosen if name is not None]


def _input_embedding(tree: Tree, embeddings: Sequence[Target]) -> Target:
    """The only embedding of a model, or the one that a KerasHub backbone says is of its tokens."""
    backbones = [layer for layer in tree.layers if is_backbone(layer)]
    of_tokens = [getattr(backbone, "token_embedding", None) for backbone in backbones]
    named = [t for t in embeddings if any(t.layer is layer for layer in of_tokens)]
    found = embeddings if len(embeddings) == 1 else named
    if len(found) != 1:
        paths = [target.path for target in found or embeddings]
        fix = f"name it: train_tokens={{{paths[0]!r}: [...]}}" if paths else ""
        raise invalid("train_tokens", f"ids for one of the embeddings {paths}", "ids alone", fix)
    return found[0]
