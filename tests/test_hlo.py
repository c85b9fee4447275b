"""A training step as XLA gets it, since no TPU is here: shapes, the host, gradients, compilations.

On JAX it is lowered for a TPU. Where the other tests compare values, these look at what computes
them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.every_kind import KINDS, TOKENS, batch, beside, matrices, with_gradients
from support.hlo import dynamic_shapes, host_calls, lowered

import keras_lora as kl

JAX = keras.backend.backend() == "jax"
# Matrices of which the gradient is as large as they are, as `docs/adapting.md` says: small ones,
# and those of layers whose own code reads a formed matrix.
FORMED = {
    "depthwise",
    "separable/depthwise_kernel",
    "conv_lstm/conv_lstm_cell/kernel",
    "conv_lstm/conv_lstm_cell/recurrent_kernel",
    "positions/embeddings",
}
WITH_DORA = ("lstm/", "gru/", "simple/", "mixture/")  # by the beginnings of their paths

# The kinds that an option is refused for, and the option.
OPTIONS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {"plain": ([], {})}
if JAX:  # which traces in a fifth of the time
    OPTIONS |= {
        "DoRA, dropout": ([*TOKENS, "positions"], {"use_dora": True, "dropout": 0.1}),
        "rsLoRA, A frozen": (TOKENS, {"use_rslora": True, "freeze_a": True}),
        "PiSSA, tokens": (
            [],
            {"init": "pissa", "train_tokens": {"embedding": [2, 3, 5], "tied": [7, 11]}},
        ),
    }


def targets(without: Sequence[str] = ()) -> list[str]:
    return [f"re:{name}(/.*)?" for name in KINDS if name not in without]


def check(text: str) -> None:
    assert dynamic_shapes(text) == []
    assert host_calls(text) == []


@pytest.fixture(scope="module")
def plain() -> keras.Model:
    return beside()


def test_gradients_of_matrices_are_found(plain: keras.Model) -> None:
    """In the model that trains them, of each kind: what is not found below would be."""
    sizes, text = matrices(plain, targets()), lowered(plain, *batch(plain))
    check(text)
    assert with_gradients(sizes, text) == sizes.keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_of_every_kind(option: str, plain: keras.Model) -> None:
    without, options = OPTIONS[option]
    kl.apply_lora(plain, kl.LoRAConfig(rank=1, targets=targets(without), **options))
    sizes, text = matrices(plain, targets(without)), lowered(plain, *batch(plain))
    kl.unload_lora(plain)
    check(text)
    formed = FORMED & sizes.keys()
    if "use_dora" in options:
        formed |= {path for path in sizes if path.startswith(WITH_DORA)}
    assert with_gradients(sizes, text) == formed


def test_a_step_on_an_int8_base() -> None:
    kinds = ["dense", "query", "by_index", "tied"]
    base = beside(kinds)
    sizes = matrices(base, kinds)
    for name in kinds:
        base.get_layer(name).quantize("int8")
    kl.apply_lora(base, kl.LoRAConfig(rank=1, targets=kinds))
    text = lowered(base, *batch(base))
    check(text)
    assert with_gradients(sizes, text) == set()


def test_a_step_with_logits_in_chunks_and_rematerialized_blocks() -> None:
    tokens = keras.Input((7,), dtype="int32")
    embedding = layers.ReversibleEmbedding(61, 5, name="tokens")
    x = embedding(tokens)
    for i in range(2):
        sizes = (11 + 2 * i, 5)
        block = [layers.Dense(n, "gelu", name=f"dense_{n}") for n in sizes]
        x = keras.Sequential(block, name=f"block_{i}")(x)
    model = keras.Model(tokens, embedding(x, reverse=True))
    kl.apply_lora(model, kl.LoRAConfig(rank=1, targets="all", dropout=0.1))
    kl.chunk_logits(kl.rematerialize(model), 46)  # three whole chunks and a half one
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=True)
    x, _ = batch(model)
    text = lowered(model, x[0], x[0])
    check(text)
    assert with_gradients(matrices(model, "all"), text) == set()


# --- Compilations -------------------------------------------------------------------------------


def several() -> keras.Model:
    """A model with two adapters, with a head each."""
    kinds = [
        layers.EinsumDense("btd,dnh->btnh", (7, 2, 3), name="query"),
        layers.Reshape((7, 6)),
        layers.Conv1D(5, 7, name="convolution"),
        layers.Flatten(),
        layers.Dense(3, name="head"),
    ]
    model = keras.Sequential([keras.Input((7, 5)), *kinds])
    model.compile("adam", "mse", jit_compile=True)
    for name, rank in (("two", 2), ("one", 3)):
        options: dict[str, Any] = {"targets": ["query", "convolution"], "layers_to_save": ["head"]}
        kl.apply_lora(model, kl.LoRAConfig(rank=rank, dropout=0.1, **options), name=name)
    return model


def trained_in_turns(model: keras.Model) -> None:
    """Epochs of two batches of three rows and one of a single row, and switches between them."""
    x = np.random.default_rng(0).normal(size=(7, 7, 5))
    for name in ("one", "two", "one"):
        kl.set_adapter(model, name)
        model.fit(x, np.zeros((7, 3)), batch_size=3, epochs=3, verbose=0)


if JAX:
    jax = importlib.import_module("jax")

    def test_each_shape_of_a_batch_is_compiled_once() -> None:
        """Keras passes a smaller last batch as it is."""
        names = list[str]()

        def note(event: str, _: float, **about: Any) -> None:
            if event.endswith("/backend_compile_duration"):
                names.append(about["fun_name"])

        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            trained_in_turns(several())
        finally:
            jax.monitoring.unregister_event_duration_listener(note)
        assert names.count("jit(train_step)") == 2

    def test_python_and_dynamic_shapes_are_found() -> None:
        def prints(x: Any) -> Any:
            jax.debug.print("{}", x)
            return x

        inputs = keras.Input((7,))
        model = keras.Model(inputs, layers.Dense(3)(layers.Lambda(prints)(inputs)))
        model.compile("sgd", "mse")
        assert host_calls(lowered(model, np.ones((2, 7)), np.ones((2, 3)), platform="cpu"))
        export = importlib.import_module("jax.export")
        of_any_length = jax.ShapeDtypeStruct(export.symbolic_shape("n"), "float32")
        exported = export.export(jax.jit(jax.numpy.sin))(of_any_length)
        assert dynamic_shapes(str(exported.mlir_module()))

else:

    def test_a_smaller_last_batch_is_not_traced_again() -> None:
        model, traces = several(), list[None]()
        step = model.train_step

        def train_step(data: Any) -> Any:
            traces.append(None)
            return step(data)

        model.train_step = train_step
        trained_in_turns(model)
        assert len(traces) == 1
