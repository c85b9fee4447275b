"""Adapters in files of their own: `save_adapter` and `load_adapter`.

Tensors are named by the path of their layer, with `lora_a`, `lora_b` or `lora_magnitude` at the
end, or with the name of the variable where an adapter has its own value of one (a head, a bias).
Numbers that Keras gave to layers without a name are left out of the paths, since another process
may count otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np

from keras_lora.checks import AdapterFileError, invalid, warn
from keras_lora.files.adapter_files import PathLike, write_adapter_files
from keras_lora.files.keys import (
    base_fingerprint,
    owned_by,
    stable_banks,
    values_beside,
)
from keras_lora.files.matching import Loaded
from keras_lora.inject import (
    CHOOSING,
    Plan,
    active_names,
    check_names,
    install,
    loses_dropout,
    misfits,
    plan_factors,
    plan_of,
    trained_by_none,
    turn,
    unique,
    whole_adapters,
)
from keras_lora.inject import replace as replace_adapter
from keras_lora.layers import DEFAULT_ADAPTER, Adapter, LayerAdapter, check_adapter_name, grid_of
from keras_lora.version import __version__
from keras_lora.walker import Tree

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def save_adapter(
    model: keras.Model,
    directory: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    overwrite: bool = False,
    dtype: str = "float32",
) -> None:
    """Write one adapter: its factors, and its values of biases and `layers_to_save`.

    What trains in `model` and belongs to no adapter, such as a head that was put on an adapted
    backbone, is written too, and belongs to the adapter in the model that loads it.

    `adapter.safetensors` has everything; `adapter_config.json` repeats the config for people. A
    process that is killed at any moment leaves the old adapter or the new one.

    An adapter of a start with a counterpart (`init="pissa"`) is written with the factors `A0` and
    `B0`, so that its training goes on as before. In 16 bits, where `A - A0` would lose its digits,
    it is written as what it computes: as an ordinary adapter of twice the rank.

    Args:
        model: An adapted model.
        directory: The directory to write; made if it does not exist.
        name: The adapter, active or not. Its name is not written: it is given when loading.
        overwrite: Replace an adapter that the directory contains.
        dtype: `"float32"`, or `"float16"` or `"bfloat16"` for half the bytes, rounded once.

    Raises:
        ValueError: the model has no such adapter, or an unknown dtype.
        AdapterFileError: the directory contains an adapter and `overwrite` is false, values are
            not finite (in that dtype), or the files cannot be written.

    Example:

    >>> import tempfile, keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> directory = tempfile.mkdtemp()
    >>> kl.save_adapter(model, directory)
    >>> kl.read_adapter_files(directory).tensors["up/lora_a"].shape
    (3, 2)
    """
    with turn(model, "save_adapter", CHOOSING) as tree:
        (name,) = check_names(tree, [name])
        if dtype not in _DTYPES:
            raise invalid("dtype", f"one of {sorted(_DTYPES)}", dtype)
        keys = tree.variable_keys
        beside = {keys[id(variable)]: value for variable, value in values_beside(tree, name)}
        ordinary = dtype != "float32"
        tensors = adapter_tensors(tree, name, ordinary=ordinary) | beside
        description = _description(tree, name, list(beside), ordinary)
    with np.errstate(over="ignore"):  # an overflow is refused below, with its key
        tensors = {key: value.astype(_DTYPES[dtype]) for key, value in tensors.items()}
    write_adapter_files(directory, description, tensors, overwrite=overwrite)


def load_adapter(
    model: keras.Model,
    directory: PathLike,
    name: str = DEFAULT_ADAPTER,
    *,
    replace: bool = False,
    allow_other_base: bool = False,
) -> None:
    """Add an adapter from files to a model, which need not be adapted yet.

    Where no adapter is active, the new one is active and trains at once. Otherwise it waits for
    `set_adapter`, and nothing changes for the others.

    With `replace`, it takes the place of the adapter of that name. Its scale may differ, its rank
    may not be higher (nor lower, where an optimizer trains that does not go by element; see
    `set_adapter`), and it may have DoRA only where an adapter with DoRA was active before. Only
    values change: nothing is traced again, and a service changes its task between two requests. A
    layer that only the old adapter was on loses it.

    Args:
        model: A built model of the same architecture as the one that was adapted.
        directory: What `save_adapter` wrote.
        name: The adapter's name in this model.
        replace: Put it in the place of the adapter of that name.
        allow_other_base: Take the adapter of a model with other shapes, as far as it fits; what is
            left out is listed in a warning.

    Raises:
        ValueError: a name that is taken (or, to replace, that the model does not have), or layers
            that cannot be adapted.
        AdapterFileError: the files are damaged, belong to another base, or do not fit; everything
            that does not fit is listed. The model is then as it was.

    Example:

    >>> import tempfile, keras, keras_lora as kl
    >>> def base():
    ...     return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(base(), kl.LoRAConfig(targets=["up"], rank=2))
    >>> directory = tempfile.mkdtemp()
    >>> kl.save_adapter(model, directory)
    >>> other = base()
    >>> kl.load_adapter(other, directory, "fr")
    >>> kl.lora_layers(other)["up"].active_adapters
    ('fr',)
    """
    check_adapter_name(name)
    with turn(model, "load_adapter") as tree:
        if replace:
            check_names(tree, [name])
        loaded = Loaded.read(tree, directory, allow_other_base)
        if replace:
            plan = plan_of(name, loaded.adapter, loaded.layers, loaded.values)
            _check_replaceable(tree, plan, loaded.directory)
            replace_adapter(tree, plan)
            return
        plan = plan_factors(tree, name, loaded.adapter, loaded.layers, loaded.values)
        install(tree, plan, active=not active_names(tree))


def _parts(tree: Tree, name: str, ordinary: bool) -> dict[str, LayerAdapter]:
    banks = {path: bank for path, bank in stable_banks(tree).items() if name in bank.adapters}
    return {p: x.ordinary(name) if ordinary else x.adapters[name] for p, x in banks.items()}


def adapter_tensors(tree: Tree, name: str, *, ordinary: bool) -> dict[str, np.ndarray]:
    """The factors and owned values of an adapter, by key; with `ordinary` without counterparts."""
    tensors = {
        f"{path}/lora_{which}": np.array(factor)
        for path, part in _parts(tree, name, ordinary).items()
        for which, factor in part.named_factors.items()
    }
    keys = tree.variable_keys
    return tensors | {keys[id(item.variable)]: item.value(name) for item in owned_by(tree, name)}


def _description(tree: Tree, name: str, beside: Sequence[str], ordinary: bool) -> dict[str, Any]:
    """What `adapter_config.json` says; `beside` has the keys of variables of the base."""
    layers = _parts(tree, name, ordinary)
    specs = {path: adapter.acting_spec.to_dict() for path, adapter in layers.items()}
    common = next(iter(specs.values()))
    keys, whole = tree.variable_keys, whole_adapters(tree, [name]).get(name)
    model = tree.root
    free = [v for v in trained_by_none(tree) if v.trainable]
    trained = unique([*(whole.trained if whole else ()), *free])
    banks = stable_banks(tree)
    grids = {path: grid for path in layers if (grid := grid_of(banks[path].site.layer))}
    return {
        "keras_lora_version": __version__,
        "keras_version": keras.__version__,
        "config": _plain_config(whole, list(layers)),
        "spec": common,
        "layer_specs": {path: spec for path, spec in specs.items() if spec != common},
        "variables": beside,
        "trained": [keys[id(v)] for v in trained if id(v) in keys],
        "base": {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "name": model.name,
            "fingerprint": base_fingerprint(tree),
        },
        **({"quantization": grids} if grids else {}),
    }


def _plain_config(whole: Adapter | None, paths: Sequence[str]) -> dict[str, Any] | None:
    if whole is None or whole.config is None:
        return None
    config = whole.config
    # A file cannot contain a function: it gets the paths that the function selected.
    return (
        dataclasses.replace(config, targets=paths) if callable(config.targets) else config
    ).to_dict()


def _check_replaceable(tree: Tree, plan: Plan, directory: str) -> None:
    """Whether the adapter fits where the old one is, so that no function is traced again."""
    problems = misfits(tree, plan)
    if problems:
        raise AdapterFileError(
            f"Invalid {directory!r}: expected an adapter that fits in the place of {plan.name!r} "
            f"without a new trace. Received: {'; '.join(problems)}; use delete_adapter and then "
            "load_adapter without replace."
        )
    if loses_dropout(tree, plan):
        warn(
            f"{directory!r}: its dropout is left out, since the model computes none. "
            "Inference is the same; to train it, load it without replace."
        )
