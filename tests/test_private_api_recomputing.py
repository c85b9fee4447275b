"""The private names that rematerialisation needs; `test_private_api.py` has the others."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from support.models import functional
from tensorflow.python.eager import record


def test_keras_asks_a_layer_with_a_remat_mode_how_to_compute() -> None:
    layer = functional().get_layer("up")
    assert layer._remat_mode is None
    asked = []

    def rematerialized_call(call: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((call, args, kwargs))
        return call

    vars(layer).update(_remat_mode="any", rematerialized_call=rematerialized_call)
    x = np.ones((2, 5), "float32")
    layer(x)
    assert [(call, kwargs) for call, _, kwargs in asked] == [(layer.call, {})]


def test_tensorflow_tells_whether_a_tape_records() -> None:
    with tf.GradientTape() as tape:
        assert record.could_possibly_record()
        with tape.stop_recording():
            assert not record.could_possibly_record()
    assert not record.could_possibly_record()


def test_a_graph_notes_how_often_it_calls_a_layer() -> None:
    layer = keras.layers.Dense(5)
    inputs = keras.Input((5,))
    layer(layer(inputs))
    assert len(layer._inbound_nodes) == 2
