"""The parts of a KerasHub task besides its network: a preprocessor and a tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import keras

from keras_lora.checks import invalid


def is_task(model: keras.Model, name: str) -> bool:
    """Whether the model is this task of `keras_hub.models`."""
    # A process that has not imported KerasHub has no task.
    keras_hub = sys.modules.get("keras_hub")
    return keras_hub is not None and isinstance(model, getattr(keras_hub.models, name))


def preprocessor_of(model: keras.Model) -> Any:
    """The task's preprocessor.

    Raises:
        ValueError: it has none.
    """
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        raise invalid(
            "preprocessing",
            "False for a model without a preprocessor",
            model.name,
            "make the KerasHub task with preprocessor=..., or preprocess before the request",
        )
    return preprocessor


def tokenizer_resources(preprocessor: Any) -> Sequence[Any]:
    """The preprocessor's tokenizer, if it has one, as a resource of an endpoint.

    A byte-pair tokenizer keeps the tokens of each word that it has seen. This memory is emptied,
    or the SavedModel would contain the words of the training data.
    """
    tokenizer = preprocessor.tokenizer
    if tokenizer is None:
        return ()
    if isinstance(tokenizer, sys.modules["keras_hub"].tokenizers.BytePairTokenizer):
        tokenizer.set_vocabulary_and_merges(tokenizer.vocabulary, tokenizer.merges)
    return (tokenizer,)
