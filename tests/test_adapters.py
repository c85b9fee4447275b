"""Several adapters on one model: which act, which train, and that switching traces nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.models import composite, data, functional, randomize_adapters, state

import keras_lora as kl

RNG = np.random.default_rng(17)
# Of different targets, ranks, scales and dropout.
CONFIGS = {
    "fr": kl.LoRAConfig(rank=3, alpha=5, dropout=0.2),
    "de": kl.LoRAConfig(rank=2, alpha=7, targets=["up"], use_rslora=True),
    "it": kl.LoRAConfig(rank=1, alpha=2, targets=["up", "middle"]),
}


class Counter(keras.layers.Layer):
    """Passes its input on and counts how often Python runs: once a trace."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    def call(self, inputs: Any) -> Any:
        self.calls += 1
        return inputs


def counted() -> tuple[keras.Model, Counter]:
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(7, activation="gelu", name="up")(inputs)
    counter = Counter(name="counter")
    x = keras.layers.Dense(11, activation="tanh", name="middle")(counter(x))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="mlp"), counter


def with_adapters(model: keras.Model, names: Sequence[str] = tuple(CONFIGS)) -> keras.Model:
    for name in names:
        kl.apply_lora(model, CONFIGS[name], name=name)
    randomize_adapters(model)
    return model


def fit(model: keras.Model, epochs: int = 1) -> None:
    x, y = data(model)
    model.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0)


def factors(model: keras.Model, name: str) -> dict[str, tuple[bytes, ...]]:
    layers = kl.lora_layers(model).items()
    return {
        path: tuple(np.array(f).tobytes() for f in layer.adapters[name].factors)
        for path, layer in layers
        if name in layer.adapters
    }


def kernels_by_hand(model: keras.Model, weights: dict[str, float]) -> dict[str, np.ndarray]:
    """W0 + sum_i weight_i s_i A_i B_i of each Dense layer, in float64."""
    kernels = {}
    for path, layer in kl.lora_layers(model).items():
        total = numpy_of(layer.base_kernel)
        for name, weight in weights.items():
            if name in layer.adapters:
                spec = layer.adapters[name].spec
                s = spec.alpha / (np.sqrt(spec.rank) if spec.use_rslora else spec.rank)
                a, b = (np.array(f, "float64") for f in layer.adapters[name].factors)
                total = total + weight * s * a @ b
        kernels[path] = total
    return kernels


def assert_acts(model: keras.Model, weights: dict[str, float]) -> None:
    expected = kernels_by_hand(model, weights)
    for path, layer in kl.lora_layers(model).items():
        np.testing.assert_allclose(numpy_of(layer.kernel), expected[path], rtol=1e-5, atol=1e-6)
    plain = functional() if model.name == "mlp" and "norm" in layer_names(model) else counted()[0]
    plain.set_weights([numpy_of(v) for v in base_variables(model)])
    for path, kernel in expected.items():
        plain.get_layer(path).kernel.assign(kernel)
    x, _ = data(model)
    np.testing.assert_allclose(
        numpy_of(model.predict(x, verbose=0)), numpy_of(plain(x)), rtol=1e-4, atol=1e-5
    )


def layer_names(model: keras.Model) -> list[str]:
    return [layer.name for layer in model.layers]


def base_variables(model: keras.Model) -> list[keras.Variable]:
    ours = {id(v) for layer in kl.lora_layers(model).values() for v in layer.adapter_variables}
    return [v for v in model.weights if id(v) not in ours]


@pytest.mark.parametrize(
    "names", [["fr"], ["de"], ["it"], ["fr", "de"], ["it", "fr", "de"], None, []]
)
def test_exactly_the_named_adapters_act(names: list[str] | None) -> None:
    model = with_adapters(functional())
    kl.set_adapter(model, names)
    assert_acts(model, dict.fromkeys(names or [], 1.0))
    active = {n for layer in kl.lora_layers(model).values() for n in layer.active_adapters}
    assert active == set(names or [])


def test_switching_traces_nothing() -> None:
    model, counter = counted()
    with_adapters(model)
    model.compile("adam", "mse")
    x, _ = data(model)
    model.predict(x, verbose=0)
    fit(model)
    model.evaluate(*data(model), verbose=0)
    traced = counter.calls
    for name in ["fr", "de", "it", "fr"]:
        kl.set_adapter(model, name)
        model.predict(x, verbose=0)
        fit(model)
        model.evaluate(*data(model), verbose=0)
        with kl.disable_adapter(model):
            model.predict(x, verbose=0)
        with kl.scale_adapter(model, name, 0.5):
            model.predict(x, verbose=0)
    if keras.backend.backend() == "torch":  # which runs Python in each step
        return
    assert counter.calls == traced
    for name in CONFIGS:
        kl.set_adapter(model, name)
        # Not `assert_acts(...)` before: what is compiled follows the switch.
        assert_acts(model, {name: 1.0})
    assert counter.calls == traced
    kl.set_adapter(model, ["fr", "de"])  # more at once than ever: a new slot
    model.predict(x, verbose=0)
    assert counter.calls > traced
    traced = counter.calls
    kl.set_adapter(model, ["it", "de"])
    model.predict(x, verbose=0)
    kl.set_adapter(model, "it")
    model.predict(x, verbose=0)
    assert counter.calls == traced


