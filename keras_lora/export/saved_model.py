"""SavedModels that a server runs without Keras and without this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.export.checking import check_saved_model
from keras_lora.export.classes import labelled
from keras_lora.export.endpoints import Endpoint, serve
from keras_lora.export.keras_hub.generation import Generation, generate_text, generate_tokens
from keras_lora.export.keras_hub.preprocessing import classify
from keras_lora.export.keras_hub.tasks import is_task
from keras_lora.export.many.endpoint import AdapterIds, RowAdapters, check_adapter_ids, write_rows
from keras_lora.export.reports import GraphReport
from keras_lora.export.writing import check_export, write_merged
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

    The model itself is left as it was.

    Against `model.export`: variables are stored once (Keras stores them twice), inputs and
    outputs have names (those of the model's inputs; `output_names`, dict keys or `output_0`,
    `output_1`, ...), float16 and bfloat16 outputs become float32, and a graph that a server
    cannot run is refused. The batch axis is free, as are the axes that the model's inputs leave
    free. The signature is called `serve`, and `serving_default`.

    A causal language model of KerasHub (or one from sequence to sequence) has a second signature,
    `generate`, with the answers of `model.generate` for the sampler that the model is compiled
    with, greedy or not. A sampler that draws goes on from request to request from the seed's state
    at the time of the export, so that each server that starts draws the same.

    With `adapters`, nothing is merged. The base's weights are stored once, and beside them the
    factors of the adapters and their values of biases and `layers_to_save`. The signature has an
    input more, `adapter`, which says for each row of the batch what it gets:

        y_i = act(x_i W_i + b_i + s (x_i A_i) B_i)        for each row i, and likewise with DoRA

    A request may mix adapters of all ranks and the bare base; an unknown name fails it, with the
    known ones in the error. One more adapter needs no export: `add_adapter_to_saved_model`.

    Args:
        model: A built model, adapted or plain, on the TensorFlow backend. Without `adapters`, its
            active adapters are merged for the export alone.
        path: The directory to write; made whole beside it and then renamed.
        adapters: The names of the adapters to serve, active or not.
        adapter_ids: What `adapter` holds for each row: `"name"`, a string, empty for the base; or
            `"index"`, an int32, the place in `adapters`, and -1 for the base.
        input_signature: For a subclassed model whose inputs are not all of its compute dtype, or
            for one that needs axes of a fixed size: a structure of `tf.TensorSpec` or
            `keras.InputSpec` as its `call` takes it.
        class_names: For a model with one output: a name for each of its columns. The output
            `label` is added, the name of the largest value of each row.
        preprocessing: For a task of KerasHub with its preprocessor: True if strings (or images)
            are to come in, and all else is to be done in the graph. A text classifier takes
            `text`, or, given the names of segments such as `("premise", "hypothesis")`, these;
            an image classifier takes `image`, float32 before any scaling. Both give
            `probabilities`: by the task's activation, or, where it has none, softmax (sigmoid if
            it is compiled with a binary cross-entropy). Of a language model, `generate` takes
            `text` and gives `text`, and `serve` remains one of tokens. The length of sequences
            is the preprocessor's. The server needs the operations of tensorflow-text, and a
            byte-pair tokenizer keeps there every word that it has seen.
        generate: False to leave out the signature `generate` of a language model.
        max_length: Tokens of a prompt and its answer together: prompts are padded to it. None for
            that of the preprocessor if text comes in, and else for prompts that are padded to
            the wanted length already, each batch to its own.
        stop_token_ids: The answer ends with one of these: `"auto"` for the end of the tokenizer,
            None for none.
        overwrite: Replace `path` if it exists.

    Returns:
        A report on the graph.

    Raises:
        ValueError: another backend than TensorFlow, an unbuilt model, a path that exists,
            arguments that are not for this model, or a graph that a server cannot run (XLA or
            Python operations). With `adapters`: unknown names, values that cannot differ from row
            to row (of layers that are not `Dense` or `EinsumDense`), or layers whose input does
            not have the batch as its first axis, as experts that route tokens; all are listed.
            Nothing is then written.

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
    """
    target = Path(path)
    check_export(model, target, overwrite)
    check_adapter_ids(adapter_ids)
    rows = None if adapters is None else RowAdapters.of(model, adapters)
    generation = Generation(generate, max_length, stop_token_ids)
    endpoints = _endpoints(model, input_signature, class_names, preprocessing, generation)
    with replaced(target) as written:
        if rows is None:
            write_merged(model, endpoints, written)
        else:
            # Without text: a tokenizer's graph does not know the size of the batch.
            tried = _endpoints(model, input_signature, None, False, generation)
            write_rows(rows, endpoints, tried, adapter_ids, written)
        report = check_saved_model(written)
        if report.problems:
            raise ValueError(
                f"Expected a graph that TensorFlow Serving can run. Received: {model.name!r}, with "
                f"{'; '.join(report.problems)}."
            )
    return report


def _endpoints(
    model: keras.Model,
    given: Any | None,
    class_names: Sequence[str] | None,
    preprocessing: bool | Sequence[str],
    generation: Generation,
) -> list[Endpoint]:
    if is_task(model, "CausalLM"):
        if class_names is not None:
            raise invalid("class_names", "None for a language model", class_names)
        return _language_model(model, given, preprocessing, generation)
    if generation.given:
        raise invalid(
            "max_length, stop_token_ids",
            "no values for a model that is not a CausalLM of KerasHub",
            (generation.max_length, generation.stop_token_ids),
        )
    served = serve(model, given) if preprocessing is False else classify(model, preprocessing)
    return [served if class_names is None else labelled(served, class_names)]


def _language_model(
    model: keras.Model, given: Any | None, preprocessing: object, generation: Generation
) -> list[Endpoint]:
    served = serve(model, given, names=["logits"])
    if not isinstance(preprocessing, bool) or (preprocessing and not generation.wanted):
        raise invalid(
            "preprocessing",
            "False, or, for the signature 'generate' of a language model, True",
            preprocessing,
        )
    if not generation.wanted:
        return [served]
    if preprocessing:
        return [served, generate_text(model, generation)]
    return [served, generate_tokens(model, generation, given)]
