"""What a task of KerasHub has besides its network: a preprocessor and a tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import invalid


def is_task(model: keras.Model, name: str) -> bool:
    """Whether the model is this task of `keras_hub.models`."""
    hub = sys.modules.get("keras_hub")  # not imported by now: then no model is a task
    return hub is not None and isinstance(model, getattr(hub.models, name))


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


def tables_of(preprocessor: Any) -> Sequence[Any]:
    """The tokenizer, if there is one, with no memory of the words that it has seen.

    A byte-pair tokenizer keeps each word with its tokens; written along, the SavedModel would
    hold the words of the training data.
    """
    tokenizer = preprocessor.tokenizer
    if tokenizer is None:
        return ()
    if isinstance(tokenizer, sys.modules["keras_hub"].tokenizers.BytePairTokenizer):
        tokenizer.set_vocabulary_and_merges(tokenizer.vocabulary, tokenizer.merges)
    tables = tf.Module()  # `track` takes no layer that was not called
    tables.tokenizer = tokenizer
    return (tables,)
