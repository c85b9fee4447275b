"""The arguments and options that several commands have, and their parsing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keras_lora_cli.paths import CONFIG_FILE, read_json, refused

if TYPE_CHECKING:
    from keras_lora_cli.adapters import PeftOptions
    from keras_lora_cli.bases import Base

BASE = "A .keras file, a preset or Hugging Face directory, or a handle such as hf://user/model."
ADAPTER = "An adapter's directory (native or PEFT's), or a .lora.h5 file."

BasePath = Annotated[str, typer.Argument(metavar="BASE", help=BASE)]
BaseOption = Annotated[str | None, typer.Option("--base", metavar="BASE", help=BASE)]
AdapterPath = Annotated[str, typer.Argument(metavar="ADAPTER", help=ADAPTER)]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="CLASS",
        help="The class in keras_hub.models to load a preset as, such as CausalLM. By default "
        "the class that it was saved from, or the backbone.",
    ),
]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="An argument of from_preset, such as num_classes=2."
    ),
]
NoPreprocessor = Annotated[
    bool,
    typer.Option("--no-preprocessor", help="Load a task without its preprocessor and tokenizer."),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="A module to import first: it registers your own layers.",
    ),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head",
        metavar="LAYER=MODULE",
        help="PEFT: the Hugging Face module of a head, such as logits=classifier.",
    ),
]
ModelType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="PEFT: Hugging Face's name of the architecture, if several share a class.",
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--transformers-config",
        metavar="FILE",
        help="PEFT: the base's config.json, for the few converters that need it. The file of a "
        "Hugging Face directory is read without this option.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output of the same kind.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def parsed_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` each; a value that is not JSON is text.

    Example:

    >>> parsed_arguments(["num_classes=2", "dtype=bfloat16"])
    {'num_classes': 2, 'dtype': 'bfloat16'}
    """
    return {name: _parsed(value) for name, value in pairs(given, "--set").items()}


def pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` each.

    Raises:
        ValueError: an item without a name, a sign or a value, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for item in given or ():
        name, sign, value = item.partition("=")
        if not (name and sign and value) or name in found:
            raise ValueError(
                f"Invalid {option}: expected NAME=VALUE, each name once. Received: {item!r}."
            )
        found[name] = value
    return found


def made_base(
    path: str,
    task: str | None,
    arguments: Sequence[str] | None,
    imports: Sequence[str] | None,
    no_preprocessor: bool = False,
) -> Base:
    """The base that these options describe."""
    from keras_lora_cli.bases import Base

    return Base(
        path=path,
        task=task,
        arguments=parsed_arguments(arguments),
        preprocessor=not no_preprocessor,
        modules=imports or (),
    )


def peft_options(
    base: str | None, heads: Sequence[str] | None, model_type: str | None, config_file: Path | None
) -> PeftOptions:
    """These options of the Hugging Face model, and the config in its directory."""
    from keras_lora_cli.adapters import PeftOptions

    return PeftOptions(
        heads=pairs(heads, "--head"),
        model_type=model_type,
        transformers_config=_transformers_config(base, config_file),
    )


def _transformers_config(base: str | None, given: Path | None) -> dict[str, Any] | None:
    if given is None and base is None:
        return None
    file = given or Path(str(base), CONFIG_FILE)
    config = read_json(file)
    if "model_type" in config:
        return config
    if given is not None:
        expected = "the config.json of a Hugging Face model, with a model_type"
        raise refused(str(given), expected, "none" if not config else "another", "check the path")
    return None  # the config.json of a KerasHub preset


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
