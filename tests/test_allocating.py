"""`allocate_ranks` against singular values of inputs and gradients by hand, in float64."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.models import state

import keras_lora as kl
from keras_lora.inject import measuring

CONFIG = kl.LoRAConfig(rank=2, alpha=6, targets=["up", "middle", "down"])
SIDES = {"up": (7, 5), "middle": (5, 11), "down": (11, 3)}
RNG = np.random.default_rng(2)
X = (RNG.normal(size=(2, 19, 7)) * [8, 5, 3, 1, 1, 0.5, 0.1]).astype("float32")
Y = RNG.normal(size=(2, 19, 3)).astype("float32")


def linear_model() -> keras.Model:
    """Without activations, so that inputs and gradients are products of matrices."""
    layers = [keras.layers.Dense(k, use_bias=False, name=name) for name, (_, k) in SIDES.items()]
    model = keras.Sequential([keras.Input((7,)), *layers])
    model.compile("sgd", "mse")
    return model


def batches() -> list[Any]:
    return list(zip(X, Y, strict=True))


def squares_by_hand(model: keras.Model, method: str) -> dict[str, np.ndarray]:
    """Of each layer the squared singular values of its inputs by their sum, or of the gradient."""
    x, y = X.reshape(-1, 7).astype("float64"), Y.reshape(-1, 3).astype("float64")
    kernels = {layer.name: numpy_of(layer.kernel).astype("float64") for layer in model.layers}
    inputs = {}
    for name, w in kernels.items():
        inputs[name], x = x, x @ w
    errors, gradients = 2 * (x - y) / (19 * 3), {}  # of the mean over each batch, summed
    for name in reversed(kernels):
        gradients[name] = inputs[name].T @ errors
        errors = errors @ kernels[name].T
    of = inputs if method == "eva" else gradients
    squares = {n: np.linalg.svd(m, compute_uv=False) ** 2 for n, m in of.items()}
    if method == "eva":
        return {n: s / s.sum() for n, s in squares.items()}
    return {n: s / sum(SIDES[n]) for n, s in squares.items()}


def ranks_by_hand(squares: dict[str, np.ndarray], budget: int) -> dict[str, int]:
    """The first directions of all, sorted, that can be paid; at most four of a layer."""
    order = sorted((-s[i], n, i) for n, s in squares.items() for i in range(min(4, *SIDES[n])))
    ranks, closed = dict.fromkeys(squares, 0), set()
    for _, name, index in order:
        cost = sum(SIDES[name])
        if name in closed or cost > budget:
            closed.add(name)
        else:
            assert index == ranks[name]
            budget, ranks[name] = budget - cost, ranks[name] + 1
    return ranks


def ranks_of(config: kl.LoRAConfig) -> dict[str, int]:
    model = kl.apply_lora(linear_model(), config)
    specs = {p: x.adapters["default"].spec for p, x in kl.lora_layers(model).items()}
    assert {spec.scaling for spec in specs.values()} == {CONFIG.spec().scaling}
    return {path: spec.rank for path, spec in specs.items()}


@pytest.mark.parametrize("summed", [512, 6])  # of which inputs the products are summed up
@pytest.mark.parametrize("budget", [14, 40, 60, 84, 200])
@pytest.mark.parametrize("method", ["eva", "gradient"])
def test_the_budget_goes_where_it_gains_most(
    method: str, budget: int, summed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SUMMED", summed)
    model = linear_model()
    before = state(model)
    config = kl.allocate_ranks(model, batches(), CONFIG, parameters=budget, method=method)
    assert state(model) == before
    expected = ranks_by_hand(squares_by_hand(model, method), budget)
    assert ranks_of(config) == {name: rank for name, rank in expected.items() if rank}


def test_the_budget_is_that_of_the_config_by_default() -> None:
    size = sum(2 * sum(sides) for sides in SIDES.values())
    ranks = ranks_of(kl.allocate_ranks(linear_model(), batches(), CONFIG))
    assert size - 16 < sum(rank * sum(SIDES[name]) for name, rank in ranks.items()) <= size


def test_a_short_path_is_not_taken_for_a_longer_one() -> None:
    inputs = keras.Input((7,))
    inner = keras.Sequential([keras.Input((7,)), keras.layers.Dense(7, name="up")], name="block")
    model = keras.Model(inputs, keras.layers.Dense(7, name="up")(inner(inputs)))
    config = kl.LoRAConfig(rank=2, targets=["up"])
    for parameters in (14, 28, 42):
        found = kl.allocate_ranks(model, [X[0]], config, parameters=parameters)
        copy = kl.apply_lora(keras.models.clone_model(model), found)
        ranks = {p: x.adapters["default"].spec.rank for p, x in kl.lora_layers(copy).items()}
        assert ranks == found.rank_pattern
        assert sum(ranks.values()) == parameters // 14


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"method": "svd"}, "method"),
        (CONFIG, {"parameters": 11}, "at least 12"),
        (kl.LoRAConfig(rank_pattern={"up": 3}), {}, "rank_pattern"),
        (kl.LoRAConfig(targets=["other"]), {}, "other"),
    ],
)
def test_what_cannot_be_allocated_is_refused(config: Any, options: Any, message: str) -> None:
    model = linear_model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.allocate_ranks(model, batches(), config, **options)
    assert state(model) == before


def test_rows_of_tokens_are_no_part_of_the_budget() -> None:
    layers = [keras.layers.Embedding(31, 23), keras.layers.Dense(29, name="up")]
    model = keras.Sequential([keras.Input((7,), dtype="int32"), *layers])
    config = kl.LoRAConfig(rank=2, targets=["up"], train_tokens=[3, 5])
    ids = np.random.default_rng(0).integers(31, size=(3, 7)).astype("int32")
    assert kl.allocate_ranks(model, [(ids, ids)], config).rank_pattern == {"up": 2}
