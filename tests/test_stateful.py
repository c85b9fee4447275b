"""Verbs in any order, on a model whose values are followed in float64."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import keras_lora as kl

DIMS = {"up": (5, 7), "down": (7, 3)}
X = np.random.default_rng(1).normal(size=(4, 5)).astype("float32")
Y = np.random.default_rng(2).normal(size=(4, 3)).astype("float32")
SIZES = st.integers(1, 3)
WHERE = st.sampled_from([("up",), ("down",), ("up", "down")])
PICKED = st.lists(st.integers(0, 9), max_size=2)


@dataclass
class Known:
    """What an adapter is to be: `A` and `B` by layer, its scale and its scale factor."""

    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    scale: float
    factor: float = 1.0

    def delta(self, layer: str) -> Any:
        if layer not in self.factors:
            return 0.0
        a, b = self.factors[layer]
        return self.factor * self.scale * (a @ b)


@dataclass
class Expected:
    """The model in float64: `tanh(x W) V`, each with the deltas of the active adapters."""

    base: Mapping[str, tuple[np.ndarray, np.ndarray]]
    adapters: dict[str, Known] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)

    def output(self, names: Iterable[str] | None = None) -> np.ndarray:
        chosen = self.active if names is None else names
        h = X.astype("float64")
        for layer, (kernel, bias) in self.base.items():
            w = kernel + sum(self.adapters[name].delta(layer) for name in chosen)
            h = h @ w + bias
            h = np.tanh(h) if layer == "up" else h
        return h


def float64(value: Any) -> np.ndarray:
    return np.array(value).astype("float64")


@settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
class Verbs(RuleBasedStateMachine):
    """Each rule calls a verb and says what it is to do; the invariants compare."""

    @initialize()
    def start(self) -> None:
        layers = [keras.layers.Dense(7, "tanh", name="up"), keras.layers.Dense(3, name="down")]
        self.model = keras.Sequential([keras.Input((5,)), *layers])
        self.model.compile(keras.optimizers.Adam(0.01), "mse")
        kernels = {layer.name: layer for layer in layers}
        self.kernels = {name: np.array(layer.kernel) for name, layer in kernels.items()}
        base = {n: (float64(x.kernel), float64(x.bias)) for n, x in kernels.items()}
        self.expected = Expected(base)
        self.numbers = itertools.count()
        self.folder = Path(tempfile.mkdtemp())
        self.saved: dict[str, Known] = {}

    def names(self, picked: Sequence[int]) -> list[str]:
        """Some of the adapters, each once."""
        known = list(self.expected.adapters)
        return list(dict.fromkeys(known[i % len(known)] for i in picked)) if known else []

    def read(self, name: str) -> None:
        """Take over the factors of an adapter, after a verb that may choose or train them."""
        known = self.expected.adapters[name]
        for path, layer in kl.lora_layers(self.model).items():
            if name in layer.adapters:
                adapter = layer.adapters[name]
                known.factors[path] = float64(adapter.a), float64(adapter.b)

    @property
    def several(self) -> bool:
        return len(self.expected.adapters) > 1

    @precondition(lambda self: len(self.expected.adapters) < 5)
    @rule(rank=SIZES, where=WHERE, alpha=st.sampled_from([1, 3]))
    def apply(self, rank: int, where: Sequence[str], alpha: int) -> None:
        name = f"a{next(self.numbers)}"
        config = kl.LoRAConfig(rank=rank, alpha=alpha, targets=list(where))
        kl.apply_lora(self.model, config, name=name)
        rng = np.random.default_rng(next(self.numbers))
        self.expected.adapters[name] = Known({}, alpha / rank)
        for path, layer in kl.lora_layers(self.model).items():
            if name in layer.adapters:
                assert not np.any(np.array(layer.adapters[name].b)), path
                layer.adapters[name].b.assign(rng.normal(size=(rank, DIMS[path][1])))
        self.read(name)
        self.expected.active = [name]

    @precondition(lambda self: self.expected.adapters)
    @rule(picked=PICKED)
    def set_adapter(self, picked: Sequence[int]) -> None:
        self.expected.active = self.names(picked)
        kl.set_adapter(self.model, self.expected.active)

    @precondition(lambda self: self.expected.adapters)
    @rule(pick=st.integers(0, 9), factor=st.sampled_from([-1.0, 0.0, 0.5, 2.0]))
    def scale(self, pick: int, factor: float) -> None:
        (name,) = self.names([pick])
        kl.scale_adapter(self.model, name, factor)
        self.expected.adapters[name].factor = factor

    @precondition(lambda self: self.several)
    @rule(pick=st.integers(0, 9))
    def delete(self, pick: int) -> None:
        (name,) = self.names([pick])
        kl.delete_adapter(self.model, name)
        del self.expected.adapters[name]
        self.expected.active = [n for n in self.expected.active if n != name]

    @precondition(lambda self: self.expected.adapters)
    @rule(picked=PICKED)
    def contexts(self, picked: Sequence[int]) -> None:
        names = self.names(picked)
        with kl.use_adapter(self.model, names):
            self.compare(self.expected.output(names))
        with kl.disable_adapter(self.model):
            self.compare(self.expected.output([]))

    @precondition(lambda self: self.several)
    @rule(picked=PICKED, others=PICKED)
    def at_once(self, picked: Sequence[int], others: Sequence[int]) -> None:
        """Two threads that answer, each with adapters of its own, and one that switches."""
        chosen = [self.names(picked), self.names(others)]
        switched = [self.expected.active, *chosen, self.expected.active]

        def answer(names: Sequence[str]) -> None:
            for _ in range(3):
                with kl.use_adapter(self.model, names):
                    found = np.array(self.model(X))
                np.testing.assert_allclose(found, self.expected.output(names), rtol=1e-4, atol=1e-4)

        def switch() -> None:
            for names in switched:
                kl.set_adapter(self.model, names)

        with ThreadPoolExecutor(3) as threads:
            tasks = [threads.submit(answer, names) for names in chosen]
            tasks.append(threads.submit(switch))
        for task in tasks:
            task.result()

    @precondition(lambda self: self.expected.active)
    @rule(copied=st.booleans())
    def merge(self, copied: bool) -> None:
        if copied:
            copy = kl.merge_lora(self.model, inplace=False)
            np.testing.assert_allclose(copy(X), self.expected.output(), rtol=1e-4, atol=1e-4)
        else:
            with kl.merged(self.model):
                self.compare(self.expected.output())

    @precondition(lambda self: self.expected.adapters)
    @rule(pick=st.integers(0, 9))
    def save(self, pick: int) -> None:
        (name,) = self.names([pick])
        known = self.expected.adapters[name]
        directory = f"d{len(self.saved)}"
        kl.save_adapter(self.model, self.folder / directory, name)
        # A file has the scale that acts, as the scale of a factor of 1.
        self.saved[directory] = Known(dict(known.factors), known.scale * known.factor)

    @precondition(lambda self: self.saved and len(self.expected.adapters) < 5)
    @rule(pick=st.integers(0, 9))
    def load(self, pick: int) -> None:
        directory = sorted(self.saved)[pick % len(self.saved)]
        known, name = self.saved[directory], f"a{next(self.numbers)}"
        kl.load_adapter(self.model, self.folder / directory, name)
        self.expected.adapters[name] = Known(dict(known.factors), known.scale)
        self.expected.active = self.expected.active or [name]

    @precondition(lambda self: self.several and len(self.expected.adapters) < 5)
    @rule(picked=st.lists(st.integers(0, 9), min_size=1, max_size=2))
    def combine(self, picked: Sequence[int]) -> None:
        names, name = self.names(picked), f"a{next(self.numbers)}"
        kl.combine_adapters(self.model, dict.fromkeys(names, 0.5), name)
        parts = [self.expected.adapters[n] for n in names]
        layers = {layer for part in parts for layer in part.factors}
        deltas = {layer: sum(0.5 * part.delta(layer) for part in parts) for layer in layers}
        known = self.expected.adapters[name] = Known({}, 1.0)
        self.read(name)
        for layer, delta in deltas.items():
            np.testing.assert_allclose(known.delta(layer), delta, rtol=1e-4, atol=1e-5)
        self.expected.active = self.expected.active or [name]

    @precondition(lambda self: self.expected.active)
    @rule()
    def fit(self) -> None:
        before = {n: dict(x.factors) for n, x in self.expected.adapters.items()}
        self.model.train_on_batch(X, Y)  # the compiled step of `fit`, without a dataset
        for name in self.expected.active:
            self.read(name)
        for name in before.keys() - set(self.expected.active):
            assert before[name].keys() == self.expected.adapters[name].factors.keys()

    @precondition(lambda self: self.expected.adapters)
    @rule()
    def weights(self) -> None:
        path = self.folder / "model.weights.h5"
        self.model.save_weights(path)
        for layer in kl.lora_layers(self.model).values():
            for adapter in layer.adapters.values():
                adapter.b.assign(np.zeros(adapter.b.shape))
        self.model.load_weights(path)

    @precondition(lambda self: self.several)
    @rule()
    def unload(self) -> None:
        kl.unload_lora(self.model)
        self.expected.adapters, self.expected.active = {}, []

    def compare(self, expected: np.ndarray) -> None:
        np.testing.assert_allclose(self.model(X), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(self.model.predict_on_batch(X), expected, rtol=1e-4, atol=1e-4)

    @invariant()
    def computes_what_is_expected(self) -> None:
        if hasattr(self, "expected"):
            self.compare(self.expected.output())

    @invariant()
    def has_what_is_expected(self) -> None:
        if not hasattr(self, "expected"):
            return
        layers = kl.lora_layers(self.model)
        found: dict[str, set[str]] = {}
        for path, layer in layers.items():
            np.testing.assert_array_equal(layer.base_kernel, self.kernels[path])
            for name, adapter in layer.adapters.items():
                found.setdefault(name, set()).add(path)
                a, b = self.expected.adapters[name].factors[path]
                np.testing.assert_allclose(float64(adapter.a), a, rtol=1e-6, atol=1e-7)
                np.testing.assert_allclose(float64(adapter.b), b, rtol=1e-6, atol=1e-7)
        assert found == {n: set(x.factors) for n, x in self.expected.adapters.items()}
        acting = {n for layer in layers.values() for n in layer.active_adapters}
        assert acting == set(self.expected.active)


TestVerbs = pytest.mark.slow(Verbs.TestCase)
