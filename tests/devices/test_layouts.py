"""`keras.distribution` on JAX, on 8 virtual devices.

One device is the reference: the same verbs and steps, without a distribution.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import keras
import keras_hub
import numpy as np
import pytest
from keras import distribution, ops
from support.banks import randomize
from support.cases import numpy_of
from support.spread_models import (
    LAYOUTS,
    LENGTH,
    TOKENS,
    B,
    Distribution,
    M,
    every_kind,
    mesh,
    small,
)
from support.virtual_devices import use_eight_devices

import keras_lora as kl
from keras_lora.layers import AdapterBank
from keras_lora.walker import Tree

use_eight_devices()

Scope = Callable[[], contextlib.AbstractContextManager[Any]]

TARGETS = ["tokens", "query", "output", "up"]
PLAIN = kl.LoRAConfig(rank=2, targets=TARGETS, layers_to_save=["head"], dropout=0.2)
OTHER = kl.LoRAConfig(rank=3, targets=TARGETS, init="pissa", train_tokens=[3, 5, 7])
WITH_DORA = kl.LoRAConfig(rank=2, targets=TARGETS[1:], use_dora=True)
EVERY = kl.LoRAConfig(
    rank=2, targets=[*(f"re:{path}" for path in LAYOUTS), "re:separable.*", "re:lstm/.*"]
)


DISTRIBUTIONS: dict[str, Callable[[], Distribution]] = {
    "1x8": lambda: mesh(1, 8),
    "2x4": lambda: mesh(2, 4),
    "data": distribution.DataParallel,
}


def test_there_are_eight_devices() -> None:
    assert len(jax.devices()) == 8


def made(scope: Scope, make: Callable[[], keras.Model] = small) -> keras.Model:
    keras.utils.set_random_seed(4)
    with scope():
        base = make()
        base.compile(keras.optimizers.AdamW(0.01), "mse")
    return base


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.integers(0, TOKENS, (8, LENGTH)), rng.normal(size=(8, 8))


def values(base: keras.Model) -> dict[str, np.ndarray]:
    return {f"{i} {v.name}": numpy_of(v) for i, v in enumerate(base.variables)}


def steps(scope: Scope, verbs: Scope, folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """What a model has after each of some verbs, and outputs; training is in the scope."""
    base, (x, y) = made(scope), data()

    def trained() -> dict[str, np.ndarray]:
        with scope():
            base.fit(x, y, batch_size=8, epochs=2, verbose=0, shuffle=False)
        return values(base)

    with verbs():
        kl.apply_lora(base, PLAIN, name="one")
    yield trained()
    with verbs():
        kl.apply_lora(base, OTHER, name="two")
    yield trained()
    with verbs():
        kl.apply_lora(base, WITH_DORA, name="dora")
    yield trained()
    with verbs():
        kl.save_adapter(base, folder, "one")
        kl.load_adapter(base, folder, "one", replace=True)
        kl.set_adapter(base, ["one", "two"])
    yield trained()
    with verbs():
        copy = kl.merge_lora(base, inplace=False)
        with kl.merged(base):
            merged = values(base)
        assert layouts(copy) == layouts(kl.unload_lora(base))
    yield values(copy)
    yield merged
    with scope():
        yield {"outputs": numpy_of(copy.predict(x, verbose=0))}


def layouts(base: keras.Model) -> list[Any]:
    return [getattr(v._layout, "axes", None) for v in base.variables]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> list[dict[str, np.ndarray]]:
    return list(steps(contextlib.nullcontext, contextlib.nullcontext, tmp_path_factory.mktemp("x")))


@pytest.mark.filterwarnings("ignore:Merging drops")
@pytest.mark.parametrize(
    ("name", "inside"), [("1x8", False), ("2x4", False), ("2x4", True), ("data", False)]
)
def test_every_verb_does_what_it_does_on_one_device(
    name: str, inside: bool, expected: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    spread = DISTRIBUTIONS[name]()
    verbs = spread.scope if inside else contextlib.nullcontext
    for received, right in zip(steps(spread.scope, verbs, tmp_path), expected, strict=True):
        assert received.keys() == right.keys()
        for key, value in received.items():
            np.testing.assert_allclose(value, right[key], rtol=1e-5, atol=1e-5, err_msg=key)


def banks(base: keras.Model) -> dict[str, AdapterBank]:
    return Tree.of(base).banks_by_path


def shard(value: Any) -> tuple[int, ...]:
    (shape,) = {x.data.shape for x in value.addressable_shards}
    return shape


@pytest.mark.filterwarnings("ignore:The rank is above")
def test_factors_and_moments_are_split_as_their_matrix_is() -> None:
    spread = mesh(2, 4)
    base, sizes = made(spread.scope, every_kind), {B: 2, M: 4, None: 1}
    kl.apply_lora(base, EVERY)
    base.optimizer.build(base.trainable_variables)
    found = banks(base)
    for path, (_, matrix, a, b) in LAYOUTS.items():
        (slot,) = found[path].slots
        pairs = [(found[path].site.matrix, matrix), (slot.a, a), (slot.b, b)]
        for variable, axes in pairs:
            assert variable._layout.axes == axes, path
            parts = [n // sizes[axis] for n, axis in zip(variable.shape, axes, strict=True)]
            assert shard(variable.value) == tuple(parts), path
        assert shard(ops.convert_to_tensor(found[path].kernel)) == shard(pairs[0][0].value), path
    moments = [v for v in base.optimizer.variables if v.path.endswith(("momentum", "velocity"))]
    trained = [v for v in base.trainable_variables for _ in range(2)]
    for moment, variable in zip(moments, trained, strict=True):
        assert shard(moment.value) == shard(variable.value)
    every = {id(d) for d in jax.devices()}
    for variable in [*base.variables, *base.optimizer.variables]:
        assert {id(d) for d in variable.value.devices()} == every, variable.path


@pytest.mark.filterwarnings("ignore:The rank is above")
@pytest.mark.parametrize(
    ("other", "tokens"), [("1x8", LAYOUTS["tokens"][1]), ("data", (None, None)), (None, None)]
)
def test_files_of_one_mesh_are_read_under_another(
    other: str | None, tokens: Any, tmp_path: Path
) -> None:
    spread, (x, _) = mesh(2, 4), data()
    base = kl.apply_lora(made(spread.scope), PLAIN)
    randomize(base)
    kl.save_adapter(base, tmp_path / "adapter")
    base.save_weights(tmp_path / "m.weights.h5")
    with spread.scope():
        right = numpy_of(base.predict(x, verbose=0))
    scope = DISTRIBUTIONS[other]().scope if other else contextlib.nullcontext
    for file in ("adapter", "m.weights.h5"):
        loaded = made(scope)
        if file == "adapter":
            kl.load_adapter(loaded, tmp_path / file)
        else:
            kl.apply_lora(loaded, PLAIN).load_weights(tmp_path / file)
        with scope():
            received = numpy_of(loaded.predict(x, verbose=0))
        np.testing.assert_allclose(received, right, rtol=1e-5, atol=1e-5)
        assert layouts(loaded)[0] == tokens


def deep(scope: Scope) -> keras.Model:
    layers = [keras.layers.Dense(1024, name=f"up_{i}") for i in range(12)]
    with scope():
        return keras.Sequential([keras.Input((1024,)), *layers])


def test_no_verb_gathers_more_than_a_layer(tmp_path: Path) -> None:
    devices = distribution.DeviceMesh((2, 4), (B, M))
    split = distribution.LayoutMap(devices)
    split[".*kernel"] = (B, M)
    base = deep(distribution.ModelParallel(layout_map=split, batch_dim_name=B).scope)
    kernel = 1024 * 1024 * 4
    config = kl.LoRAConfig(rank=2, targets="all")
    verbs: list[Callable[[], Any]] = [
        lambda: kl.apply_lora(base, config, name="one"),
        lambda: kl.apply_lora(base, config, name="two"),
        lambda: kl.set_adapter(base, "one"),
        lambda: kl.save_adapter(base, tmp_path, "one"),
        lambda: kl.load_adapter(base, tmp_path, "three"),
        lambda: kl.delete_adapter(base, "two"),
        lambda: kl.delete_adapter(base, "three"),
        lambda: kl.merge_lora(base),
    ]
    for verb in verbs:
        tracemalloc.start()
        verb()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * kernel
    assert all(v._layout.axes == (B, M) for v in base.variables if v.name == "kernel")


def test_a_large_factor_is_drawn_outside_of_a_trace() -> None:
    """Keras draws one of 250 MB on 8 devices within `jit`, where NumPy has no values."""
    devices = distribution.DeviceMesh((1, 8), (B, M))
    split = distribution.LayoutMap(devices)
    split[".*embeddings"] = (M, None)
    with distribution.ModelParallel(layout_map=split, batch_dim_name=B).scope():
        base = keras.Sequential([keras.Input((3,)), keras.layers.Embedding(2**20, 4, name="e")])
    config = kl.LoRAConfig(rank=8, targets=["e"])
    with pytest.warns(UserWarning, match="The rank is above"):
        kl.apply_lora(base, config)
    (slot,) = banks(base)["e"].slots
    assert shard(slot.a.value) == (2**17, 8)


@pytest.mark.parametrize("name", ["2x4", "data"])
def test_a_base_made_outside_is_not_adapted_in_a_scope(name: str) -> None:
    base, scope = made(contextlib.nullcontext), DISTRIBUTIONS[name]().scope
    with scope(), pytest.raises(ValueError, match="'chained', which was made in no scope"):
        kl.apply_lora(base, PLAIN)
    assert not kl.lora_layers(base)


class Switching(keras.callbacks.Callback):
    """Drops the compiled functions between two epochs."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        if epoch == 1:
            kl.apply_lora(self.model, WITH_DORA, name="dora")


