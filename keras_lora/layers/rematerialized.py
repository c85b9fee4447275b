"""Adapted layers in a `keras.RematScope`, whose calls are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_lora.layers.computation import computing
from keras_lora.layers.guarded import Adapting
from keras_lora.layers.state import LoRAState


class Rematerialized(Adapting, keras.layers.Layer):
    """Abstract: a layer whose call may be computed again, with the same result."""

    _lora: LoRAState

    def rematerialized_call(self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As Keras does it, with flags as constants and dropout that is drawn once.

        Keras passes every argument as a tensor, for which the `call` of a plain `Dense`, without
        `training`, gives no occasion.
        """
        flags = {name: flag for name, flag in kwargs.items() if isinstance(flag, bool | None)}
        call = super().rematerialized_call(self._repeatable(layer_call, flags), *args, **kwargs)
        return lambda *a, **k: call(*a, **{name: x for name, x in k.items() if name not in flags})

    def _repeatable(
        self, call: Callable[..., Any], flags: dict[str, bool | None]
    ) -> Callable[..., Any]:
        """The call with these flags, which gives the same however often it is computed."""
        training, banks = flags.get("training"), self._lora.banks.values()
        computations = {bank: bank.computation.repeatable(training) for bank in banks}

        def repeated(*args: Any, **kwargs: Any) -> Any:
            with computing(computations):
                return call(*args, **flags, **kwargs)

        return repeated
