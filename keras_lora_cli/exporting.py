"""`export` and `add-adapter`: a SavedModel for a server, of one adapter or of many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import keras_lora as kl
from keras_lora.export.many.stored import stored_names
from keras_lora.export.saved_model import write_saved_model
from keras_lora.export.serving import Serving
from keras_lora_cli import saved_models
from keras_lora_cli.adapters import PeftOptions
from keras_lora_cli.bases import Base
from keras_lora_cli.merging import activate, adapted_base, answer, check_paths
from keras_lora_cli.output import Answer, Steps, facts
from keras_lora_cli.paths import Kind, check_free, check_kind


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
    """Write a SavedModel of the base with adapters, merged or each by its name."""
    check_paths(base, list(adapters.values()), out, Kind.SAVED_MODEL, overwrite)
    model = adapted_base(base, adapters, options, steps)
    with steps.step("exporting"):
        if not serving.is_mixed:
            activate(model, adapters)
        # `check_paths` has made sure that only a SavedModel is overwritten.
        report = write_saved_model(model, Path(out), serving, overwrite=True)
    found = saved_models.described(out, report)
    return answer(model, out, Kind.SAVED_MODEL, list(adapters), found)


def add_adapter(path: str, adapter: str, name: str, out: str | None) -> Answer:
    """Write the next version of a SavedModel, with one more adapter."""
    check_kind(path, [Kind.SAVED_MODEL])
    check_kind(adapter, [Kind.NATIVE])
    if out is not None:
        check_free(out, Kind.SAVED_MODEL, overwrite=False)
    written = kl.add_adapter_to_saved_model(path, adapter, name, target=out)
    data = {"out": str(written), "adapters": stored_names(written)}
    return Answer(data, [facts(data)])
