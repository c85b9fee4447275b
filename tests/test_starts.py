"""Starts of adapters: the invariants over layers and dtypes, and each start's own property."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from support.cases import (
    ALPHA,
    BY_ID,
    RANK,
    ROUNDING,
    Case,
    adapter,
    config,
    kernel_of,
    named,
    numpy_of,
    randomize,
    reference_delta,
    reference_dora,
    reference_output,
    relative,
    snapshot,
)
from support.starts import best, decaying, factor_matrices, matrices

import keras_lora as kl
from keras_lora.layers import LayerAdapter

STARTS = ("orthogonal", "pissa", "pissa:3", "olora")
FROM_MATRIX = STARTS[1:]
SCALE = ALPHA / RANK
# JAX has no float64 by default.
DTYPES = [*ROUNDING, *(["float64"] if keras.backend.backend() != "jax" else [])]
every_start = pytest.mark.parametrize("init", STARTS)
CASES = named(
    "dense, activation",
    "btd,dnh->btnh",
    "btd,hdn->bhnt",
    "bed,edf->bef",
    "embedding",
    "reversible, tied",
    "reverse",
    "conv1d, causal",
    "conv1d, transposed",
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def base_kernel(model: keras.Model) -> np.ndarray:
    return numpy_of(kernel_of(model.get_layer("case")))


def delta(case: Case, part: LayerAdapter, scale: float = SCALE) -> np.ndarray:
    """`s (A B - A0 B0)` in the kernel's shape."""
    found = {name: numpy_of(factor) for name, factor in part.named_factors.items()}
    learned = reference_delta(case, found["a"], found["b"], scale)
    return learned - (
        reference_delta(case, found["a0"], found["b0"], scale) if "a0" in found else 0
    )


@every_case
@every_start
def test_the_invariants_of_a_layer_with_a_start(case: Case, init: str) -> None:
    model, x = case.model(), case.batch()
    base, w0, output = snapshot(model.weights), base_kernel(model), numpy_of(model(x))
    kl.apply_lora(model, config(init=init))
    assert relative(model(x), output) <= 1e-6
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b"]

    randomize(adapter(model).factors)
    kernel = w0 + delta(case, adapter(model))
    expected = reference_output(case, model, x, kernel)
    assert relative(model(x), expected) <= 1e-5
    assert relative(kernel_of(model.get_layer("case")), kernel) <= 1e-5
    with kl.disable_adapter(model):
        assert relative(model(x), output) <= 1e-6
    kl.scale_adapter(model, "default", -0.5)
    scaled = reference_output(case, model, x, w0 + delta(case, adapter(model), -0.5 * SCALE))
    assert relative(model(x), scaled) <= 1e-5
    kl.scale_adapter(model, "default", 1.0)

    with kl.merged(model) as plain:
        assert relative(plain(x), expected) <= 1e-5
    kl.unload_lora(model)
    assert snapshot(model.weights) == base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", named("dense, activation", "bed,edf->bef", "embedding"))
