"""LiteRT files (`.tflite`), which `ai_edge_litert` runs without TensorFlow and this package."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import given_path, invalid
from keras_lora.export.endpoints import serve
from keras_lora.export.reports import RuntimeReport
from keras_lora.export.runtimes.conversion import (
    Program,
    Runtime,
    UnsupportedError,
    package,
    write_converted,
)
from keras_lora.export.writing import check_export, no_file
from keras_lora.files.adapter_files import PathLike

_EXTRA = "litert"
_SIGNATURE = "serving_default"
_MARK = b"TFL3"  # at byte 4 of every file


def export_litert(
    model: keras.Model,
    path: PathLike,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    input_signature: Any | None = None,
    sample: Any | None = None,
    overwrite: bool = False,
) -> RuntimeReport:
    """Write a merged `.tflite` file, with which LiteRT gives the model's answers.

    The model itself stays as it is. The signature `serving_default` has the names that
    `export_saved_model` gives to inputs and outputs. Its batch axis is free, as are the axes
    that the model's inputs leave free, unless `batch_size` or `sequence_length` sets them. The
    file has LiteRT's own operations alone, so that every interpreter runs it.

    Needs `pip install "keras-lora[litert]"`.

    Args:
        model: A built model, adapted or plain, on the TensorFlow backend. Its active adapters
            are merged for the export alone. A file of mixed precision computes in float32.
        path: The file to write, such as `"model.tflite"`. It is written under another name and
            renamed when whole.
        batch_size: The only batch size that the file takes. Recurrent layers need it, unless
            they are made with `unroll=True`.
        sequence_length: The size of every other axis that the inputs leave free. Rotary
            embeddings, as in Llama and Gemma, need a fixed size.
        input_signature: As for `export_saved_model`.
        sample: A batch of inputs as `predict` takes it, on which the answers are compared. By
            default two random batches, with sizes 7 and 5 on free axes.
        overwrite: Replace `path` if it exists and is such a file.

    Returns:
        The names and shapes, and the largest difference of the answers.

    Raises:
        ImportError: TensorFlow or a package of the extra is not installed.
        ValueError: the backend is not TensorFlow, the model is not built, the path exists, the
            weights are in float16 or bfloat16 or above 2 GB, LiteRT does not have an operation or
            has it for fixed sizes alone, or the answers differ by more than 1e-4 (times the
            largest answer if that is above 1). Nothing is written.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> kl.export_litert(model, tempfile.mkdtemp() + "/model.tflite").inputs
    {'x': (None, 3)}

    Reference:
        LiteRT, https://ai.google.dev/edge/litert/models/signatures
    """
    target = given_path(path)
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        _check_size(name, size)
    check_export(model, target, overwrite, lambda path: no_file(path, _MARK, 4))
    endpoint = serve(model, input_signature)
    signature = keras.tree.map_structure(
        lambda spec: _sized(spec, batch_size, sequence_length), endpoint.signature
    )
    endpoint = dataclasses.replace(endpoint, signature=signature)
    return write_converted(model, endpoint, target, LITERT, sample)


def _check_size(name: str, size: object) -> None:
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise invalid(name, "a positive integer or None", size)


def _sized(spec: tf.TensorSpec, batch: int | None, length: int | None) -> tf.TensorSpec:
    rest = [length if size is None else size for size in spec.shape[1:]]
    return tf.TensorSpec((batch, *rest), spec.dtype, name=spec.name)


def _convert(saved_model: Path) -> bytes:
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(saved_model), signature_keys=[_SIGNATURE]
    )
    try:
        return converter.convert()
    except Exception as error:
        raise UnsupportedError("LiteRT", *_reason(str(error))) from error


# The operations that LiteRT has for fixed sizes alone, by the beginning of their names.
_FIXES = {
    "StridedSlice": "pass sequence_length, since LiteRT has StridedSlice only for fixed sizes",
    "TensorList": "pass batch_size, or make the recurrent layers with unroll=True",
}


def _reason(message: str) -> tuple[str, str]:
    """The reason and the fix, from a message that is pages of source locations."""
    listed = re.findall(r"(?:TF Select|Custom|Flex) ops: (.+)", message)
    names = ", ".join(listed or sorted(set(re.findall(r"'tf\.(\w+)' op", message))))
    if not names:
        return message[:500], ""
    fixes = [fix for name, fix in _FIXES.items() if name in names]
    return f"the operations {names}", "; ".join(fixes) or "use other operations"


def _load(data: bytes) -> Program:
    interpreter = package("ai_edge_litert.interpreter", _EXTRA).Interpreter(model_content=data)
    runner = interpreter.get_signature_runner(_SIGNATURE)
    inputs = {
        name: tuple(None if size < 0 else int(size) for size in details["shape_signature"])
        for name, details in runner.get_input_details().items()
    }
    return Program(inputs, tuple(runner.get_output_details()), lambda arrays: runner(**arrays))


LITERT = Runtime("LiteRT", _EXTRA, ("ai_edge_litert.interpreter",), _convert, _load)
