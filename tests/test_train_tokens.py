"""`train_tokens`: rows of an embedding that an adapter trains in full, as values of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from support.broken_runs import BreakAfter, BrokenError
from support.cases import numpy_of, randomize
from support.models import state

import keras_lora as kl

VOCABULARY, DIM = 13, 5
TOKENS = np.array([[4, 4, 7, 0, 11], [11, 2, 3, 4, 12]], "int32")
FIRST, SECOND = [11, 3, 4], [4, 12]
DTYPES = ["float32", "bfloat16", "mixed_bfloat16"]
if keras.backend.backend() != "jax":  # whose 64 bits are switched off
    DTYPES += ["float64"]


def language_model(seed: int = 1, **options: Any) -> keras.Model:
    """From tokens to logits, through one embedding matrix, and a projection to adapt."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((None,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(VOCABULARY, DIM, name="table", **options)
    hidden = keras.layers.Dense(DIM, use_bias=False, name="up", dtype=options.get("dtype"))
    return keras.Model(inputs, table(hidden(table(inputs)), reverse=True))


def classifier(seed: int = 1, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, DIM, name="table", **options)(inputs)
    return keras.Model(inputs, keras.layers.Dense(7, name="up")(x))


def apply(model: keras.Model, name: str, tokens: Any, **options: Any) -> keras.Model:
    config = kl.LoRAConfig(rank=2, **{"targets": ["up"], "train_tokens": tokens, **options})
    return kl.apply_lora(model, config, name)


def part(model: keras.Model, name: str) -> Any:
    return kl.lora_layers(model)["table"].adapters[name]


def randomized(model: keras.Model, *names: str) -> keras.Model:
    for layer in kl.lora_layers(model).values():
        for name in names:
            randomize(layer.adapters[name].factors)
    return model


def matrix(model: keras.Model) -> np.ndarray:
    return numpy_of(model.get_layer("table").embeddings)


def rows_of(model: keras.Model, *names: str) -> np.ndarray:
    """The matrix in float64: `W0 + sum_j (R_j - W0)` at the tokens, `+ s A B` everywhere."""
    base = numpy_of(model.get_layer("table").base_kernel).astype("float64")
    whole = base.copy()
    for name in names:
        own = part(model, name)
        tokens = list(own.spec.train_tokens)
        whole[tokens] += np.array(own.tokens, "float64") - base[tokens]
        whole += own.scaling * np.array(own.a, "float64") @ np.array(own.b, "float64")
    return whole


