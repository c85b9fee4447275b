"""SavedModels for the tests of the server, each with calls and the answers that it must give.

`EXPORTS` maps a name to a function that writes a version directory and returns the calls. The
answers come from elsewhere: `model.predict`, or arithmetic in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import test_export

import keras_lora as kl


@dataclass(frozen=True)
class Call:
    """What goes in, what must come out, and the signature if it is not the default."""

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
    """A row of `test_export.EXPORTS`, and another batch than the model was made with."""

    def write(path: Path) -> list[Call]:
        make, feed, outputs = test_export.EXPORTS[name]
        model = test_export.adapted(make)
        kl.export_saved_model(model, path)
        feeds = feed(model)
        values = test_export.predict(model, feeds)
        expected = dict(zip(outputs, values, strict=True))
        first = {k: v[:1] for k, v in feeds.items()}, {k: v[:1] for k, v in expected.items()}
        return [Call(feeds, expected), Call(*first)]

    return write


EXPORTS: dict[str, Write] = {
    "kinds": kinds,
    "encoder": exported("composite"),
    "classifier": exported("kerashub task"),
    "two outputs": exported("two inputs, two outputs"),
}
