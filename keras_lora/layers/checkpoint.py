"""What a checkpoint (`save_weights`) contains of an adapted layer beside its base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from keras import ops

from keras_lora.layers.adapter import LayerAdapter
from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.factors import Factor
from keras_lora.layers.owned import OwnedValues
from keras_lora.layers.state import Active, LoRAState
from keras_lora.lowrank.equations import Tensor

STATE_PREFIX = "lora_"
_SCALING = "scaling."
_UNSCALED = "unscaled."  # the scale without the factor of `scale_adapter`, where there is one
_BASE_PREFIX = f"{STATE_PREFIX}base."
_HAS_DROPOUT = "has_dropout."
_TOKENS = "token_ids."
_SEEDS = "seeds"
_ACTIVE = "active"
_ANY_MATRIX = rf"{STATE_PREFIX}([^.:]+:)?"
_EQUAL_KEY = re.compile(rf"{_ANY_MATRIX}({re.escape(_HAS_DROPOUT)}|{re.escape(_TOKENS)})")
# A model from a `.keras` file does not know its base's own values, and factors come and go. Seeds
# follow from what was ever active. Files of earlier versions do not say which adapters act or have
# dropout.
_OPTIONAL = re.compile(
    rf"{re.escape(_BASE_PREFIX)}|{_ANY_MATRIX}(({_SEEDS}|{_ACTIVE})$|"
    rf"{re.escape(_UNSCALED)}|{re.escape(_HAS_DROPOUT)})"
)
BASE_ONLY = (
    "The weights file contains no adapters: the base's weights were loaded and the adapters of the "
    "model were left as they are. If the file is of a merged model, its adapters now count "
    "twice: call unload_lora(model) first."
)


def adapter_values(state: LoRAState) -> dict[str, np.ndarray]:
    """The values by key."""
    values = {}
    for bank in state.banks.values():
        for name, adapter in bank.adapters.items():
            for which, factor in adapter.named_factors.items():
                values[_key(bank, f"{which}.{name}")] = np.array(factor)
            values[_key(bank, f"{_SCALING}{name}")] = np.array(adapter.scaling, "float32")
            if adapter.scale_factor != 1:
                key = _key(bank, f"{_UNSCALED}{name}")
                values[key] = np.array(adapter.spec.scaling, "float32")
            if adapter.spec.train_tokens:
                values[_key(bank, f"{_TOKENS}{name}")] = np.array(adapter.spec.train_tokens)
            has_dropout = np.array(adapter.spec.dropout > 0, "float32")
            values[_key(bank, f"{_HAS_DROPOUT}{name}")] = has_dropout
        if bank.seeds is not None:
            # Without them a resumed run would draw other dropout masks than an uninterrupted one.
            values[_key(bank, _SEEDS)] = ops.convert_to_numpy(bank.seeds.state)
    return values | {key: item.value(name) for key, item, name in _owned_values(state)}


def active_values(state: LoRAState) -> dict[str, np.ndarray]:
    """Which adapters act, and whether they train, as text in bytes, by key."""
    return {
        _key(bank, _ACTIVE): np.frombuffer(json.dumps([bank.active, bank.trains]).encode(), "uint8")
        for bank in state.banks.values()
    }


def saved_active(state: LoRAState, saved: Mapping[str, Any]) -> list[Active]:
    """The inverse of `active_values`, for each bank; nothing in files of earlier versions."""
    keys = [_key(bank, _ACTIVE) for bank in state.banks.values()]
    return [tuple(json.loads(bytes(np.array(saved[key])))) for key in keys if key in saved]


def assign_values(state: LoRAState, saved: Mapping[str, Any]) -> None:
    """The inverse of `adapter_values`; a scale becomes the factor of `scale_adapter`."""
    put: dict[str, Callable[[Any], None]] = {}
    for bank in state.banks.values():
        for name, adapter in bank.adapters.items():
            for which, factor in adapter.named_factors.items():
                put[_key(bank, f"{which}.{name}")] = factor.assign
        if bank.seeds is not None:
            put[_key(bank, _SEEDS)] = bank.seeds.state.assign
    put |= {key: partial(item.assign, name) for key, item, name in _owned_values(state)}
    for key in put.keys() & saved.keys():
        put[key](saved[key])
    for _, adapter, scaling, _ in _saved_scales(state, saved):
        own = adapter.spec.scaling
        adapter.scale_factor = 1.0 if _close(scaling, own) else scaling / own
    for slot in [slot for bank in state.banks.values() for slot in bank.slots]:
        slot.refresh()


def untrained_values(bank: AdapterBank) -> list[tuple[Factor, Callable[[], Tensor]]]:
    """Magnitudes that are still `|W0|` and rows that are still those of `W0`, as it is later."""
    every, rows = list(bank.adapters.values()), bank.site.rows
    found = [(x.magnitude, bank.norms) for x in every if x.magnitude is not None]
    found += [(x.tokens, rows(x.spec.train_tokens)) for x in every if x.tokens is not None]
    return [(f, of) for f, of in found if np.array_equal(f, ops.convert_to_numpy(of()))]


def _key(bank: AdapterBank, what: str) -> str:
    """The key of a value of a bank; the name of the matrix is in it where a layer has several."""
    matrix = bank.site.name
    return f"{STATE_PREFIX}{matrix}:{what}" if matrix else STATE_PREFIX + what


def check_values(state: LoRAState, saved: Mapping[str, Any], path: str) -> None:
    """Refuse values of other adapters than the layer at `path` has.

    Raises:
        ValueError: keys, shapes or scales differ.
    """
    wrong = _misfits(adapter_values(state), saved) + [
        f"{_SCALING}{name} is {scaling}, expected {adapter.spec.scaling}"
        for name, adapter, scaling, unscaled in _saved_scales(state, saved)
        if not any(_close(x, adapter.spec.scaling) for x in (scaling, unscaled))
        and not _close(scaling, adapter.scaling)
    ]
    if wrong:
        state.refusal = (
            f"Layer '{path}': the file's adapters are not this layer's: "
            f"{'; '.join(sorted(wrong))}. Load it into a model that was adapted with the "
            "same LoRAConfig: apply_lora(model, config), then load_weights."
        )
        raise ValueError(state.refusal)


def _misfits(live: Mapping[str, np.ndarray], saved: Mapping[str, Any]) -> list[str]:
    missing = {key for key in live.keys() - saved.keys() if not _OPTIONAL.match(key)}
    extra = {key for key in saved.keys() - live.keys() if not _OPTIONAL.match(key)}
    wrong = [f"{key} is missing" for key in missing]
    wrong += [f"{key} is not expected" for key in extra]
    for key in live.keys() & saved.keys():
        received, expected = tuple(saved[key].shape), tuple(live[key].shape)
        if received != expected:
            wrong.append(f"{key} has shape {received}, expected {expected}")
        elif _EQUAL_KEY.match(key) and not np.array_equal(saved[key][()], live[key]):
            wrong.append(f"{key} is {saved[key][()]}, expected {live[key]}")
    return wrong


def _saved_scales(
    state: LoRAState, saved: Mapping[str, Any]
) -> Iterator[tuple[str, LayerAdapter, float, float]]:
    """Each adapter of which a file has the scale; this scale, with and without its factor."""
    for bank in state.banks.values():
        for name, adapter in bank.adapters.items():
            scaling = saved.get(_key(bank, f"{_SCALING}{name}"))
            unscaled = saved.get(_key(bank, f"{_UNSCALED}{name}"), scaling)
            if scaling is not None and unscaled is not None and scaling.shape == ():
                yield name, adapter, float(scaling[()]), float(unscaled[()])


def _close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-6)


def _owned_values(state: LoRAState) -> list[tuple[str, OwnedValues, str]]:
    """Key, values and owner of each parked value: other adapters' and the base's own."""
    pairs = [(i, item, n) for i, item in enumerate(state.owned) for n in item.parked]
    return [
        (f"{STATE_PREFIX}held.{i}.{name}" if name else f"{_BASE_PREFIX}{i}", item, name)
        for i, item, name in pairs
    ]