@pytest.mark.parametrize("targets", [["up"], ["up", "table"]], ids=["rows alone", "beside A B"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_of_the_tokens_are_replaced_and_no_others(dtype: str, targets: list[str]) -> None:
    model = language_model(dtype=dtype)
    before, w0 = numpy_of(model(TOKENS)), matrix(model)
    apply(model, "a", FIRST, targets=targets)
    np.testing.assert_array_equal(numpy_of(model(TOKENS)), before)
    randomized(model, "a")
    rounding = {"float32": 1e-6, "float64": 1e-6}.get(dtype, 2e-2)
    expected = rows_of(model, "a")
    table = model.get_layer("table")
    for found in (table(np.arange(VOCABULARY)), matrix(model)):
        np.testing.assert_allclose(numpy_of(found), expected, rtol=rounding, atol=rounding)
    h = np.random.default_rng(3).normal(size=(2, 3, DIM)).astype("float32")
    logits = numpy_of(table(h, reverse=True))
    np.testing.assert_allclose(logits, h @ expected.T, rtol=3 * rounding, atol=10 * rounding)
    if targets == ["up"]:
        written = numpy_of(
            keras.ops.cast(np.array(part(model, "a").tokens), table.base_kernel.dtype)
        )
        w0[sorted(FIRST)] = written
        np.testing.assert_array_equal(matrix(model), w0)
        np.testing.assert_array_equal(matrix(kl.merge_lora(model, inplace=False)), w0)
    kl.unload_lora(model)
    np.testing.assert_array_equal(numpy_of(model(TOKENS)), before)


@pytest.mark.parametrize("make", [language_model, classifier])
def test_only_these_rows_train_and_as_in_a_model_that_trains_the_whole_matrix(
    make: Callable[[], keras.Model],
) -> None:
    plain, adapted = make(), apply(make(), "a", FIRST)
    y = np.random.default_rng(4).normal(size=plain(TOKENS).shape)
    before = matrix(plain)
    for model in (plain, adapted):
        model.compile(keras.optimizers.SGD(0.3), "mse")
        model.train_on_batch(TOKENS, y)
    tokens = sorted(FIRST)
    rows = np.array(part(adapted, "a").tokens)
    np.testing.assert_allclose(rows, matrix(plain)[tokens], rtol=1e-5, atol=1e-6)
    assert abs(rows - before[tokens]).max() > 1e-3
    names = [v.name for v in adapted.trainable_variables]
    assert names == ["lora_tokens", "lora_a", "lora_b"]
    np.testing.assert_array_equal(numpy_of(adapted.get_layer("table").base_kernel), before)


def test_adapters_with_other_tokens_switch_act_together_and_come_back(tmp_path: Path) -> None:
    model = language_model()
    base = model.predict(TOKENS, verbose=0)
    apply(model, "a", FIRST)
    apply(model, "b", SECOND, targets=["up", "table"])
    randomized(model, "a", "b")
    outputs = {}
    for names in (["a"], ["b"], ["a", "b"]):
        kl.set_adapter(model, names)
        outputs["".join(names)] = model.predict(TOKENS, verbose=0)
        expected = rows_of(model, *names)
        np.testing.assert_allclose(matrix(model), expected, rtol=1e-5, atol=1e-6)
    kl.set_adapter(model, "a")
    np.testing.assert_array_equal(model.predict(TOKENS, verbose=0), outputs["a"])
    table, plain = model.get_layer("table"), language_model().get_layer("table")
    h = keras.ops.ones((2, DIM))
    with table.without_adapters():  # as within a trace: nothing moves
        np.testing.assert_array_equal(numpy_of(table(TOKENS)), numpy_of(plain(TOKENS)))
        logits = numpy_of(plain(h, reverse=True))
        np.testing.assert_array_equal(numpy_of(table(h, reverse=True)), logits)
    with kl.disable_adapter(model):
        np.testing.assert_array_equal(model.predict(TOKENS, verbose=0), base)
    for name in "ab":
        kl.save_adapter(model, tmp_path / name, name)
        kl.load_adapter(other := language_model(), tmp_path / name)
        np.testing.assert_array_equal(other.predict(TOKENS, verbose=0), outputs[name])
    assert kl.read_adapter_files(tmp_path / "a").tensors["table/lora_tokens"].shape == (3, DIM)
    kl.load_adapter(model, tmp_path / "b", "a", replace=True)
    np.testing.assert_array_equal(model.predict(TOKENS, verbose=0), outputs["b"])
    kl.unload_lora(model)
    np.testing.assert_array_equal(model.predict(TOKENS, verbose=0), base)


def test_weights_files_and_keras_files_go_on(tmp_path: Path) -> None:
    model = randomized(apply(classifier(), "default", FIRST), "default")
    expected = numpy_of(model(TOKENS))
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(TOKENS)), expected)
    again = apply(classifier(seed=2), "default", FIRST)
    again.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(numpy_of(again(TOKENS)), expected)
    others = apply(classifier(), "default", [1, 3, 4])
    with pytest.raises(ValueError, match=r"token_ids.default is \[ 3  4 11\], expected \[1 3 4\]"):
        others.load_weights(tmp_path / "m.weights.h5")


def test_a_broken_run_goes_on(tmp_path: Path) -> None:
    x, y = np.repeat(TOKENS, 4, axis=0), np.ones((8, 5, 7))
    found = []
    for seed, callbacks in [
        (1, []),
        (1, [kl.AdapterCheckpoint(tmp_path, save_freq=3), BreakAfter(5)]),
        (1, [kl.AdapterCheckpoint(tmp_path, save_freq=3)]),
    ]:
        model = apply(classifier(seed), "default", FIRST)
        model.compile(keras.optimizers.Adam(0.1), "mse")
        with contextlib.suppress(BrokenError):
            model.fit(x, y, 2, epochs=2, shuffle=False, callbacks=callbacks, verbose=0)
        found.append(np.array(part(model, "default").tokens))
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6, atol=1e-6)
    assert abs(found[1] - found[0]).max() > 1e-3


def test_fresh_rows_follow_the_weights_of_a_base(tmp_path: Path) -> None:
    base = classifier(seed=2)
    base.save_weights(tmp_path / "base.weights.h5")
    model = apply(classifier(), "a", FIRST)
    with pytest.warns(UserWarning, match="contains no adapters"):
        model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(numpy_of(model(TOKENS)), numpy_of(base(TOKENS)))


