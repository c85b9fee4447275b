"""Language models of KerasHub that write: tokens to tokens, or text to text, in one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint
from keras_lora.export.keras_hub.operations import server_operations
from keras_lora.export.keras_hub.preprocessing import string_spec
from keras_lora.export.keras_hub.tasks import preprocessor_of, tables_of
from keras_lora.export.signatures import input_specs

Tokens = Mapping[str, tf.Tensor]


@dataclass(frozen=True)
class Generation:
    """Whether a SavedModel writes, and the arguments of `model.generate` that it holds then."""

    wanted: bool = True
    max_length: int | None = None
    stop_token_ids: Sequence[int] | str | None = "auto"

    def __post_init__(self) -> None:
        length = self.max_length
        if length is not None and (not isinstance(length, int) or length < 1):
            raise invalid("max_length", "None or a positive number of tokens", length)
        stop = self.stop_token_ids
        ids = isinstance(stop, Sequence) and not isinstance(stop, str) and len(stop) > 0
        if stop is not None and stop != "auto" and not ids:
            raise invalid("stop_token_ids", "'auto', None or ids of tokens", stop)
        if self.given and not self.wanted:
            raise invalid("generate", "True with max_length or stop_token_ids", self.wanted)

    @property
    def given(self) -> bool:
        """Whether there is anything that only a language model has use for."""
        return self.max_length is not None or self.stop_token_ids != "auto"


def generate_text(model: keras.Model, options: Generation) -> Endpoint:
    """`text` in, `text` out: the prompt and what the model adds, as `model.generate` gives them."""
    preprocessor = preprocessor_of(model)
    stop = stop_tokens(model, options)

    def call(inputs: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = preprocessor.generate_preprocess(
            inputs["text"], sequence_length=options.max_length
        )
        outputs = model.generate_step(tokens, stop_token_ids=stop)
        text = preprocessor.generate_postprocess(outputs)
        # A token may be a part of a character, of which JSON has none.
        return {"text": tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")}

    endpoint = Endpoint("generate", call, {"text": string_spec("text")}, tables_of(preprocessor))
    return _traceable(model, endpoint)


def generate_tokens(model: keras.Model, options: Generation, given: Any | None = None) -> Endpoint:
    """Tokens and their mask in, and out with what the model adds in the places of the padding."""
    specs = input_specs(model, given)
    stop = stop_tokens(model, options)
    pad = _padding(model, specs, options.max_length)

    def call(inputs: Tokens) -> dict[str, tf.Tensor]:
        outputs = model.generate_step(pad(inputs), stop_token_ids=stop)
        return {name: tf.cast(value, specs[name].dtype) for name, value in outputs.items()}

    return _traceable(model, Endpoint("generate", call, specs))


def _traceable(model: keras.Model, endpoint: Endpoint) -> Endpoint:
    """Traced with operations that servers have, and a failure says what to do."""

    def call(inputs: Any) -> Mapping[str, tf.Tensor]:
        try:
            with server_operations():
                return endpoint.call(inputs)
        except Exception as error:  # the code of the model may fail in any way
            raise ValueError(
                "Expected a language model that can write in a graph for batches of any size. "
                f"Received: {type(model).__name__}, which fails with {type(error).__name__}: "
                f"{error}. Fix the length, by an input_signature or by max_length, or leave "
                "generation out with generate=False."
            ) from error

    return dataclasses.replace(endpoint, call=call)


def stop_tokens(model: keras.Model, options: Generation) -> list[int] | None:
    """As `model.generate` finds them."""
    if options.stop_token_ids is None:
        return None
    if options.stop_token_ids != "auto":
        return [int(token) for token in options.stop_token_ids]
    if model.preprocessor is None:
        raise invalid(
            "stop_token_ids",
            "ids of tokens, or None to write to the end, for a model without a preprocessor",
            "auto",
            "or leave generation out with generate=False",
        )
    tokenizer = model.preprocessor.tokenizer
    second = getattr(tokenizer, "end_token2_id", None)  # instruction-tuned Llama 3 has it
    return [tokenizer.end_token_id, *([] if second is None else [second])]


def _padding(model: keras.Model, specs: Mapping[str, tf.TensorSpec], length: int | None) -> Any:
    """What makes room for the answer: tokens to the length that was asked for, if any was."""
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


def _pad(rows: tf.Tensor, length: int, value: int) -> tf.Tensor:
    missing = length - tf.shape(rows)[1]
    fits = tf.debugging.assert_non_negative(missing, f"Expected at most {length} tokens in a row.")
    with tf.control_dependencies([fits]):
        padded = tf.pad(rows, [[0, 0], [0, missing]], constant_values=tf.cast(value, rows.dtype))
    return tf.ensure_shape(padded, (None, length))
