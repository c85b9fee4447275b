"""The commands whose subject is an adapter: arguments, options and help.

What a command needs is imported when it runs: Keras and its backend take seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from keras_lora_cli import options as o
from keras_lora_cli.app import command
from keras_lora_cli.output import Answer, steps
from keras_lora_cli.paths import Kind


@command(
    "keras-lora convert adapters/reviews peft/reviews --base presets/llama",
    "keras-lora convert peft/reviews adapters/reviews --base model.keras --head logits=classifier",
    "keras-lora convert adapters/reviews reviews.lora.h5 --base presets/llama",
    "keras-lora convert adapters/reviews small/reviews --to native --dtype bfloat16",
)
def convert(
    source: o.AdapterPath,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="A directory, or a name that ends in .lora.h5 for KerasHub's format.",
        ),
    ],
    base: o.BaseOption = None,
    to: Annotated[
        Literal["native", "peft", "keras-hub"] | None,
        typer.Option(
            help="The format to write. By default, a directory is peft if ADAPTER is native, "
            "and native otherwise."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="The dtype of a directory's tensors: float32, float16 or bfloat16."),
    ] = "float32",
    rank: Annotated[
        int | None,
        typer.Option(help="Truncate a .lora.h5 file to this rank; prints the error."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="To PEFT: the prefix of the modules' names, such as 'transformer.'."),
    ] = None,
    base_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="To PEFT: the field base_model_name_or_path."),
    ] = None,
    layer_names: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="NAME",
            help="To .lora.h5: a name in the target_layer_names of enable_lora.",
        ),
    ] = None,
    task: o.Task = None,
    arguments: o.Arguments = None,
    imports: o.Imports = None,
    heads: o.Heads = None,
    model_type: o.ModelType = None,
    config_file: o.ConfigFile = None,
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Write an adapter in another format.

    PEFT, KerasHub and keras_lora name and shape the factors in their own ways, so the base is
    needed: its architecture, not its weights. Without a base, an adapter can be written in its
    own format with another dtype.
    """
    with steps(3) as bar:
        with bar.starting():
            from keras_lora_cli import converting
        target = converting.Target(
            path=out,
            kind=Kind(to) if to else None,
            dtype=dtype,
            rank=rank,
            prefix=prefix,
            base_model_name=base_model_name,
            layer_names=layer_names or (),
            overwrite=overwrite,
        )
        return converting.convert(
            source,
            target,
            o.made_base(base, task, arguments, imports) if base else None,
            o.peft_options(base, heads, model_type, config_file),
            bar,
        )


@command(
    "keras-lora diff adapters/monday adapters/friday",
    "keras-lora diff adapters/reviews peft/reviews --base presets/llama --tolerance 1e-4",
)
def diff(
    first: o.AdapterPath,
    second: o.AdapterPath,
    base: o.BaseOption = None,
    tolerance: Annotated[
        float, typer.Option(help="The relative distance up to which deltas and values are equal.")
    ] = 1e-6,
    task: o.Task = None,
    arguments: o.Arguments = None,
    imports: o.Imports = None,
    heads: o.Heads = None,
    model_type: o.ModelType = None,
    config_file: o.ConfigFile = None,
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Compare two adapters: their deltas of each layer, their heads and biases, their configs.

    The distance of two deltas D = s A B is |D1 - D2| divided by the larger of |D1| and |D2|
    (Frobenius norms), so it does not matter how a delta is factored. The exit code is 0 if all
    distances are within the tolerance, and 1 otherwise; differences of the configs are listed and
    do not count. Adapters of two formats need --base.
    """
    with steps(3) as bar:
        with bar.starting():
            from keras_lora_cli import differing
        return differing.diff(
            first,
            second,
            o.made_base(base, task, arguments, imports) if base else None,
            o.peft_options(base, heads, model_type, config_file),
            tolerance=tolerance,
            steps=bar,
        )
