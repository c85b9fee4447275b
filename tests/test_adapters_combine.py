"""Combining the adapters of a model: the sum of their deltas, and what does not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import CONFIGS, WEIGHTS, factors, kernels_by_hand, with_adapters
from support.cases import numpy_of
from support.models import functional, state

import keras_lora as kl


def combined(names: Sequence[str] = tuple(CONFIGS), **options: Any) -> keras.Model:
    model = with_adapters(functional(), names)
    kl.combine_adapters(model, {n: w for n, w in WEIGHTS.items() if n in names}, "new", **options)
    return model


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_an_exact_combination_is_the_sum_of_the_deltas(method: str) -> None:
    """The adapters differ in targets, rank, scale and kind of scale; see also test_combining."""
    model = combined(method=method)
    expected = kernels_by_hand(model, WEIGHTS)
    kl.set_adapter(model, "new")
    for path, layer in kl.lora_layers(model).items():
        np.testing.assert_allclose(numpy_of(layer.kernel), expected[path], rtol=1e-4, atol=1e-5)
    if method == "cat":
        ranks = {p: x.adapters["new"].spec.rank for p, x in kl.lora_layers(model).items()}
        assert ranks == {"up": 3 + 2 + 1, "middle": 3 + 1}


def test_a_combination_leaves_its_sources_and_what_acts_alone() -> None:
    model = with_adapters(functional())
    before = {n: factors(model, n) for n in CONFIGS}
    flags = [(v.path, v.trainable) for v in model.variables]
    kl.combine_adapters(model, WEIGHTS, "new", "svd", rank=1)
    assert {n: factors(model, n) for n in CONFIGS} == before
    assert [(v.path, v.trainable) for v in model.variables] == flags
    kl.delete_adapter(model, "new")
    assert {n: factors(model, n) for n in CONFIGS} == before


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, {}, "at least one adapter"),
        ({"es": 1.0}, {}, "names among"),
        ({"fr": np.nan}, {}, "finite numbers"),
        ({"fr": 1.0}, {"method": "sum"}, "method"),
        ({"fr": 1.0, "de": 1.0}, {"method": "linear"}, "Layer 'up'.*equal ranks.*'cat'"),
        ({"fr": 1.0}, {"method": "ties"}, "density"),
        ({"fr": 1.0}, {"name": "de"}, "new adapter name"),
        ({"fr": 1.0}, {"name": "a/b"}, "adapter name"),
    ],
)
def test_a_refused_combination_changes_nothing(
    weights: dict[str, float], options: dict[str, Any], message: str
) -> None:
    model = with_adapters(functional())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.combine_adapters(model, weights, **{"name": "new", **options})
    assert state(model) == before