def test_training_moves_the_active_adapter_only() -> None:
    model = with_adapters(functional())
    # Weight decay moves whatever the optimizer holds, with or without a gradient.
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), "mse")
    fit(model)
    for name in ["fr", "de", "it"]:
        kl.set_adapter(model, name)
        before = {n: factors(model, n) for n in CONFIGS}
        base = [numpy_of(v) for v in base_variables(model)]
        fit(model)
        after = {n: factors(model, n) for n in CONFIGS}
        for other in CONFIGS:
            for path, values in after[other].items():
                same = [new == old for new, old in zip(values, before[other][path], strict=True)]
                assert same == [other != name] * 2, (name, other, path)
        for variable, value in zip(base_variables(model), base, strict=True):
            np.testing.assert_array_equal(numpy_of(variable), value)


@pytest.mark.parametrize(
    "optimizer", [lambda: keras.optimizers.AdamW(0.01), lambda: keras.optimizers.Nadam(0.01)]
)
def test_training_in_turns_is_training_without_a_break(optimizer: Any) -> None:
    def make() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = functional()
        for name in ["de", "it"]:
            kl.apply_lora(model, CONFIGS[name], name=name)
        model.compile(optimizer(), "mse")
        return model

    turns, unbroken = make(), make()
    for name in ["de", "it", "de"]:
        kl.set_adapter(turns, name)
        fit(turns, 2)
    kl.set_adapter(unbroken, "de")
    fit(unbroken, 4)
    assert factors(turns, "de") == factors(unbroken, "de")
    kl.set_adapter(unbroken, "it")
    fit(unbroken, 2)
    assert factors(turns, "it") == factors(unbroken, "it")


def test_not_trainable_means_that_nothing_trains() -> None:
    model = with_adapters(functional())
    kl.set_adapter(model, "fr", trainable=False)
    assert not model.trainable_variables
    assert_acts(model, {"fr": 1.0})
    kl.set_adapter(model, "fr")
    assert {v.name for v in model.trainable_variables} == {"lora_a", "lora_b"}


def test_a_summary_counts_what_trains_and_not_its_slot() -> None:
    model = with_adapters(functional(), ["fr", "de"])
    summary = kl.lora_summary(model)
    assert summary.trained.parameters == 2 * (5 + 7)
    assert [(row.adapter, row.rank, row.active) for row in summary.rows] == [
        ("fr", 3, False),
        ("de", 2, True),
        ("fr", 3, False),
    ]


def heads() -> keras.Model:
    """Two adapters that each train the head, one of them its biases too."""
    model = functional()
    model.compile("adam", "mse")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]), name="one")
    fit(model)
    options: Any = {"bias": "lora_only", "layers_to_save": ["head", "norm"]}
    kl.apply_lora(model, kl.LoRAConfig(rank=2, **options), name="two")
    fit(model)
    return model


def test_each_adapter_has_its_own_head_and_biases() -> None:
    keras.utils.set_random_seed(2)
    base = functional()
    x, _ = data(base)
    keras.utils.set_random_seed(2)
    model = heads()
    outputs = {}
    for name in ["one", "two", None]:
        kl.set_adapter(model, name)
        outputs[name] = numpy_of(model.predict(x, verbose=0))
        if name:
            fit_and_back(model, name)
    np.testing.assert_allclose(outputs[None], numpy_of(base.predict(x, verbose=0)), atol=1e-5)
    assert np.abs(outputs["one"] - outputs["two"]).max() > 1e-3
    for name, expected in outputs.items():
        kl.set_adapter(model, name)
        np.testing.assert_array_equal(numpy_of(model.predict(x, verbose=0)), expected)
    with pytest.raises(ValueError, match=r"'one', 'two'.*Activate one"):
        kl.set_adapter(model, ["one", "two"])
    kl.set_adapter(model, "one")
    with kl.disable_adapter(model):
        np.testing.assert_array_equal(numpy_of(model.predict(x, verbose=0)), outputs[None])
    kl.unload_lora(model)
    for variable, value in zip(model.weights, base.weights, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), numpy_of(value))


