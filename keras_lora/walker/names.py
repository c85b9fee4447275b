"""Layers by their names, as a user writes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from keras_lora.walker.tree import Node

# How Hugging Face's models name what KerasHub's call by one of these names.
_QUERY, _KEY, _VALUE = (f"{n} {n}_dense {n}_proj {n}_projector" for n in ("query", "key", "value"))
_OUTPUT = "attention_output output_dense out_proj o_dense output_projector"
_UP = "feedforward_intermediate_dense mlp_intermediate_dense ffw_gating_2 intermediate_dense"
_DOWN = "feedforward_output_dense mlp_output_dense ffw_linear"
_HUGGING_FACE: Mapping[str, str] = {
    **dict.fromkeys(["q_proj", "query", "q_lin", "q", "to_q", "wq"], _QUERY),
    **dict.fromkeys(["k_proj", "key", "k_lin", "k", "to_k", "wk"], _KEY),
    **dict.fromkeys(["v_proj", "value", "v_lin", "v", "to_v", "wv"], _VALUE),
    **dict.fromkeys(["o_proj", "out_proj", "out_lin", "o", "to_out", "wo"], _OUTPUT),
    **dict.fromkeys(["c_attn", "query_key_value", "qkv_proj"], f"{_QUERY} {_KEY} {_VALUE} qkv"),
    **dict.fromkeys(["gate_proj", "w1"], "feedforward_gate_dense ffw_gating"),
    **dict.fromkeys(["up_proj", "fc1", "c_fc", "lin1", "wi", "w3", "dense_h_to_4h"], _UP),
    **dict.fromkeys(["down_proj", "fc2", "lin2", "w2", "dense_4h_to_h"], _DOWN),
    "c_proj": f"{_OUTPUT} {_DOWN}",
    **dict.fromkeys(["embed_tokens", "wte", "word_embeddings"], "token_embedding embeddings"),
    **dict.fromkeys(["score", "classifier"], "logits output_logits"),
}


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
        raise unmatched(argument, missing, [node.path for node in nodes])
    return [node for node in nodes if any(matches(name, node.path) for name in names)]


def _segments(path: str) -> list[str]:
    return path.replace(".", "/").split("/")


def listed(nodes: Sequence[Node]) -> str:
    classes = (type(n.layer) for n in nodes)
    return ", ".join(
        f"'{n.path}' ({c.__module__}.{c.__qualname__})"
        for n, c in zip(nodes[:5], classes, strict=False)
    ) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")


def unmatched(argument: str, missing: Sequence[str], paths: Sequence[str]) -> ValueError:
    ends = {path.split("/")[-1] for path in paths}
    translated = {
        end
        for name in missing
        for end in _HUGGING_FACE.get(_segments(name)[-1], "").split()
        if end in ends
    }
    close = translated or {
        match
        for name in missing
        for match in difflib.get_close_matches(name, sorted(ends | set(paths)), n=3, cutoff=0.4)
    }
    return ValueError(
        f"Expected every name in `{argument}` to match a layer. Received: {list(missing)}, which "
        f"match none. Closest: {sorted(close)}. The model has: {shortened(paths)}."
    )


def shortened(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:20])
    return f"{shown} and {len(paths) - 20} more" if len(paths) > 20 else shown
