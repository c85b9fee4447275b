"""The page of predictions: what it does not plan follows from what it does."""

from __future__ import annotations

import keras
import predictions
import pytest

import keras_lora as kl

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="memory_plan reads TensorFlow's graphs"
)


def test_the_blocks_that_are_not_planned_take_what_the_planned_ones_do() -> None:
    sizes = predictions.Sizes(5, 44, 2, 1, 67, 211)
    config, options = predictions.WAYS["LoRA"]
    whole = kl.memory_plan(sizes.few(5), config, (1, 311), optimizer="adam", **options)
    assert predictions.predicted(sizes, "LoRA", (311,)) == [whole.peak]


def test_a_device_has_room_for_what_is_not_planned() -> None:
    assert [predictions.cell(int(x * 1e9)) for x in (14.4, 14.5, 71.9, 72.1)] == [
        *("14.4 → 16 GB", "14.5 → 24 GB"),
        *("71.9 → 80 GB", "72.1 → none"),
    ]
