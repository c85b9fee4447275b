"""Tables of tokens whose adapters mean something else in transformers.

A tied table is adapted in both directions here, `y = h E^T + s (h B^T) A^T`. There an adapter of
the embedding acts in the lookup alone, and the head, another module, keeps `E`. And the table of
an encoder and a decoder may be one, in several modules there or several layers here, each with
adapters of its own.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import keras

from keras_lora.exchange.converters import HubWeights
from keras_lora.walker import backbone_of, walk

_LANGUAGE_MODELS = ("CausalLM", "Seq2SeqLM")
_TIED = (
    "its table is the output head too: an adapter acts there here, and not in transformers; leave "
    "it out"
)
_UNKNOWN = (
    "its table may be the output head too, since there is no other: an adapter would act there "
    "here, and not in transformers; leave it out"
)
_SHARED = (
    "encoder and decoder share its table: an adapter acts in other places there than here; leave "
    "it out"
)


def refused_tables(model: keras.Model, weights: HubWeights) -> dict[str, str]:
    """Why the adapters of some embeddings cannot be exchanged, by path.

    A backbone calls its table in one direction. Where KerasHub makes language models of it, it
    counts as one of these: its adapter would act in their heads. An encoder, of which it makes
    but a `MaskedLM`, does not.
    """
    tables = {n.path: n.layer for n in walk(model) if isinstance(n.layer, keras.layers.Embedding)}
    shared = dict.fromkeys(_shared(weights, tables), _SHARED)
    if not _is_language_model(model):
        return shared
    reversible = keras.layers.ReversibleEmbedding
    heads = {p: x for p, x in tables.items() if isinstance(x, reversible)}
    if not heads:  # as in Gemma 3n, whose head reads the table of an `Embedding`
        return dict.fromkeys(tables, _UNKNOWN)
    return shared | {path: _TIED for path, head in heads.items() if head.tie_weights}


def _shared(weights: HubWeights, tables: Iterable[str]) -> list[str]:
    """Those of a module named `shared`, as in T5 and BART, or of one that others are of too."""
    keys = {path: weights.blocks[path][0].weight for path in tables if path in weights.blocks}
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
