"""Adapted classes of layers whose matrix is a plain attribute, which Keras stores as it is.

The layer's own code reads the attribute, which is the effective matrix `W` then. Where the code
reads it many times, as a loop over time does, `forming` forms it once.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_check_load_own_variables`: whether a file has the variables of the base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, final

import keras
from keras import ops

from keras_lora.layers.bank import AdapterBank
from keras_lora.layers.guarded import Adapting
from keras_lora.lowrank.equations import Tensor

# The effective matrices that a thread has formed, by bank.
_FORMED: ContextVar[Mapping[Any, Tensor]] = ContextVar(
    "formed_matrices", default=MappingProxyType({})
)


@contextlib.contextmanager
def forming(layers: Iterable[Any], before_call: bool = False) -> Iterator[None]:
    """Within the context, in this thread, each effective matrix of adapted layers is formed once.

    In the dtype in which Keras reads the variable at the moment or, before a layer is called, in
    the layer's compute dtype.
    """
    formed = dict(_FORMED.get())
    for layer in layers:
        for bank in layer.banks.values():
            if bank not in formed and bank.computation.changes_output:
                formed[bank] = (
                    ops.cast(bank.kernel, layer.compute_dtype) if before_call else _as_read(bank)
                )
    token = _FORMED.set(formed)
    try:
        yield
    finally:
        _FORMED.reset(token)


@contextlib.contextmanager
def unformed(layers: Iterable[Any]) -> Iterator[None]:
    """Within the context, in this thread, the matrices of adapted layers are `W0`."""
    base = {bank: bank.site.matrix for layer in layers for bank in layer.banks.values()}
    token = _FORMED.set({**_FORMED.get(), **base})
    try:
        yield
    finally:
        _FORMED.reset(token)


def formed_bank(matrix: Any) -> AdapterBank | None:
    """The bank that a matrix was formed for in this thread, if it was."""
    return next((bank for bank, formed in _FORMED.get().items() if formed is matrix), None)


def _as_read(bank: AdapterBank) -> Tensor:
    """The effective matrix, in the dtype in which Keras reads the variable at the moment."""
    site = bank.site
    if not bank.computation.changes_output:
        return site.matrix  # which Keras stores, integers too
    read = site.dtype if site.is_quantized else ops.convert_to_tensor(site.matrix).dtype
    return ops.cast(bank.kernel, read)


def _effective(bank: AdapterBank) -> Any:
    matrix = _FORMED.get().get(bank)
    return _as_read(bank) if matrix is None else matrix


def with_items(held: Any, items: Mapping[Any, Any]) -> Any:
    """A copy of a list, tuple or dict with other values of some items."""
    if isinstance(held, dict):
        return {**held, **items}
    copied = [items.get(i, value) for i, value in enumerate(held)]
    if isinstance(held, tuple):
        return getattr(held, "_make", tuple)(copied)  # of a named tuple too
    return copied


@final
class EffectiveMatrix:
    """The effective matrix, where the plain layer has `W0` as an attribute of that name.

    Where the attribute is a list, tuple or dict, it is a copy with the effective matrices in it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self._name not in vars(layer):
            raise AttributeError(f"{self._name} of a layer that is not built")
        banks = [b for b in layer.banks.values() if b.site.kind.matrix == self._name]
        if banks[0].site.kind.item is None:
            return _effective(banks[0])
        effective = {bank.site.kind.item: _effective(bank) for bank in banks}
        return with_items(vars(layer)[self._name], effective)

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self._name] = value  # in `build` of the plain layer


class BaseVariables(Adapting, keras.layers.Layer):
    """Abstract: stores the variables of the base alone, under the keys of a plain layer.

    Keras's `Layer` stores every variable, adapters included. Among the bases of a final class
    `LoRALayer` comes before this class.
    """

    def save_own_variables(self, store: Any) -> None:
        layer: Any = self
        for i, variable in enumerate(layer.base_variables):
            store[str(i)] = variable

    def load_own_variables(self, store: Any) -> None:
        layer: Any = self
        layer._check_load_own_variables(store)
        for i, variable in enumerate(layer.base_variables):
            variable.assign(store[str(i)])