def test_combined_adapters_have_the_rows_of_each() -> None:
    model = apply(apply(classifier(), "a", FIRST), "b", [0, 12])
    randomized(apply(model, "c", SECOND), "a", "b", "c")
    rows = {n: np.array(part(model, n).tokens) for n in "ab"}
    kl.combine_adapters(model, {"a": 0.5, "b": 0.5}, "both")
    both = part(model, "both")
    assert both.spec.train_tokens == (0, 3, 4, 11, 12)
    np.testing.assert_array_equal(np.array(both.tokens)[1:4], rows["a"])
    np.testing.assert_array_equal(np.array(both.tokens)[[0, 4]], rows["b"])
    with pytest.raises(ValueError, match=r"own rows of the tokens \[4\] of 'table'"):
        kl.combine_adapters(model, {"a": 0.5, "c": 0.5}, "other")


def test_ids_alone_are_of_the_token_embedding_of_a_backbone() -> None:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    )
    config = kl.LoRAConfig(rank=2, targets=["query"], train_tokens=[7])
    kl.apply_lora(backbone, config)
    assert [p for p, x in kl.lora_layers(backbone).items() if "embedding" in p] == [
        "token_embedding"
    ]
    kl.apply_lora(backbone, kl.LoRAConfig(rank=2, train_tokens={"segment_embedding": [1]}), "s")
    assert kl.lora_layers(backbone)["segment_embedding"].adapters["s"].spec.train_tokens == (1,)


def two_embeddings() -> keras.Model:
    left, right = keras.Input((3,), dtype="int32"), keras.Input((3,), dtype="int32")
    tables = [keras.layers.Embedding(VOCABULARY, DIM, name=name) for name in ("users", "items")]
    x = tables[0](left) + tables[1](right)
    return keras.Model([left, right], keras.layers.Dense(2, name="up")(x))


CONFIGS: dict[str, tuple[Any, str]] = {
    "negative": ([3, -1], r"integers from 0 on. Received: train_tokens=\[-1\]"),
    "twice": ([3, 4, 3], r"Received: train_tokens=\[3\]"),
    "floats": ([1.0], "integers from 0 on"),
    "flags": ([True], "integers from 0 on"),
    "text": ("12", "a list of different token ids"),
    "a number": (12, "a list of different token ids"),
    "none by name": ({"table": []}, "at least one token id for each name"),
    "no name": ({"": [1]}, "non-empty strings"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_refuses(kind: str) -> None:
    tokens, message = CONFIGS[kind]
    with pytest.raises(ValueError, match=f"Invalid `train_tokens`.*{message}"):
        kl.LoRAConfig(train_tokens=tokens)


PLANS: dict[str, tuple[Callable[[], keras.Model], dict[str, Any], str]] = {
    "no such row": (
        classifier,
        {"train_tokens": [12, 13]},
        r"ids below 13, of the 13 rows of 'table'. Received: train_tokens=\[13\]",
    ),
    "no such layer": (classifier, {"train_tokens": {"tabel": [1]}}, "Closest: .'table'"),
    "no embedding": (
        classifier,
        {"train_tokens": {"up": [1]}},
        r"names of embeddings: \['table'\]",
    ),
    "several": (
        two_embeddings,
        {"train_tokens": [1]},
        r"one of the embeddings \['users', 'items'\].*train_tokens=\{'users': \[...\]\}",
    ),
    "in full too": (
        classifier,
        {"train_tokens": [1], "layers_to_save": ["table"]},
        "embeddings that do not train in full",
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_refuses_and_changes_nothing(kind: str) -> None:
    make, options, message = PLANS[kind]
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"], **options))
    assert state(model) == before


def test_a_config_comes_back_from_json_and_leaves_out_what_is_not_used() -> None:
    for tokens in ([4, 3], {"table": [4, 3]}):
        config = kl.LoRAConfig(train_tokens=tokens)
        assert kl.LoRAConfig.from_json(config.to_json()) == config
    assert kl.LoRAConfig(train_tokens=[4, 3]).train_tokens == (3, 4)
    assert "train_tokens" not in kl.LoRAConfig().to_dict()


def test_rows_have_a_rate_of_their_own() -> None:
    moved = []
    for rate in (1, 3):
        model = apply(classifier(), "a", FIRST)
        before = np.array(part(model, "a").tokens)
        model.compile(kl.set_rates(keras.optimizers.SGD(0.1), tokens=rate), "mse")
        model.train_on_batch(TOKENS, np.ones((2, 5, 7)))
        moved.append(np.array(part(model, "a").tokens) - before)
    np.testing.assert_allclose(moved[1], 3 * moved[0], rtol=1e-3, atol=1e-6)
