"""Embeddings whose adapters compute something else in transformers than in Keras.

Keras adapts a tied embedding matrix `E` in both directions: the output head computes
`y = h E^T + s (h B^T) A^T`. In transformers the adapter of an embedding is active only in the
lookup, and the head, another module, keeps `E`. Encoder and decoder may share an embedding matrix
too, in several modules of transformers or in several layers of Keras, each with its own adapter.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import keras

from keras_lora.exchange.converters import HuggingFaceWeights
from keras_lora.walker import backbone_of, walk

_LANGUAGE_MODELS = ("CausalLM", "Seq2SeqLM")
_LEAVE_OUT = "leave this embedding out of the adapter"
_TIED = (
    "its matrix is the output head too: the adapter is active in the head in Keras, and not in "
    f"transformers; {_LEAVE_OUT}"
)
_UNKNOWN = (
    "its matrix may be the output head too, since the model has no other: the adapter would be "
    f"active in the head in Keras, and not in transformers; {_LEAVE_OUT}"
)
_SHARED = (
    "encoder and decoder share its matrix: the adapter is active for other inputs in transformers "
    f"than in Keras; {_LEAVE_OUT}"
)


def refused_embeddings(model: keras.Model, weights: HuggingFaceWeights) -> dict[str, str]:
    """Why the adapters of some embeddings cannot be exchanged, by path.

    A backbone alone uses an embedding only for the lookup. But if KerasHub makes language models
    from backbones of this class, the backbone is treated as a language model, whose head would use
    the adapter. An encoder, from which KerasHub makes only a `MaskedLM`, is not.
    """
    embeddings, shared = _embeddings(model), shared_embeddings(model, weights)
    if not _is_language_model(model):
        return shared
    reversible = keras.layers.ReversibleEmbedding
    heads = {p: x for p, x in embeddings.items() if isinstance(x, reversible)}
    if not heads:  # as in Gemma 3n, whose head reads the matrix of an `Embedding`
        return dict.fromkeys(embeddings, _UNKNOWN)
    return shared | {path: _TIED for path, head in heads.items() if head.tie_weights}


def shared_embeddings(model: keras.Model, weights: HuggingFaceWeights) -> dict[str, str]:
    """Why the rows of some embeddings cannot be exchanged, by path.

    PEFT replaces rows in the head too where the weights are tied, as Keras does.
    """
    return dict.fromkeys(_shared(weights, _embeddings(model)), _SHARED)


def _embeddings(model: keras.Model) -> dict[str, keras.layers.Embedding]:
    return {n.path: n.layer for n in walk(model) if isinstance(n.layer, keras.layers.Embedding)}


def _shared(weights: HuggingFaceWeights, paths: Iterable[str]) -> list[str]:
    """The embeddings of a module named `shared`, as in T5 and BART, or of one common module."""
    keys = {path: weights.blocks[path][0].weight for path in paths if path in weights.blocks}
    count = Counter(keys.values())
    return [p for p, key in keys.items() if key.endswith("shared.weight") or count[key] > 1]


def _is_language_model(model: keras.Model) -> bool:
    names = {c.__name__ for c in type(model).__mro__}
    if names & {*_LANGUAGE_MODELS, "MaskedLM"}:
        return True
    if "Task" in names:  # a classifier
        return False
    models = importlib.import_module("keras_hub.models")
    tasks = tuple(getattr(models, name) for name in _LANGUAGE_MODELS)
    classes: list[Any] = [c for c in vars(models).values() if isinstance(c, type)]
    backbones = [c.backbone_cls for c in classes if issubclass(c, tasks)]
    return isinstance(backbone_of(model), tuple(c for c in backbones if c is not None))