def fit_and_back(model: keras.Model, name: str) -> None:
    """A look at another adapter and back changes nothing."""
    before = [numpy_of(v) for v in model.weights]
    with kl.disable_adapter(model):
        pass
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)
    assert all(name in layer.active_adapters for layer in kl.lora_layers(model).values())


def test_weights_files_hold_every_adapters_head(tmp_path: Any) -> None:
    keras.utils.set_random_seed(2)
    model = heads()
    model.save_weights(tmp_path / "m.weights.h5")
    other = heads()
    other.load_weights(tmp_path / "m.weights.h5")
    x, _ = data(model)
    for name in ["one", "two", None]:
        for m in (model, other):
            kl.set_adapter(m, name)
        expected = numpy_of(model.predict(x, verbose=0))
        np.testing.assert_array_equal(numpy_of(other.predict(x, verbose=0)), expected)
    with pytest.raises(ValueError, match="no `.keras` file"):
        model.save(tmp_path / "m.keras")


def test_merging_keeps_the_head_of_what_acts() -> None:
    model = heads()
    x, _ = data(model)
    kl.set_adapter(model, "one")
    expected = numpy_of(model.predict(x, verbose=0))
    merged = kl.merge_lora(model, inplace=False)
    np.testing.assert_allclose(numpy_of(merged.predict(x, verbose=0)), expected, rtol=1e-4)
    with pytest.warns(UserWarning, match=r"\['two'\]"):
        kl.merge_lora(model)
    np.testing.assert_allclose(numpy_of(model.predict(x, verbose=0)), expected, rtol=1e-4)
    assert not [v for v in model.variables if "_lora_held" in vars(v)]


def test_a_layer_that_one_adapter_trains_in_full_no_other_adapts() -> None:
    model = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, layers_to_save=["middle"]))
    before = state(model)
    with pytest.raises(ValueError, match=r"\['middle'\].*the other way"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2), name="two")
    with pytest.raises(ValueError, match=r"\['up'\].*the other way"):
        kl.apply_lora(
            model, kl.LoRAConfig(rank=2, targets=["head"], layers_to_save=["up"]), name="two"
        )
    assert state(model) == before


@pytest.mark.parametrize("active", ["fr", "de", None])
def test_deleting_an_adapter_leaves_the_others(active: str | None) -> None:
    model = with_adapters(functional())
    kl.set_adapter(model, active)
    kept = {n: factors(model, n) for n in ["fr", "it"]}
    kl.delete_adapter(model, "de")
    assert {n for layer in kl.lora_layers(model).values() for n in layer.adapters} == {"fr", "it"}
    assert {n: factors(model, n) for n in ["fr", "it"]} == kept
    assert_acts(model, {"fr": 1.0} if active == "fr" else {})
    kl.delete_adapter(model, "fr")
    with pytest.raises(ValueError, match=r"names among \['it'\]"):
        kl.delete_adapter(model, "fr")


def test_deleting_the_last_adapter_is_unloading() -> None:
    model = composite()
    before = state(model)
    kl.apply_lora(model, kl.LoRAConfig(rank=2), name="one")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["query"]), name="two")
    kl.delete_adapter(model, "one")
    assert {path.split("/")[-1] for path in kl.lora_layers(model)} == {"query"}
    kl.delete_adapter(model, "two")
    assert state(model) == before


def test_a_deleted_name_starts_anew() -> None:
    model = kl.apply_lora(functional(), CONFIGS["de"], name="de")
    kl.apply_lora(model, CONFIGS["it"], name="it")
    model.compile("adam", "mse")
    for name in ["de", "it"]:
        kl.set_adapter(model, name)
        fit(model)
    kl.delete_adapter(model, "de")
    kl.apply_lora(model, CONFIGS["de"], name="de")
    assert int(model.optimizer.iterations) == 0
    assert not any(np.array(kl.lora_layers(model)["up"].adapters["de"].b).any() for _ in [0])


