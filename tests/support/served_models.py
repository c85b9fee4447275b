"""SavedModels for the tests of the server, each with calls and the answers that it must give.

`EXPORTS` maps a name to a function that writes a version directory and returns the calls. The
answers come from elsewhere: `model.predict`, or arithmetic in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

import keras_lora as kl
from support import exports, keras_hub_tasks
from support.models import composite, data, randomize_adapters


@dataclass(frozen=True)
class Call:
    """The inputs, the expected outputs, and the signature if it is not the default."""

    feeds: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    signature: str = ""


Write = Callable[[Path], list[Call]]


# Signatures of every kind of tensor that clients send, made by hand.
NUMBERS: dict[str, np.ndarray] = {
    "single": np.array([[0.1, -3e38], [7, 1e-30], [2, 3]], "float32"),
    "double": np.array([0.1, 1e300, -5], "float64"),
    "counts": np.arange(-7, 8, dtype="int32").reshape(3, 5) * 10**8,
    "ids": np.array([2**60, -1, 0], "int64"),
    "bytes": np.array([0, 254, 7], "uint8"),
    "flags": np.array([True, False, True]),
}
TEXTS = ["", "naïve", "a much longer text, kept on the heap", '"\\']
KINDS: dict[str, tuple[Callable[..., Any], dict[str, tf.TensorSpec]]] = {
    "numbers": (
        lambda flags, **tensors: {"flags": ~flags, **{k: v + 1 for k, v in tensors.items()}},
        {k: tf.TensorSpec([None, *v.shape[1:]], v.dtype) for k, v in NUMBERS.items()},
    ),
    "strings": (
        lambda text: {"text": tf.strings.join([text, "é"]), "length": tf.strings.length(text)},
        {"text": tf.TensorSpec([None], tf.string)},
    ),
    "binary": (
        lambda text: {"raw_bytes": tf.strings.substr(text, 1, -1)},
        {"text": tf.TensorSpec([None], tf.string)},
    ),
    "logarithm": (lambda x: {"y": tf.math.log(x)}, {"x": tf.TensorSpec([None], tf.float32)}),
    "matrix": (lambda x: {"y": x @ tf.ones([5, 7])}, {"x": tf.TensorSpec([None, None])}),
    "scalar": (lambda x: {"y": x * x}, {"x": tf.TensorSpec([], tf.float32)}),
}


def kinds(path: Path) -> list[Call]:
    signatures = {
        name: tf.function(call).get_concrete_function(**specs)
        for name, (call, specs) in KINDS.items()
    }
    tf.saved_model.save(
        tf.Module(), str(path), signatures | {"serving_default": signatures["numbers"]}
    )
    more = {k: v + np.array(1, v.dtype) for k, v in NUMBERS.items() if k != "flags"}
    text = np.array(TEXTS, object)
    joined = np.array([(t + "é").encode() for t in TEXTS], object)
    lengths = np.array([len(t.encode()) for t in TEXTS], "int32")
    return [
        Call(NUMBERS, {**more, "flags": ~NUMBERS["flags"]}),
        Call({"text": text}, {"text": joined, "length": lengths}, "strings"),
    ]


def exported(name: str) -> Write:
    """A model of `exports.EXPORTS`, called with two batch sizes."""

    def write(path: Path) -> list[Call]:
        make, feed, outputs = exports.EXPORTS[name]
        model = exports.adapted(make)
        kl.export_saved_model(model, path)
        feeds = feed(model)
        values = exports.predict(model, feeds)
        expected = dict(zip(outputs, values, strict=True))
        first = {k: v[:1] for k, v in feeds.items()}, {k: v[:1] for k, v in expected.items()}
        return [Call(feeds, expected), Call(*first)]

    return write


CLASSES = ["poor", "fair", "good"]
FILMS = np.array(["the good film!", "a bad film", "films", ""], object)


def text_classifier(path: Path) -> list[Call]:
    """Strings in, probabilities and the name of a class out."""
    model = exports.adapted(keras_hub_tasks.CLASSIFIERS["Bert"])
    kl.export_saved_model(model, path, preprocessing=True, class_names=CLASSES)
    exponentials = np.exp(model.predict(FILMS, verbose=0))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    label = np.array([CLASSES[i].encode() for i in probabilities.argmax(-1)], object)
    return [Call({"text": FILMS}, {"probabilities": probabilities, "label": label})]


def tokens_to_tokens(path: Path) -> list[Call]:
    model = exports.adapted(keras_hub_tasks.LANGUAGE_MODELS["GPT2"])
    feeds = model.preprocessor.generate_preprocess(["the good", "a film"])
    feeds = {name: np.array(value).astype("int32") for name, value in feeds.items()}
    model.preprocessor = None
    kl.export_saved_model(model, path, stop_token_ids=None)
    written = model.generate(dict(feeds), stop_token_ids=None)
    logits = {"logits": model.predict(feeds, verbose=0)}
    expected = {name: np.array(value).astype("int32") for name, value in written.items()}
    return [Call(feeds, logits), Call(feeds, expected, "generate")]


def text_to_text(path: Path) -> list[Call]:
    prompts = ["the good", "a film"]
    model = exports.adapted(keras_hub_tasks.LANGUAGE_MODELS["GPT2"])
    kl.export_saved_model(model, path, preprocessing=True)
    written = np.array([text.encode() for text in model.generate(prompts)], object)
    return [Call({"text": np.array(prompts, object)}, {"text": written}, "generate")]


def many_adapters(ids: Literal["name", "index"]) -> Write:
    """Each row another adapter, of another rank, and one the bare base."""

    def write(path: Path) -> list[Call]:
        model = of_adapters(["fr", "de", "pt"])
        kl.export_saved_model(model, path, adapters=["fr", "de", "pt"], adapter_ids=ids)
        wanted = ["de", "", "pt", "fr", "de", ""]
        x, _ = data(model, len(wanted))
        rows = {name: answers(model, name, x) for name in set(wanted)}
        head = np.stack([rows[name][i] for i, name in enumerate(wanted)])
        names = np.array(wanted, object)
        indices = np.array([["fr", "de", "pt"].index(n) if n else -1 for n in wanted], "int32")
        feeds = {"sequence": x, "adapter": names if ids == "name" else indices}
        return [Call(feeds, {"head": head})]

    return write


def of_adapters(names: Sequence[str]) -> keras.Model:
    """An encoder with random adapters, each of another rank."""
    model = composite()
    for rank, name in enumerate(names, start=1):
        model = kl.apply_lora(model, kl.LoRAConfig(rank=rank), name=name)
    randomize_adapters(model)
    return model


def answers(model: keras.Model, name: str, x: np.ndarray) -> np.ndarray:
    """By Keras, with one adapter active, or none."""
    if not name:
        with kl.disable_adapter(model):
            return model.predict(x, verbose=0)
    kl.set_adapter(model, name)
    return model.predict(x, verbose=0)


EXPORTS: dict[str, Write] = {
    "kinds": kinds,
    "encoder": exported("composite"),
    "classifier": exported("kerashub task"),
    "two outputs": exported("two inputs, two outputs"),
    "text classifier": text_classifier,
    "tokens to tokens": tokens_to_tokens,
    "text to text": text_to_text,
    "adapters by name": many_adapters("name"),
    "adapters by index": many_adapters("index"),
}
