"""The commands: their arguments, options and help. What they do is in modules of their own.

Those modules import TensorFlow, which takes seconds; so each is imported when its command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keras_lora_cli import options as o
from keras_lora_cli.app import command, run
from keras_lora_cli.output import Answer, steps
from keras_lora_cli.paths import CONFIG_FILE, Kind, read_json

if TYPE_CHECKING:
    from keras_lora_cli.adapters import PeftOptions
    from keras_lora_cli.bases import Base

__all__ = ["run"]

_PRESETS = ("attention", "all-linear", "all")


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
            help="Of a model, what to adapt: attention, all-linear (the default), all, re:PATTERN, "
            "or a name; several names by several options."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Of a model, names to leave out.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of a model, the rank of the adapter.")] = 8,
    task: o.Task = None,
    arguments: o.Arguments = None,
    imports: o.Imports = None,
    as_json: o.AsJson = False,  # noqa: ARG001  (read by `command`)
) -> Answer:
    """Say what a model or an adapter is.

    Of a model, the layers that could be adapted, and what an adapter would cost. Of an adapter,
    its format, base, layers, ranks and sizes. Of a SavedModel, its signatures, and what a server
    could not run.
    """
    with steps(2) as bar:
        with bar.starting():
            from keras_lora.config import LoRAConfig
            from keras_lora_cli import inspecting
        base = _base(path, task, arguments, imports)
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
            help="What to write: model.keras, a directory called by a number for a SavedModel (as "
            "servers have versions), or another directory for a preset.",
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
    overwrite: o.Overwrite = False,
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Fold adapters into their base, and write a plain model: no trace of keras_lora is left."""
    with steps(3 + len(adapters)) as bar:
        with bar.starting():
            from keras_lora_cli import merging
        return merging.merge(
            _base(base, task, arguments, imports, no_preprocessor),
            adapters,
            out,
            Kind(format_) if format_ else None,
            _peft(base, heads, model_type, config_file),
            overwrite=overwrite,
            steps=bar,
        )


@command(
    "keras-lora export model.keras served/1",
    "keras-lora export model.keras served/1 --adapter reviews=adapters/reviews",
)
def export(
    base: o.BasePath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The SavedModel's directory.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=ADAPTER", help="An adapter, by this name."),
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
    """Write a SavedModel for TensorFlow Serving, which needs neither Keras nor keras_lora."""
    named = o.pairs(adapters, "--adapter")
    with steps(3 + len(named)) as bar:
        with bar.starting():
            from keras_lora_cli import merging
        return merging.export(
            _base(base, task, arguments, imports, no_preprocessor),
            named,
            out,
            _peft(base, heads, model_type, config_file),
            overwrite=overwrite,
            steps=bar,
        )


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
            help="The format to write. By default, for a directory: peft from native, else native."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the tensors in a directory: float32, float16 or bfloat16.")
    ] = "float32",
    rank: Annotated[
        int | None, typer.Option(help="Truncate a .lora.h5 file to this rank, and say the error.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="To PEFT: what the modules' names begin with, such as 'transformer.'."),
    ] = None,
    base_model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="To PEFT: its base_model_name_or_path."),
    ] = None,
    layer_names: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="NAME",
            help="To .lora.h5: a name of enable_lora's target_layer_names.",
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
    needed: its architecture, not its weights. Without one, an adapter can be written in its own
    format with another dtype.
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
            _base(base, task, arguments, imports) if base else None,
            _peft(base, heads, model_type, config_file),
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
    """Compare two adapters: what each adds to a layer, their heads and biases, their configs.

    The distance of two deltas D = s A B is |D1 - D2| by the larger of |D1| and |D2| (Frobenius),
    so it does not matter how a delta is factored. Exit code 0 where all distances are within the
    tolerance, and 1 where one is not; the configs have no vote. Two formats need --base.
    """
    with steps(3) as bar:
        with bar.starting():
            from keras_lora_cli import differing
        return differing.diff(
            first,
            second,
            _base(base, task, arguments, imports) if base else None,
            _peft(base, heads, model_type, config_file),
            tolerance=tolerance,
            steps=bar,
        )


@command("keras-lora check served/1", "keras-lora check served/1 --json")
def check(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A SavedModel's directory.")],
    as_json: o.AsJson = False,  # noqa: ARG001
) -> Answer:
    """Say what a server with its default settings could not run in a SavedModel.

    Exit code 1 where there is something.
    """
    with steps(1) as bar, bar.starting():
        from keras_lora_cli import inspecting
    return inspecting.check(path)


def _targets(given: Sequence[str] | None) -> str | Sequence[str]:
    if not given:
        return "all-linear"
    alone = len(given) == 1 and (given[0] in _PRESETS or given[0].startswith("re:"))
    return given[0] if alone else given


def _base(
    path: str,
    task: str | None,
    arguments: Sequence[str] | None,
    imports: Sequence[str] | None,
    no_preprocessor: bool = False,
) -> Base:
    from keras_lora_cli.bases import Base

    return Base(
        path=path,
        task=task,
        arguments=o.parsed_arguments(arguments),
        preprocessor=not no_preprocessor,
        modules=imports or (),
    )


def _peft(
    base: str | None, heads: Sequence[str] | None, model_type: str | None, config_file: Path | None
) -> PeftOptions:
    from keras_lora_cli.adapters import PeftOptions

    file = config_file or Path(base or "", CONFIG_FILE)
    config = read_json(file)
    return PeftOptions(
        heads=o.pairs(heads, "--head"),
        model_type=model_type,
        # A preset of Keras has a file of this name too.
        transformers_config=config if "model_type" in config else None,
    )
