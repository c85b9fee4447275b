"""The page of predictions: what it does not plan follows from what it does."""

from __future__ import annotations

from pathlib import Path

import keras
import predictions
import pytest

import keras_lora as kl

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="memory_plan reads TensorFlow's graphs"
)
PAGE = Path(__file__).parents[1] / predictions.PAGE


def test_the_blocks_that_are_not_planned_take_what_the_planned_ones_do() -> None:
    sizes = predictions.Sizes(4, 44, 2, 1, 67, 211)
    config, options = predictions.WAYS["LoRA"]
    whole = kl.memory_plan(sizes.few(4), config, (1, 311), optimizer="adam", **options)
    assert predictions.predicted(sizes, "LoRA", (311,)) == [whole.peak]


@pytest.mark.slow
def test_the_page_has_what_the_plan_says() -> None:
    name, way = "7B, Llama 2 7B", "LoRA"
    (peak,) = predictions.predicted(predictions.MODELS[name], way, predictions.LENGTHS[:1])
    page = PAGE.read_text()
    assert f"| {name} | {way} | {predictions.cell(peak)} |" in page, "run `make predictions`"
    assert page.startswith(predictions.HEAD)


def test_a_device_has_room_for_what_is_not_planned() -> None:
    assert [predictions.cell(int(x * 1e9)) for x in (14.4, 14.5, 71.9, 72.1)] == [
        *("14.4 → 16 GB", "14.5 → 24 GB"),
        *("71.9 → 80 GB", "72.1 → none"),
    ]
