"""Tables of tokens whose adapters mean something else in transformers.

A tied table is adapted in both directions here, `y = h E^T + s (h B^T) A^T`. There an adapter of
the embedding acts in the lookup alone, and the head, another module, keeps `E`. And T5's and
BART's `shared` is looked up by other modules, one in the encoder and one in the decoder, which an
adapter of `shared` does not reach.
"""

from __future__ import annotations

import importlib
from typing import Any

import keras

from keras_lora.hub_weights import HubWeights
from keras_lora.walker import backbone_of, walk

_LANGUAGE_MODELS = ("CausalLM", "Seq2SeqLM")
_TIED = (
    "its table is the output head too, where its adapter acts here and not in transformers; "
    "leave it out"
)
_SHARED = "in transformers nothing looks up in the module that its table is of; leave it out"


def refused_tables(model: keras.Model, weights: HubWeights) -> dict[str, str]:
    """Why the adapters of some embeddings cannot be exchanged, by path.

    A backbone calls its table in one direction. Where KerasHub makes language models of it, it
    counts as one of these: its adapter would act in their heads. An encoder, of which it makes
    but a `MaskedLM`, does not.
    """
    tables = {n.path: n.layer for n in walk(model) if isinstance(n.layer, keras.layers.Embedding)}
    shared = {p: _SHARED for p in tables if _is_shared(weights, p)}
    if not _is_language_model(model):
        return shared
    reversible = keras.layers.ReversibleEmbedding
    tied = [p for p, x in tables.items() if isinstance(x, reversible) and x.tie_weights]
    return shared | dict.fromkeys(tied, _TIED)


def _is_shared(weights: HubWeights, path: str) -> bool:
    return any(b.weight.endswith("shared.weight") for b in weights.blocks.get(path, ()))


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
