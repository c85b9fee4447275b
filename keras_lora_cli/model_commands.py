"""The commands whose subject is a model: arguments, options and help.

What a command needs is imported when it runs: Keras and its backend take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from keras_lora_cli import options as o
from keras_lora_cli.app import command
from keras_lora_cli.output import Answer, steps
from keras_lora_cli.paths import Kind


@command(
    "keras-lora inspect adapters/reviews",
    "keras-lora inspect model.keras --targets attention --rank 4",
    "keras-lora inspect served/1 --json",
)
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model, an adapter or a SavedModel.")
    ],
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="For a model, the layers to adapt: attention, all-linear (the default), "
            "convolutions, experts, all, re:PATTERN, or a name. Repeat it for several names."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="For a model, names to leave out.")
    ] = None,
    rank: Annotated[int, typer.Option(help="For a model, the rank of the adapter.")] = 8,
    task: o.Task = None,
    arguments: o.Arguments = None,
    imports: o.Imports = None,
    as_json: o.AsJson = False,  # noqa: ARG001  (read by `command`)
) -> Answer:
    """Describe a model, an adapter or a SavedModel.

    A model: the layers that could be adapted, and the size of an adapter. An adapter: its format,
    base, layers, ranks and sizes. A SavedModel: its signatures, and what a server could not run.
    """
    with steps(2) as bar:
        with bar.starting():
            from keras_lora.config import LoRAConfig
            from keras_lora_cli import inspecting
        base = o.made_base(path, task, arguments, imports)
        config = LoRAConfig(rank=rank, targets=_targets(targets), exclude=exclude or ())
        return inspecting.inspect(base, config, bar)


@command(
    "keras-lora merge model.keras adapters/reviews merged.keras",
    "keras-lora merge model.keras adapters/reviews served/reviews/1",
    "keras-lora merge presets/bert adapters/reviews adapters/style presets/merged",
    "keras-lora merge hf://user/llama peft/adapter merged --task CausalLM --format preset",
)
def merge(
    base: o.BasePath,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help=f"{o.ADAPTER} Several add up.")
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="The path to write: model.keras, a directory whose name is a number for a "
            "SavedModel (the version that servers look for), or another directory for a preset.",
        ),
    ],
    format_: Annotated[
        Literal["keras", "preset", "saved-model"] | None,
        typer.Option("--format", help="The format of OUT, if its form does not tell it."),
    ] = None,
    task: o.Task = None,
    arguments: o.Arguments = None,
    no_preprocessor: o.NoPreprocessor = False,
    imports: o.Imports = None,
    heads: o.Heads = None,
    model_type: o.ModelType = None,
    config_file: o.ConfigFile = None,
    quantized: Annotated[
        Literal["dequantize", "requantize"] | None,
        typer.Option(help="Of a quantized base: layers in floating point, or integers anew."),
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Fold adapters into their base and write a plain model, which does not need keras_lora."""
    with steps(3 + len(adapters)) as bar:
        with bar.starting():
            from keras_lora_cli import merging
        return merging.merge(
            o.made_base(base, task, arguments, imports, no_preprocessor),
            adapters,
            out,
            Kind(format_) if format_ else None,
            o.peft_options(base, heads, model_type, config_file),
            quantized=quantized,
            overwrite=overwrite,
            steps=bar,
        )


@command(
    "keras-lora export model.keras served/1",
    "keras-lora export model.keras served/1 --adapter en=adapters/en --adapter fr=adapters/fr",
    "keras-lora export presets/bert served/1 --preprocessing --class-name bad --class-name good",
)
def export(
    base: o.BasePath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The SavedModel's directory.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=ADAPTER",
            help="An adapter to serve: each row of a request names one, or the base.",
        ),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Fold the sum of the adapters into the base.")
    ] = False,
    adapter_ids: Annotated[
        Literal["name", "index"],
        typer.Option(help="What requests give: the adapter's name, or its index among --adapter."),
    ] = "name",
    class_names: Annotated[
        list[str] | None,
        typer.Option(
            "--class-name",
            metavar="NAME",
            help="A class's name; repeat it for each, in order. Adds the output label.",
        ),
    ] = None,
    preprocessing: Annotated[
        bool,
        typer.Option("--preprocessing", help="For KerasHub tasks: take strings or images."),
    ] = False,
    segments: Annotated[
        list[str] | None,
        typer.Option(
            "--segment", metavar="NAME", help="Preprocess these inputs as segments of one text."
        ),
    ] = None,
    no_generate: Annotated[
        bool, typer.Option("--no-generate", help="For a language model: its logits alone.")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(help="For a language model: the number of tokens of prompt plus answer."),
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(
            "--stop-token-id",
            help="For a language model: a token that ends an answer; the tokenizer's by default.",
        ),
    ] = None,
    task: o.Task = None,
    arguments: o.Arguments = None,
    no_preprocessor: o.NoPreprocessor = False,
    imports: o.Imports = None,
    heads: o.Heads = None,
    model_type: o.ModelType = None,
    config_file: o.ConfigFile = None,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Write a SavedModel for TensorFlow Serving, which needs neither Keras nor keras_lora.

    With adapters the base's weights are stored once, and requests have one more input, adapter:
    a name for each row of the batch, empty for the base.
    """
    named = o.pairs(adapters, "--adapter")
    with steps(3 + len(named)) as bar:
        with bar.starting(tensorflow_for="export"):
            from keras_lora.export.serving import Serving
            from keras_lora_cli import exporting
        serving = Serving(
            adapters=list(named) if named and not merged else None,
            adapter_ids=adapter_ids,
            class_names=class_names or None,
            preprocessing=segments or preprocessing,
            generate=not no_generate,
            max_length=max_length,
            stop_token_ids=stop_token_ids or "auto",
        )
        return exporting.export(
            o.made_base(base, task, arguments, imports, no_preprocessor),
            named,
            out,
            serving,
            o.peft_options(base, heads, model_type, config_file),
            overwrite=overwrite,
            steps=bar,
        )


@command(
    "keras-lora add-adapter served/1 de=adapters/de",
    "keras-lora add-adapter served/1 de=adapters/de --out served/7",
)
def add_adapter(
    path: Annotated[
        str, typer.Argument(metavar="DIR", help="A SavedModel that was exported with --adapter.")
    ],
    adapter: Annotated[
        str, typer.Argument(metavar="NAME=ADAPTER", help="A native adapter of the same base.")
    ],
    out: Annotated[
        str | None,
        typer.Option(help="The path to write; by default the next version beside DIR."),
    ] = None,
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Write the next version of a SavedModel, with one more adapter.

    The base's weights are hard links to the same files. A server loads the new version by itself.
    """
    ((name, directory),) = o.pairs([adapter], "NAME=ADAPTER").items()
    with steps(1) as bar, bar.starting(tensorflow_for="add-adapter"):
        from keras_lora_cli import exporting
    return exporting.add_adapter(path, directory, name, out)


@command("keras-lora check served/1", "keras-lora check served/1 --json")
def check(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A SavedModel's directory.")],
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """List what a server with its default settings could not run in a SavedModel.

    The exit code is 1 if the list has an item.
    """
    with steps(1) as bar, bar.starting(tensorflow_for="check"):
        from keras_lora_cli import saved_models
    return saved_models.check(path)


def _targets(given: Sequence[str] | None) -> str | Sequence[str]:
    if not given:
        return "all-linear"
    from keras_lora.config import PRESETS

    alone = len(given) == 1 and (given[0] in PRESETS or given[0].startswith("re:"))
    return given[0] if alone else given