@every_start
def test_starts_of_other_dtypes_stay_within_rounding(case: Case, dtype: str, init: str) -> None:
    model, x, rounding = case.model(dtype=dtype), case.batch(), ROUNDING.get(dtype, 1e-5)
    w0, output = base_kernel(model), numpy_of(model(x))
    kl.apply_lora(model, config(init=init))
    # With a counterpart the difference is exactly zero; otherwise A B is rounded in 16 bits.
    fresh = relative(model(x), output)
    assert fresh <= rounding if init == "orthogonal" else fresh == 0
    assert {str(f.dtype) for f in adapter(model).named_factors.values()} == {"float32"}
    randomize(adapter(model).factors)
    expected = reference_output(case, model, x, w0 + delta(case, adapter(model)))
    assert relative(model(x), expected) <= rounding
    kl.merge_lora(model)
    assert relative(model(x), expected) <= rounding


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("init", FROM_MATRIX)
def test_what_is_learned_beside_a_large_counterpart_is_not_lost(dtype: str, init: str) -> None:
    """A change of 0.1% of A and B is less than the rounding of A and B to 16 bits."""
    layer = keras.layers.Dense(103, dtype=dtype, use_bias=False, name="case")
    model = keras.Sequential([keras.Input((101,)), layer])
    layer.kernel.assign(decaying(101, 103))
    x = np.random.default_rng(0).normal(size=(31, 101)).astype("float32")
    kl.apply_lora(model, config(init=init))
    rng = np.random.default_rng(1)
    for factor in adapter(model).factors:
        value = np.array(factor)
        factor.assign(value * (1 + 1e-3 * rng.normal(size=value.shape)))
    expected = x @ delta(BY_ID["dense"], adapter(model))
    adapted = kl.lora_layers(model)["case"]
    ((_, a, b, _),) = adapted.bank.computation.terms(adapted.bank.site, x, False)
    received = adapted.bank.site.products(x).update(keras.ops.cast(x, "bfloat16"), a, b)
    assert relative(received, expected) <= 3e-2


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("case", named("dense, activation", "btd,dnh->btnh", "bed,edf->bef"))
@pytest.mark.parametrize("init", FROM_MATRIX)
def test_a_start_with_dora_or_rslora(case: Case, options: dict[str, Any], init: str) -> None:
    model, x = case.model(), case.batch()
    w0, output = base_kernel(model), numpy_of(model(x))
    kl.apply_lora(model, config(init=init, **options))
    assert relative(model(x), output) <= 1e-6
    randomize(adapter(model).factors)
    part = adapter(model)
    kernel = w0 + delta(case, part, ALPHA / np.sqrt(RANK) if "use_rslora" in options else SCALE)
    if part.magnitude is not None:
        kernel = reference_dora(case, kernel, numpy_of(part.magnitude))
    expected = reference_output(case, model, x, kernel)
    assert relative(model(x), expected) <= 1e-5
    assert relative(kl.merge_lora(model)(x), expected) <= 1e-5


@every_case
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_begins_with_the_best_part_of_the_matrix(case: Case, use_rslora: bool) -> None:
    model = case.model()
    w0 = base_kernel(model)
    kl.apply_lora(model, config(init="pissa", use_rslora=use_rslora))
    a, b, a0, b0 = map(numpy_of, adapter(model).named_factors.values())
    scale = ALPHA / np.sqrt(RANK) if use_rslora else SCALE
    expected = best(matrices(case, w0), RANK)
    assert relative(scale * factor_matrices(case, w0, a, b), expected) <= 1e-5
    np.testing.assert_array_equal(a, a0)
    np.testing.assert_array_equal(b, b0)
    shared, d, k = matrices(case, w0).shape
    left, right = a.reshape(shared, d, RANK), b.reshape(shared, RANK, k)
    # Both have the square roots of the singular values.
    norms = (np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=2))
    np.testing.assert_allclose(*norms, rtol=1e-5)


@pytest.mark.parametrize(("iterations", "bound"), [(1, 1.05), (4, 1.001)])
def test_randomized_pissa_is_almost_the_best(iterations: int, bound: float) -> None:
    w = decaying(101, 211)
    model = keras.Sequential([keras.Input((101,)), keras.layers.Dense(211, name="case")])
    model.get_layer("case").kernel.assign(w)
    init = f"pissa:{iterations}"
    kl.apply_lora(model, kl.LoRAConfig(rank=7, alpha=3, targets=["case"], init=init))
    a, b = map(numpy_of, adapter(model).factors)
    left = np.linalg.norm(w - 3 / 7 * a @ b)
    assert left <= bound * np.linalg.norm(w - best(w[None], 7)[0])