def test_scaling_is_a_setting_and_a_context() -> None:
    model = with_adapters(functional(), ["fr", "de"])
    kl.set_adapter(model, ["fr", "de"])
    kl.scale_adapter(model, "fr", -0.5)
    assert_acts(model, {"fr": -0.5, "de": 1.0})
    with kl.scale_adapter(model, "de", 3), kl.scale_adapter(model, "fr", 0):
        assert_acts(model, {"fr": 0.0, "de": 3.0})
    assert_acts(model, {"fr": -0.5, "de": 1.0})
    kl.set_adapter(model, "de")
    kl.set_adapter(model, "fr")  # the setting lasts
    assert_acts(model, {"fr": -0.5})
    for factor in [np.nan, np.inf, "2", True]:
        with pytest.raises(ValueError, match="Invalid `factor`: expected a finite number"):
            kl.scale_adapter(model, "fr", factor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names among"):
        kl.scale_adapter(model, "es", 1.0)
    expected = numpy_of(model.predict(data(model)[0], verbose=0))
    with pytest.warns(UserWarning, match="drops"):
        kl.merge_lora(model)
    np.testing.assert_allclose(numpy_of(model.predict(data(model)[0], verbose=0)), expected, 1e-4)


def test_two_models_around_one_encoder_have_a_task_each() -> None:
    inputs = keras.Input((5,))
    encoder = keras.Model(inputs, keras.layers.Dense(7, activation="gelu", name="up")(inputs))
    tasks = {
        name: keras.Model(inputs, keras.layers.Dense(units, name="head")(encoder(inputs)))
        for name, units in [("two", 2), ("four", 4)]
    }
    x = RNG.normal(size=(6, 5)).astype("float32")
    expected = {}
    for name, model in tasks.items():
        kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]), name=name)
        model.compile("adam", "mse")
        model.fit(x, np.ones((6, model.output_shape[-1])), epochs=3, verbose=0)
        expected[name] = numpy_of(model.predict(x, verbose=0))
    for name in ["two", "four", "two"]:
        kl.set_adapter(tasks[name], name)
        np.testing.assert_array_equal(numpy_of(tasks[name].predict(x, verbose=0)), expected[name])


def test_each_of_two_models_around_an_encoder_keeps_its_optimizer() -> None:
    def run(turns: str) -> keras.Model:
        keras.utils.set_random_seed(6)
        inputs = keras.Input((5,))
        encoder = keras.Model(inputs, keras.layers.Dense(7, activation="gelu", name="up")(inputs))
        x = np.random.default_rng(2).normal(size=(6, 5)).astype("float32")
        models = {
            name: keras.Model(inputs, keras.layers.Dense(units, name="head")(encoder(inputs)))
            for name, units in [("a", 2), ("b", 4)]
        }
        for name, model in models.items():
            kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]), name=name)
            model.compile("adam", "mse")
        for name in turns:
            kl.set_adapter(models[name], name)
            models[name].fit(x, np.ones((6, models[name].output_shape[-1])), verbose=0)
        return models["a"]

    turns, unbroken = run("aba"), run("aa")
    kl.set_adapter(turns, "a")
    received, expected = (list(factors(m, "a").values()) for m in (turns, unbroken))
    assert received == expected
    assert int(turns.optimizer.iterations) == 2


def test_a_name_twice_is_refused() -> None:
    model = with_adapters(functional())
    with pytest.raises(ValueError, match="each name once"):
        kl.set_adapter(model, ["fr", "fr"])


def combined(names: Sequence[str] = tuple(CONFIGS), **options: Any) -> keras.Model:
    model = with_adapters(functional(), names)
    kl.combine_adapters(model, {n: w for n, w in WEIGHTS.items() if n in names}, "new", **options)
    return model


WEIGHTS = {"fr": 0.7, "de": -1.3, "it": 2.0}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_an_exact_combination_is_the_sum_of_the_deltas(method: str) -> None:
    """Of adapters of other targets, ranks, scales and kinds of scale; see also test_combining."""
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


def test_a_head_goes_along_from_one_adapter_only() -> None:
    model = heads()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]), name="style")
    kl.combine_adapters(model, {"one": 1.0, "style": 0.5}, "new")
    kl.set_adapter(model, "one")
    head = numpy_of(model.get_layer("head").kernel)
    kl.set_adapter(model, "new")
    np.testing.assert_array_equal(numpy_of(model.get_layer("head").kernel), head)
    assert any("head" in v.path for v in model.trainable_variables)
    with pytest.raises(ValueError, match=r"no combination of heads"):
        kl.combine_adapters(model, {"one": 1.0, "two": 0.5}, "newer")


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


def test_the_order_of_adapters_is_kept_where_the_first_layer_lacks_the_first() -> None:
    """Else two adapters would go on with each other's optimizer state."""

    def trained(look_elsewhere: bool) -> keras.Model:
        keras.utils.set_random_seed(0)
        model = functional()
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["middle"]), name="x")
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "middle"]), name="y")
        model.compile("adam", "mse")
        kl.set_adapter(model, ["x", "y"])
        fit(model)
        if look_elsewhere:
            with kl.disable_adapter(model):
                pass
            kl.set_adapter(model, "y")
            kl.set_adapter(model, ["x", "y"])
        fit(model)
        return model

    model, expected = trained(True), trained(False)
    for path, layer in kl.lora_layers(model).items():
        for name, adapter in layer.adapters.items():
            np.testing.assert_array_equal(
                adapter.b, kl.lora_layers(expected)[path].adapters[name].b
            )
