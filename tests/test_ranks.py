"""`rank_report` and `shrink_adapter` against singular values of whole matrices, in float64."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from rich.console import Console
from support.adapters import Counter, counted, fit, with_adapters
from support.cases import numpy_of
from support.models import functional, randomize_adapters, state

import keras_lora as kl
from keras_lora.lowrank.decomposing import decompose, intruders

QUIET = Console(quiet=True)
RNG = np.random.default_rng(3)


def layers(kind: str) -> keras.Model:
    """A layer of each form of matrix, with sides of prime size; d and k are unlike."""
    inputs: Any = keras.Input((5, 7))
    if kind == "embedding":
        return keras.Sequential([keras.Input((5,)), keras.layers.Embedding(13, 7, name="layer")])
    layer = {
        "dense": lambda: keras.layers.Dense(11, name="layer"),
        "einsum": lambda: keras.layers.EinsumDense("btd,dnh->btnh", (None, 3, 5), name="layer"),
        "experts": lambda: keras.layers.EinsumDense("bed,edf->bef", (5, 11), name="layer"),
        "convolution": lambda: keras.layers.Conv1D(11, 3, name="layer"),
    }[kind]()
    return keras.Model(inputs, layer(inputs))


KINDS = ["dense", "einsum", "experts", "convolution", "embedding"]


def adapted(kind: str, **options: Any) -> keras.Model:
    config = kl.LoRAConfig(rank=5, alpha=3, targets=["layer"], **options)
    model = kl.apply_lora(layers(kind), config)
    randomize_adapters(model)
    return model


def matrices(w: np.ndarray, kind: str) -> np.ndarray:
    """A kernel as a stack of matrices, inputs by outputs."""
    shapes = {"einsum": (1, 7, 15), "convolution": (1, 21, 11), "experts": (5, 7, 11)}
    return w.reshape(shapes.get(kind, (1, *w.shape)))


def delta(model: keras.Model, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """`W0` and the update, as the layer computes with them."""
    layer = kl.lora_layers(model)["layer"]
    effective = numpy_of(layer.embeddings if kind == "embedding" else layer.kernel)
    with kl.disable_adapter(model):
        base = numpy_of(layer.embeddings if kind == "embedding" else layer.kernel)
    return matrices(base, kind), matrices(effective - base, kind)


def three_layers(rank: int = 3) -> keras.Model:
    """Of 12, 18 and 14 parameters for each rank."""
    config = kl.LoRAConfig(rank=rank, alpha=5, targets=["up", "middle", "head"])
    model = kl.apply_lora(functional(), config, name="fr")
    randomize_adapters(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_of_the_whole_matrices(kind: str) -> None:
    model = adapted(kind)
    (row,) = kl.rank_report(model, intruders=2, epsilon=0.9, console=QUIET).rows
    w, d = delta(model, kind)
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    u, s, vt = u[..., :5], s[:, :5], vt[:, :5]
    np.testing.assert_allclose(row.singular_values, np.sort(s.ravel())[::-1], rtol=1e-3)
    p = s / s.sum(1, keepdims=True)
    np.testing.assert_allclose(row.effective_rank, np.exp(-(p * np.log(p)).sum(1)).mean(), 1e-3)
    kept = [(s[:, :k] ** 2).sum() / (s**2).sum() for k in range(1, 6)]
    np.testing.assert_allclose(row.energies, kept, rtol=1e-4)
    np.testing.assert_allclose(row.norm, np.linalg.norm(d), rtol=1e-4)
    np.testing.assert_allclose(row.base_norm, np.linalg.norm(w), rtol=1e-5)
    beside = np.linalg.norm(u.mT @ w @ vt.mT)
    np.testing.assert_allclose(row.amplification, np.linalg.norm(d) / beside, rtol=1e-3)
    before, after = np.linalg.svd(w).Vh, np.linalg.svd(w + d).Vh[:, :2]
    cosines = np.abs(np.einsum("sik,sjk->sji", before[:, : min(w.shape[1:])], after))
    assert row.intruders == (cosines.max(2) < 0.9).sum()
    assert (row.path, row.adapter, row.rank) == ("layer", "default", 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}, {"use_rslora": True}])
def test_no_adapter_of_the_rank_is_nearer(kind: str, options: Any) -> None:
    if kind == "embedding" and "init" in options:
        options = {"init": "olora"}
    model = adapted(kind, **options)
    base, before = delta(model, kind)
    report = kl.shrink_adapter(model, "default", rank=2, console=QUIET)
    same, after = delta(model, kind)
    u, s, vt = np.linalg.svd(before, full_matrices=False)
    best = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    np.testing.assert_allclose(after, best, atol=2e-5)
    np.testing.assert_array_equal(same, base)
    error = np.linalg.norm(before - best) / np.linalg.norm(before)
    np.testing.assert_allclose(report.relative_error, error, rtol=1e-2)
    adapter = kl.lora_layers(model)["layer"].adapters["default"]
    assert adapter.spec.rank == 2
    assert report.parameters == adapter.a.__array__().size + adapter.b.__array__().size


def test_an_energy_is_kept_in_each_layer_with_the_lowest_rank() -> None:
    model = with_adapters(functional(), ["fr"])
    spectra = {row.path: row for row in kl.rank_report(model, console=QUIET).rows}
    report = kl.shrink_adapter(model, "fr", energy=0.8, console=QUIET)
    for row in report.rows:
        values = np.square(spectra[row.path].singular_values)
        shares = np.cumsum(values) / values.sum()
        assert shares[row.rank - 1] >= 0.8
        assert row.rank == 1 or shares[row.rank - 2] < 0.8
        np.testing.assert_allclose(row.relative_error**2, 1 - shares[row.rank - 1], rtol=1e-3)
    assert report.parameters < report.parameters_before


@pytest.mark.parametrize("budget", [44, 60, 70, 92, 200])
def test_a_budget_is_spent_where_most_is_kept(budget: int) -> None:
    """Against each choice of ranks, counted out."""
    model = three_layers()
    for path, scale in {"up": 1.0, "middle": 3.0, "head": 0.5}.items():
        adapter = kl.lora_layers(model)[path].adapters["fr"]
        adapter.b.assign(scale * np.array(adapter.b))
    rows = kl.rank_report(model, console=QUIET).rows
    cost = {"up": 12, "middle": 18, "head": 14}
    energy = {row.path: np.cumsum(np.square(row.singular_values)) for row in rows}
    report = kl.shrink_adapter(model, "fr", parameters=budget, console=QUIET)
    ranks = {row.path: row.rank for row in report.rows}
    assert report.parameters == sum(cost[path] * rank for path, rank in ranks.items()) <= budget
    kept = sum(energy[path][rank - 1] for path, rank in ranks.items())
    affordable = [
        sum(energy[path][rank - 1] for path, rank in zip(cost, choice, strict=True))
        for choice in np.ndindex(3, 3, 3)
        if sum((rank + 1) * c for rank, c in zip(choice, cost.values(), strict=True)) <= budget
        for choice in [tuple(rank + 1 for rank in choice)]
    ]
    # Direction by direction is the best choice up to one direction that no longer fits.
    assert kept >= max(affordable) - max(np.square(row.singular_values[1]) for row in rows)
    assert kept >= 0.97 * max(affordable)


def test_a_smaller_adapter_acts_trains_and_is_saved_without_a_trace(tmp_path: Path) -> None:
    model, counter = counted()
    assert isinstance(counter, Counter)
    kl.apply_lora(model, kl.LoRAConfig(rank=3, layers_to_save=["head"]), name="fr")
    model.compile("adam", "mse")
    fit(model)
    x = np.ones((2, 5), "float32")
    model.predict(x, verbose=0)
    calls, head = counter.calls, numpy_of(model.get_layer("head").kernel)
    kl.shrink_adapter(model, "fr", rank=1, console=QUIET)
    np.testing.assert_array_equal(numpy_of(model.get_layer("head").kernel), head)
    small = model.predict(x, verbose=0)
    fit(model)
    assert counter.calls == calls
    assert np.abs(model.predict(x, verbose=0) - small).max() > 0
    kl.save_adapter(model, tmp_path / "fr", "fr")
    expected = model.predict(x, verbose=0)
    other, _ = counted()
    other.set_weights(kl.unload_lora(model).get_weights())
    kl.load_adapter(other, tmp_path / "fr", "fr")
    np.testing.assert_allclose(other.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert {p: x.adapters["fr"].spec.rank for p, x in kl.lora_layers(other).items()} == {
        "up": 1,
        "middle": 1,
    }


def test_the_config_is_that_of_an_adapter_of_these_ranks(tmp_path: Path) -> None:
    model = with_adapters(functional(), ["fr"])
    kl.shrink_adapter(model, "fr", energy=0.7, console=QUIET)
    kl.save_adapter(model, tmp_path / "fr", "fr")
    config = kl.LoRAConfig.from_dict(kl.read_adapter_config(tmp_path / "fr")["config"])
    specs = {p: x.adapters["fr"].spec for p, x in kl.lora_layers(model).items()}
    again = kl.apply_lora(functional(), config, name="fr")
    assert {p: x.adapters["fr"].spec for p, x in kl.lora_layers(again).items()} == specs


def test_an_optimizer_that_does_not_go_by_element_trains_the_rank_itself() -> None:
    model = functional()
    model.compile(keras.optimizers.Adafactor(0.01), "mse")
    kl.apply_lora(model, kl.LoRAConfig(rank=3), name="fr")
    fit(model)
    kl.shrink_adapter(model, "fr", rank=2, console=QUIET)
    fit(model)
    assert {slot.rank for x in model._flatten_layers() for slot in slots(x)} == {2}


def slots(layer: Any) -> list[Any]:
    return layer._lora.banks[""].slots if isinstance(layer, kl.LoRALayer) else []


def test_an_inactive_adapter_a_factor_and_a_layer_that_learned_nothing() -> None:
    model = three_layers()
    kl.apply_lora(model, kl.LoRAConfig(rank=1, targets=["up"]), name="it")
    kl.scale_adapter(model, "fr", 0.5)
    head = kl.lora_layers(model)["head"].adapters["fr"]
    head.b.assign(np.zeros(head.b.shape))
    first = np.array(head.a)[:, :2]
    kernels = {p: numpy_of(x.kernel) for p, x in kl.lora_layers(model).items()}
    report = kl.shrink_adapter(model, "fr", rank=2, console=QUIET)
    for path, layer in kl.lora_layers(model).items():
        np.testing.assert_array_equal(numpy_of(layer.kernel), kernels[path])
    shrunk = kl.lora_layers(model)["head"].adapters["fr"]
    np.testing.assert_array_equal(np.array(shrunk.a), first)
    assert not np.array(shrunk.b).any()
    assert {x.adapters["fr"].scale_factor for x in kl.lora_layers(model).values()} == {0.5}
    assert [row.relative_error for row in report.rows if row.path == "head"] == [0]


@pytest.mark.parametrize("kind", ["dense", "embedding"])
def test_an_adapter_that_learned_nothing_can_still_learn(kind: str) -> None:
    model = kl.apply_lora(layers(kind), kl.LoRAConfig(rank=5, targets=["layer"]))
    kl.shrink_adapter(model, "default", rank=2, console=QUIET)
    adapter = kl.lora_layers(model)["layer"].adapters["default"]
    learns_from = np.array(adapter.b if kind == "embedding" else adapter.a)
    assert (np.abs(learns_from).sum(0 if kind == "dense" else 1) > 0).all()
    _, update = delta(model, kind)
    assert not update.any()


@pytest.mark.parametrize("factor", [0, -3])
def test_the_factor_of_an_adapter_is_no_part_of_it(factor: float) -> None:
    """At a factor of zero an adapter does not act, and is not lost."""
    model = adapted("dense")
    adapter = kl.lora_layers(model)["layer"].adapters["default"]
    product = np.array(adapter.a, "float64") @ np.array(adapter.b, "float64")
    kl.scale_adapter(model, "default", factor)
    kl.shrink_adapter(model, "default", rank=2, console=QUIET)
    adapter = kl.lora_layers(model)["layer"].adapters["default"]
    u, s, vt = np.linalg.svd(product)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    np.testing.assert_allclose(np.array(adapter.a) @ np.array(adapter.b), best, atol=2e-5)
    assert adapter.spec.scaling == pytest.approx(3 / 5)
    assert adapter.scale_factor == factor


def test_rows_of_tokens_stay_and_an_adapter_of_them_alone_has_no_rank() -> None:
    model = adapted("embedding", train_tokens=[2, 3])
    rows = np.array(kl.lora_layers(model)["layer"].adapters["default"].tokens)
    kl.shrink_adapter(model, "default", rank=1, console=QUIET)
    adapter = kl.lora_layers(model)["layer"].adapters["default"]
    np.testing.assert_array_equal(np.array(adapter.tokens), rows)
    assert adapter.spec.train_tokens == (2, 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 1, "energy": 0.5}, "exactly one"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 95}, "energy"),
        ({"rank": 0}, "rank"),
        ({"parameters": 43}, "at least 44"),
        ({"parameters": 1e3}, "parameters"),
    ],
)
def test_a_size_that_is_refused_changes_nothing(sizes: Any, message: str) -> None:
    model = three_layers()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.shrink_adapter(model, "fr", **sizes)
    assert state(model) == before


def test_what_has_no_best_approximation_is_refused() -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, use_dora=True))
    with pytest.raises(ValueError, match="without DoRA"):
        kl.shrink_adapter(model, "default", rank=1)
    with pytest.raises(ValueError, match="names among"):
        kl.rank_report(model, "other")
    with pytest.raises(ValueError, match="never"):
        kl.rank_report(functional())
    model = adapted("dense")
    adapter = kl.lora_layers(model)["layer"].adapters["default"]
    adapter.a.assign(np.full(adapter.a.shape, np.nan))
    for verb in (kl.rank_report, lambda m: kl.shrink_adapter(m, "default", rank=1)):
        with pytest.raises(ValueError, match="NaN"):
            verb(model)


def test_the_table_has_a_line_for_layers_that_repeat() -> None:
    inputs = keras.Input((7,))
    x = inputs
    for i in range(5):
        x = keras.layers.Dense(7, name=f"layer_{i}")(x)
    model = kl.apply_lora(keras.Model(inputs, x), kl.LoRAConfig(rank=3))
    randomize_adapters(model)
    console = Console(record=True, width=100, file=io.StringIO())
    kl.rank_report(model, console=console)
    text = console.export_text()
    assert "layer_[0-3]" in text
    assert " to " in text
    assert len(text.strip().splitlines()) == 3


def test_a_picture_has_a_row_for_each_layer(tmp_path: Path) -> None:
    model = with_adapters(functional(), ["fr"])
    kl.rank_report(model, plot=tmp_path / "ranks.svg", console=QUIET)
    text = (tmp_path / "ranks.svg").read_text()
    assert text.startswith("<?xml")
    with pytest.raises(ValueError, match="not supported"):
        kl.rank_report(model, plot=tmp_path / "ranks.words", console=QUIET)
    assert [file.name for file in tmp_path.iterdir()] == ["ranks.svg"]


def test_equal_singular_values_have_the_whole_effective_rank() -> None:
    a, b = np.eye(11, 3)[None], np.eye(3, 13)[None]
    assert decompose(a, b).effective_rank == pytest.approx(3)
    assert decompose(0 * a, b).effective_rank == 0
    assert decompose(0 * a, b).amplification(np.ones((1, 11, 13))) == 0
    assert decompose(a, b).amplification(np.zeros((1, 11, 13))) == np.inf
    w = RNG.normal(size=(1, 7, 11))
    assert intruders(w, 2 * w, 5, 0.99) == 0