@every_case
def test_olora_begins_with_orthonormal_directions_of_the_outputs(case: Case) -> None:
    model = case.model()
    w0 = base_kernel(model)
    kl.apply_lora(model, config(init="olora"))
    a, b = map(numpy_of, adapter(model).factors)
    w = matrices(case, w0)
    rows = b.reshape(len(w), RANK, -1)
    np.testing.assert_allclose(rows @ rows.swapaxes(1, 2), [np.eye(RANK)] * len(w), atol=1e-5)
    q, r = np.linalg.qr(w.swapaxes(1, 2))
    expected = (q[..., :RANK] @ r[:, :RANK]).swapaxes(1, 2)
    assert relative(factor_matrices(case, w0, a, b), expected) <= 1e-5


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_orthogonal_factors_have_a_zero_product(rank: int) -> None:
    model = keras.Sequential([keras.Input((101,)), keras.layers.Dense(211, name="case")])
    kl.apply_lora(model, kl.LoRAConfig(rank=rank, targets=["case"], init="orthogonal"))
    a, b = map(numpy_of, adapter(model).factors)
    assert np.abs(a @ b).max() <= 1e-6
    for factor, rows in ((a, rank - rank // 2), (b, rank // 2)):
        # Each is a product of normal values with that many of `rank` orthonormal rows.
        spread = 0.1 * np.sqrt(rows / rank)
        assert np.sqrt((factor**2).mean()) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("init", FROM_MATRIX)
@pytest.mark.parametrize("shape", [(3, 11), (11, 3)])
@pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
def test_a_rank_above_the_matrix_has_zeros(init: str, shape: tuple[int, int]) -> None:
    d, k = shape
    model = keras.Sequential([keras.Input((d,)), keras.layers.Dense(k, name="case")])
    w0 = base_kernel(model)
    kl.apply_lora(model, kl.LoRAConfig(rank=5, alpha=5, targets=["case"], init=init))
    a, b = map(numpy_of, adapter(model).factors)
    assert relative(a @ b, w0) <= 1e-5
    assert not a[:, 3:].any()
    assert not b[3:].any()


@pytest.mark.parametrize("init", FROM_MATRIX)
def test_training_goes_by_the_gradient_of_the_papers_equation(init: str) -> None:
    """`h = x (W0 - s A0 B0) + s x A B`: a step of SGD on the factors, in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(13, 5)), rng.normal(size=(13, 7))
    layer = keras.layers.Dense(7, use_bias=False, name="case")
    model = keras.Sequential([keras.Input((5,)), layer])
    w0 = numpy_of(layer.kernel)
    kl.apply_lora(model, config(init=init))
    a, b = (numpy_of(f) for f in adapter(model).factors)
    residual = w0 - SCALE * a @ b
    for _ in range(2):
        error = 2 * (x @ residual + SCALE * x @ a @ b - y) / y.size
        a, b = a - 0.1 * SCALE * x.T @ error @ b.T, b - 0.1 * SCALE * (x @ a).T @ error
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, batch_size=13, epochs=2, verbose=0)
    for received, expected in zip(adapter(model).factors, (a, b), strict=True):
        assert relative(received, expected) <= 1e-4


def test_adapters_with_and_without_counterparts_share_slots() -> None:
    case, x = BY_ID["dense, activation"], BY_ID["dense, activation"].batch()
    model = case.model()
    w0, total = base_kernel(model), {}
    for name, init, rank in (("one", "pissa", 3), ("plain", "gaussian", 2), ("two", "olora", 2)):
        options = kl.LoRAConfig(rank=rank, alpha=rank, targets=["case"], init=init)
        kl.apply_lora(model, options, name=name)
        randomize(adapter(model, name).factors)
        total[name] = delta(case, adapter(model, name), 1.0)
    for names in (["one"], ["plain"], ["two"], ["plain", "one"], ["one", "two"], ["two", "plain"]):
        kl.set_adapter(model, names)
        kernel = w0 + sum(total[name] for name in names)
        assert relative(model(x), reference_output(case, model, x, kernel)) <= 1e-5
        for name in names:
            assert relative(delta(case, adapter(model, name), 1.0), total[name]) <= 1e-6
    kl.combine_adapters(model, {"one": 0.7, "plain": -0.3, "two": 2.0}, "all")
    kl.set_adapter(model, "all")
    kernel = w0 + 0.7 * total["one"] - 0.3 * total["plain"] + 2 * total["two"]
    assert relative(model(x), reference_output(case, model, x, kernel)) <= 1e-5
    assert adapter(model, "all").spec.rank == 2 * 3 + 2 + 2 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pisa"}, "Invalid `init`: expected one of .*'pissa'.*'pissa:N'"),
        ({"init": "pissa:0"}, "Invalid `init`.*'pissa:N'"),
        ({"init": "olora:4"}, "Invalid `init`"),
        ({"init": None}, "Invalid `init`"),
        ({"init": "loftq", "alpha": -1}, "Invalid `alpha`: expected a positive number for init"),
        ({"init": "pissa", "alpha": -1}, "Invalid `alpha`: expected a positive number for init"),
        ({"init": "olora", "alpha_pattern": {"up": 0}}, "Invalid `alpha`: expected a positive"),
    ],
)
def test_starts_that_are_not_offered_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl.LoRAConfig(**options)
    if "alpha_pattern" not in options:
        with pytest.raises(ValueError, match=message):
            kl.LoRADense(3, **options)


def test_configs_with_starts_round_trip() -> None:
    for init in STARTS:
        assert kl.LoRAConfig.from_json(kl.LoRAConfig(init=init).to_json()).init == init