def test_functions_are_made_anew_within_fit() -> None:
    spread, (x, y) = mesh(2, 4), data()
    base = kl.apply_lora(made(spread.scope), WITH_DORA)
    with spread.scope():
        base.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[Switching()])
        base.evaluate(x, y, batch_size=8, verbose=0)
    kl.set_adapter(base, "default")
    with spread.scope():
        base.evaluate(x, y, batch_size=8, verbose=0)


def test_the_layout_map_of_keras_hub() -> None:
    backbone = keras_hub.models.GemmaBackbone
    options = {"vocabulary_size": 32, "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 64}
    options |= {"num_query_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    devices = distribution.DeviceMesh((1, 8), (B, M))
    split = distribution.ModelParallel(
        layout_map=backbone.get_layout_map(devices), batch_dim_name=B
    )
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 32, (4, 8))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    outputs = []
    for scope in (contextlib.nullcontext, split.scope):
        keras.utils.set_random_seed(4)
        with scope():
            lm = keras_hub.models.GemmaCausalLM(backbone(**options), preprocessor=None)
            lm.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True))
        kl.apply_lora(lm, kl.LoRAConfig(rank=2))
        with scope():
            lm.fit(x, tokens, batch_size=4, epochs=3, verbose=0, shuffle=False)
            outputs.append(numpy_of(lm.predict(x, verbose=0)))
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for bank in banks(lm).values():
        (slot,) = bank.slots
        split_axes = [axis for axis in bank.site.matrix._layout.axes if axis == M]
        assert [x for x in (*slot.a._layout.axes, *slot.b._layout.axes) if x == M] == split_axes
