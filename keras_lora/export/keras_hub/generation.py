"""The signature `generate` of KerasHub's language models, for tokens or for text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint
from keras_lora.export.keras_hub.operations import server_operations
from keras_lora.export.keras_hub.preprocessing import string_spec
from keras_lora.export.keras_hub.tasks import preprocessor_of, tokenizer_resources
from keras_lora.export.serving import Serving
from keras_lora.export.signatures import input_specs

Tokens = Mapping[str, tf.Tensor]


def generate_text(model: keras.Model, serving: Serving) -> Endpoint:
    """The endpoint that takes prompts and gives, as `model.generate`, prompts with answers."""
    preprocessor = preprocessor_of(model)
    stop = stop_tokens(model, serving)

    def call(inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = preprocessor.generate_preprocess(
            inputs["text"], sequence_length=serving.max_length
        )
        outputs = model.generate_step(tokens, stop_token_ids=stop)
        text = preprocessor.generate_postprocess(outputs)
        # A token may end within a character, and JSON has whole characters alone.
        return {"text": tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")}

    signature = {"text": string_spec("text")}
    endpoint = Endpoint("generate", call, signature, tokenizer_resources(preprocessor))
    return _traceable(model, endpoint)


def generate_tokens(model: keras.Model, serving: Serving) -> Endpoint:
    """The endpoint that takes padded tokens and a mask, and gives both with the answer added."""
    specs = input_specs(model, serving.input_signature)
    stop = stop_tokens(model, serving)
    pad = _padding(model, specs, serving.max_length)

    def call(inputs: Tokens) -> dict[str, tf.Tensor]:
        outputs = model.generate_step(pad(inputs), stop_token_ids=stop)
        return {name: tf.cast(value, specs[name].dtype) for name, value in outputs.items()}

    return _traceable(model, Endpoint("generate", call, specs))


def _traceable(model: keras.Model, endpoint: Endpoint) -> Endpoint:
    """The endpoint traced with operations that servers have; a failure says how to fix it."""

    def call(inputs: Any) -> Mapping[str, tf.Tensor]:
        try:
            with server_operations():
                return endpoint.call(inputs)
        except Exception as error:  # the model's own code may raise any class
            raise ValueError(
                "Expected a language model that can generate in a graph for batches of any size. "
                f"Received: {type(model).__name__}, which fails with {type(error).__name__}: "
                f"{error}. Fix the length, by an input_signature or by max_length, or leave "
                "generation out with generate=False."
            ) from error

    return dataclasses.replace(endpoint, call=call)


def stop_tokens(model: keras.Model, serving: Serving) -> list[int] | None:
    """The tokens that end an answer, found as `model.generate` finds them."""
    if serving.stop_token_ids is None:
        return None
    if serving.stop_token_ids != "auto":
        return [int(token) for token in serving.stop_token_ids]
    if model.preprocessor is None:
        raise invalid(
            "stop_token_ids",
            "ids of tokens, or None to write to the end, for a model without a preprocessor",
            "auto",
            "pass one of these, or generate=False to leave generation out",
        )
    tokenizer = model.preprocessor.tokenizer
    second = getattr(tokenizer, "end_token2_id", None)  # instruction-tuned Llama 3 has it
    return [tokenizer.end_token_id, *([] if second is None else [second])]


def _padding(model: keras.Model, specs: Mapping[str, tf.TensorSpec], length: int | None) -> Any:
    """The function that pads prompts to `length`; without a length they stay as they are."""
    if length is None:
        return dict
    side = "decoder_" if "decoder_token_ids" in specs else ""
    others = {n for n in specs if not n.endswith(("token_ids", "padding_mask"))}
    if others:
        raise invalid("max_length", f"None for a model that takes {sorted(others)} too", length)
    pad_id = 0 if model.preprocessor is None else model.preprocessor.tokenizer.pad_token_id

    def pad(inputs: Tokens) -> dict[str, tf.Tensor]:
        names = (f"{side}token_ids", f"{side}padding_mask")
        padded = [_pad(inputs[name], length, x) for name, x in zip(names, (pad_id, 0), strict=True)]
        return {**inputs, **dict(zip(names, padded, strict=True))}

    return pad


def _pad(tokens: tf.Tensor, length: int, value: int) -> tf.Tensor:
    missing = length - tf.shape(tokens)[1]
    fits = tf.debugging.assert_non_negative(missing, f"Expected at most {length} tokens in a row.")
    with tf.control_dependencies([fits]):
        padded = tf.pad(
            tokens, [[0, 0], [0, missing]], constant_values=tf.cast(value, tokens.dtype)
        )
    return tf.ensure_shape(padded, (None, length))
