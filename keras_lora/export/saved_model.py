"""SavedModels that a server runs without Keras and without this package."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_lora.checks import given_path, invalid
from keras_lora.export.checking import check_saved_model
from keras_lora.export.classes import labelled
from keras_lora.export.endpoints import Endpoint, serve
from keras_lora.export.keras_hub.generation import generate_text, generate_tokens
from keras_lora.export.keras_hub.preprocessing import classify
from keras_lora.export.keras_hub.tasks import is_task
from keras_lora.export.many.endpoint import ServedAdapters, write_mixed
from keras_lora.export.reports import GraphReport
from keras_lora.export.serving import AdapterIds, Serving
from keras_lora.export.writing import check_export, no_saved_model, write_merged
from keras_lora.files.adapter_files import PathLike
from keras_lora.files.atomic import replaced


def export_saved_model(
    model: keras.Model,
    path: PathLike,
    *,
    adapters: Sequence[str] | None = None,
    adapter_ids: AdapterIds = "name",
    input_signature: Any | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: bool | Sequence[str] = False,
    generate: bool = True,
    max_length: int | None = None,
    stop_token_ids: Sequence[int] | str | None = "auto",
    overwrite: bool = False,
) -> GraphReport:
    """Write a SavedModel for TensorFlow Serving: merged, or one that serves many adapters.

    The model itself stays as it is.

    Unlike `model.export`: variables are stored once (Keras stores them twice), inputs and outputs
    have names (an input the model's own; an output its name in `output_names`, its dict key, or
    `output_0`, `output_1`, ...), float16 and bfloat16 outputs become float32, and a graph that a
    server cannot run is refused. The batch axis is free, as are the axes that the model's inputs
    leave free. The signature is called `serve`, and also `serving_default`.

    A language model of KerasHub (`CausalLM`, `Seq2SeqLM`) has a second signature, `generate`. It
    gives the answers of `model.generate` for the sampler that the model is compiled with. A sampler
    that draws random numbers starts, in every server, from the state that its seed has at the time
    of the export, and goes on from request to request.

    With `adapters`, nothing is merged. The base's weights are stored once, and beside them the
    factors of the adapters and their values of biases and `layers_to_save`. The signature has one
    more input, `adapter`, which names an adapter for each row of the batch:

        y_i = act(x_i W_i + b_i + s (x_i A_i) B_i)        for each row i, and likewise with DoRA

    A request may mix adapters of all ranks and the bare base. A request with an unknown name
    fails, and its error lists the known names. `add_adapter_to_saved_model` adds one more adapter
    without an export.

    Args:
        model: A built model, adapted or plain, on the TensorFlow backend. Without `adapters`, its
            active adapters are merged for the export alone.
        path: The directory to write. It is written under another name and renamed when whole.
        adapters: The names of the adapters to serve, active or not.
        adapter_ids: The values of the input `adapter`: with `"name"` strings, empty for the base;
            with `"index"` int32 numbers, the index in `adapters`, and -1 for the base.
        input_signature: The inputs as a structure of `tf.TensorSpec` or `keras.InputSpec`, as
            the model's `call` takes them. Needed for a subclassed model whose inputs are not all of
            its compute dtype, or for a model that needs axes of a fixed size.
        class_names: For a model with one output: a name for each of its columns. The SavedModel
            then has the output `label` too, for each row the name of its largest value.
        preprocessing: For a task of KerasHub with its preprocessor: True if requests give strings
            or images, and the graph does the rest. A text classifier takes `text` or, with the
            names of segments such as `("premise", "hypothesis")`, an input for each; an image
            classifier takes `image`, float32 before any scaling. Both give `probabilities`: by the
            task's activation or, if it has none, by softmax (by sigmoid if it is compiled with a
            binary cross-entropy). For a language model, `generate` takes `text` and gives `text`,
            and `serve` still takes tokens. The preprocessor decides the length of sequences. The
            server needs the operations of tensorflow-text; a byte-pair tokenizer in it remembers
            every word that it has seen.
        generate: False to leave out the signature `generate` of a language model.
        max_length: The number of tokens of a prompt and its answer together, to which prompts are
            padded. With None, `text` gets the preprocessor's length, and a request of tokens gives
            prompts that are already padded, each batch to its own length.
        stop_token_ids: The tokens that end an answer: `"auto"` for the end token of the
            tokenizer, None for no such token.
        overwrite: Replace `path` if it is a SavedModel, or an empty directory.

    Returns:
        A report on the graph.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: the backend is not TensorFlow, the model is not built, the path exists (with
            `overwrite`: and is not a SavedModel alone), an argument does not fit the model, or a
            server cannot run the graph (it has XLA or Python operations). With `adapters`: a name
            is unknown, a value cannot differ from row to row (in layers other than `Dense` and
            `EinsumDense`), or the first axis of a layer's input is not the batch, as in experts
            that route tokens; all of these are listed.
            Nothing is written.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> path = tempfile.mkdtemp() + "/1"
    >>> names = ["ash", "elm", "fir", "oak", "yew"]
    >>> kl.export_saved_model(model, path, class_names=names).problems
    ()

    Many adapters:

    >>> model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(5, name="up")])
    >>> for name, rank in (("fr", 2), ("de", 3)):
    ...     model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=rank), name=name)
    >>> path = tempfile.mkdtemp() + "/1"
    >>> report = kl.export_saved_model(model, path, adapters=["fr", "de"])
    >>> import tensorflow as tf
    >>> loaded = tf.saved_model.load(path)
    >>> served = loaded.signatures["serving_default"]
    >>> served(x=tf.zeros((3, 3)), adapter=tf.constant(["de", "", "fr"]))["up"].shape
    TensorShape([3, 5])

    Reference:
        TensorFlow Serving, https://www.tensorflow.org/tfx/guide/serving.
        Wen and Chaudhuri 2023, "Batched Low-Rank Adaptation of Foundation Models": an adapter for
        each row of a batch.
    """
    serving = Serving(
        adapters=adapters,
        adapter_ids=adapter_ids,
        input_signature=input_signature,
        class_names=class_names,
        preprocessing=preprocessing,
        generate=generate,
        max_length=max_length,
        stop_token_ids=stop_token_ids,
    )
    return write_saved_model(model, given_path(path), serving, overwrite)


def write_saved_model(
    model: keras.Model, target: Path, serving: Serving, overwrite: bool
) -> GraphReport:
    """`export_saved_model`, with its options as one object."""
    check_export(model, target, overwrite, no_saved_model)
    served = None if serving.adapters is None else ServedAdapters.of(model, serving.adapters)
    endpoints = _endpoints(model, serving)
    with replaced(target) as written:
        if served is None:
            write_merged(model, endpoints, written)
        else:
            # Traced without a tokenizer, whose graph does not know the size of the batch.
            plain = dataclasses.replace(serving, class_names=None, preprocessing=False)
            tried = _endpoints(model, plain)
            write_mixed(served, endpoints, tried, serving.adapter_ids, written)
        report = check_saved_model(written)
        if report.problems:
            raise ValueError(
                f"Expected a graph that TensorFlow Serving can run. Received: {model.name!r}, with "
                f"{'; '.join(report.problems)}."
            )
    return report


def _endpoints(model: keras.Model, serving: Serving) -> list[Endpoint]:
    if is_task(model, "CausalLM"):
        return _language_model(model, serving)
    if serving.has_generation:
        raise invalid(
            "max_length, stop_token_ids",
            "no values for a model that is not a CausalLM of KerasHub",
            (serving.max_length, serving.stop_token_ids),
        )
    if serving.preprocessing is False:
        endpoint = serve(model, serving.input_signature)
    else:
        endpoint = classify(model, serving.preprocessing)
    names = serving.class_names
    return [endpoint if names is None else labelled(endpoint, names)]


def _language_model(model: keras.Model, serving: Serving) -> list[Endpoint]:
    if serving.class_names is not None:
        raise invalid("class_names", "None for a language model", serving.class_names)
    text = serving.preprocessing
    if not isinstance(text, bool) or (text and not serving.generate):
        raise invalid(
            "preprocessing",
            "False, or, for the signature 'generate' of a language model, True",
            text,
        )
    logits = serve(model, serving.input_signature, names=["logits"])
    if not serving.generate:
        return [logits]
    return [logits, (generate_text if text else generate_tokens)(model, serving)]
