"""The start that corrects a quantized base with the weights that it was made from."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from support.cases import (
    ALPHA,
    RANK,
    Case,
    adapter,
    config,
    kernel_of,
    numpy_of,
    relative,
)
from support.models import CONFIG, functional, state
from support.quantized import LINEAR, TABLES, quantized
from support.starts import best, factor_matrices, matrices

import keras_lora as kl

LOFTQ = "loftq"
GRIDS = ["int8", "int4", "int4, groups of 3"]


def corrected(case: Case, grid: str) -> tuple[keras.Model, keras.Model]:
    model, origin = quantized(case, grid), case.model()
    return kl.apply_lora(model, config(init=LOFTQ), data=origin), origin


@pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", [*LINEAR, TABLES[0]], ids=lambda case: case.id)
def test_a_fresh_adapter_is_the_best_correction_of_its_rank(case: Case, grid: str) -> None:
    model, origin = corrected(case, grid)
    layer = kl.lora_layers(model)["case"]
    w = matrices(case, numpy_of(kernel_of(origin.get_layer("case"))))
    a, b = map(numpy_of, adapter(model).factors)
    effective = matrices(case, numpy_of(kernel_of(layer)))
    with layer.without_adapters():
        q = matrices(case, numpy_of(kernel_of(layer)))
    product = ALPHA / RANK * factor_matrices(case, numpy_of(kernel_of(layer)), a, b)
    assert relative(product, best(w - q, RANK)) <= 1e-4
    lost, left = np.linalg.norm(w - q), np.linalg.norm(w - effective)
    assert left < lost
    np.testing.assert_allclose(
        left, np.linalg.norm(w - q - best(w - q, RANK)), rtol=1e-2, atol=1e-6
    )


def test_outputs_come_nearer_to_those_of_the_model_in_floating_point() -> None:
    case = LINEAR[1]
    model, origin = corrected(case, "int4, groups of 3")
    x = case.batch()
    near = np.linalg.norm(numpy_of(model(x)) - numpy_of(origin(x)))
    with kl.disable_adapter(model):
        far = np.linalg.norm(numpy_of(model(x)) - numpy_of(origin(x)))
    assert near < far
    kl.unload_lora(model)
    expected = quantized(case, "int4, groups of 3")
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(expected(x)))


def test_it_is_an_ordinary_adapter_in_files(tmp_path: Path) -> None:
    case, grid = LINEAR[0], "int4, groups of 3"
    model, _ = corrected(case, grid)
    kl.save_adapter(model, tmp_path / "own")
    kl.load_adapter(loaded := quantized(case, grid), tmp_path / "own")
    x = case.batch()
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))
    assert adapter(loaded).spec.init == LOFTQ
    assert adapter(loaded).counterpart is None


def test_what_it_cannot_correct_is_refused() -> None:
    model = functional()
    model.get_layer("up").quantize("int8")
    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(11, name="up")])
    up = kl.LoRAConfig(rank=2, targets=["up"], init=LOFTQ)
    dora = kl.LoRAConfig(rank=2, targets=["up"], init=LOFTQ, use_dora=True)
    before = state(model)
    for config_, data, message in [
        (up, None, "Invalid `data`: expected the model in floating point"),
        (up, [np.ones((2, 5))], "Invalid `data`: expected the model in floating point"),
        (up, model, r"Invalid `data`: expected a model with \['up'\] in floating point"),
        (up, other, r"Invalid `data`: expected a model with \['up'\] in floating point"),
        (dora, functional(), "Invalid `use_dora`"),
        (kl.LoRAConfig(rank=2, init=LOFTQ), functional(), r"\['middle'\], which are not quantized"),
        (CONFIG, functional(), "Invalid `data`: expected None"),
    ]:
        with pytest.raises(ValueError, match=message):
            kl.apply_lora(model, config_, data=data)
        assert state(model) == before
