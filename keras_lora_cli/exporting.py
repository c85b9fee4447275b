"""`export` and `add-adapter`: a SavedModel for a server, of one adapter or of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import keras_lora as kl
from keras_lora_cli.adapters import PeftOptions
from keras_lora_cli.bases import Base
from keras_lora_cli.inspecting import describe_export, served_adapters
from keras_lora_cli.merging import adapted_base, answer, check_paths, let_act
from keras_lora_cli.output import Answer, Steps, facts
from keras_lora_cli.paths import Kind, check_free, check_kind


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is served; see `keras_lora.export_saved_model`.

    Attributes:
        merged: Fold the adapters into the base, instead of serving each by its name.
        adapter_ids: As there.
        class_names: As there.
        preprocessing: As there.
        generate: As there.
        max_length: As there.
        stop_token_ids: As there; None for that of the tokenizer.
    """

    merged: bool = False
    adapter_ids: Literal["name", "index"] = "name"
    class_names: Sequence[str] | None = None
    preprocessing: bool | Sequence[str] = False
    generate: bool = True
    max_length: int | None = None
    stop_token_ids: Sequence[int] | None = None


def export(
    base: Base,
    adapters: Mapping[str, str],
    out: str,
    serving: Serving,
    options: PeftOptions,
    *,
    overwrite: bool,
    steps: Steps,
) -> Answer:
    """Write a SavedModel that serves the base, or many adapters by their names, or their sum."""
    check_paths(base, list(adapters.values()), out, Kind.SAVED_MODEL, overwrite)
    model = adapted_base(base, adapters, options, steps)
    several = adapters and not serving.merged
    with steps.step("exporting"):
        if not several:
            let_act(model, adapters)
        report = kl.export_saved_model(
            model,
            out,
            adapters=list(adapters) if several else None,
            adapter_ids=serving.adapter_ids,
            class_names=serving.class_names,
            preprocessing=serving.preprocessing,
            generate=serving.generate,
            max_length=serving.max_length,
            stop_token_ids=serving.stop_token_ids or "auto",
            overwrite=True,  # `check_free` has looked
        )
    return answer(model, out, Kind.SAVED_MODEL, list(adapters), describe_export(report, out))


def add_adapter(path: str, adapter: str, name: str, out: str | None) -> Answer:
    """Write the next version of a SavedModel, with one adapter more."""
    check_kind(path, [Kind.SAVED_MODEL])
    check_kind(adapter, [Kind.NATIVE])
    if out is not None:
        check_free(out, Kind.SAVED_MODEL, overwrite=False)
    written = str(kl.add_adapter_to_saved_model(path, adapter, name, target=out))
    data = {"out": written, "adapters": served_adapters(written)}
    return Answer(data, [facts(data)])
