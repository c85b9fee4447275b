"""Models with three adapters, and batches whose rows ask for different ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_lora as kl
from keras_lora.layers import BASE, all_owned
from support import exports, processes
from support.models import composite, functional, randomize_adapters, subclassed

Feeds = dict[str, np.ndarray]
RNG = np.random.default_rng(3)
NAMES = ("fr", "de", "it")
# Eleven rows: every adapter and the base, next to itself and to each other.
MIX = ("de", "", "it", "it", "fr", "de", "fr", "", "de", "it", "fr")


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=(len(MIX), *shape)).astype("float32")


def tokens(length: int = 7) -> Feeds:
    return {
        "token_ids": RNG.integers(0, 31, (len(MIX), length)).astype("int32"),
        "segment_ids": np.zeros((len(MIX), length), "int32"),
        "padding_mask": np.ones((len(MIX), length), "int32"),
    }


def bert(dtype: str = "float32") -> keras.Model:
    return exports.classifier(dtype, layers=1)


def attention() -> keras.Model:
    """Two sequences of tokens; every query looks at values of another length."""
    queries, values = keras.Input((None,), name="q"), keras.Input((None,), name="v")
    embed = keras.layers.Embedding(31, 11, name="embed")
    x = keras.layers.MultiHeadAttention(3, 5, name="attention")(embed(queries), embed(values))
    x = keras.layers.GlobalMaxPooling1D(name="pool")(x)
    return keras.Model({"q": queries, "v": values}, keras.layers.Dense(3, name="head")(x))


def experts() -> keras.Model:
    """A kernel with an axis that its input and its output share, and a bias across axes."""
    inputs = keras.Input((3, 5), name="x")
    dense = keras.layers.EinsumDense("bed,edk->bek", (3, 7), bias_axes="ek", name="experts")
    x = keras.layers.Flatten(name="flat")(dense(inputs))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x), name="mixture")


def config(rank: int, targets: Any, **options: Any) -> kl.LoRAConfig:
    return kl.LoRAConfig(rank=rank, targets=targets, **options)


# A model, its inputs, and the configurations of three adapters.
Case = tuple[Callable[[], keras.Model], Callable[[], Feeds], tuple[kl.LoRAConfig, ...]]
HEAD = {"layers_to_save": ["head"]}
CASES: dict[str, Case] = {
    "functional": (
        functional,
        lambda: {"features": normal(5)},
        (config(2, ["up", "middle"], **HEAD), config(5, ["up"]), config(3, ["middle"], **HEAD)),
    ),
    "composite": (
        composite,
        lambda: {"sequence": normal(11, 5)},
        (
            config(2, "all-linear", alpha=3, **HEAD),
            config(5, "attention", use_rslora=True, bias="lora_only"),
            config(1, ["block_1.up"], rank_pattern={"up": 4}, bias="all"),
        ),
    ),
    "subclassed": (
        subclassed,
        lambda: {"input_0": normal(5)},
        (config(2, "all-linear"), config(5, ["up"], bias="all"), config(1, ["block_0"], **HEAD)),
    ),
    "kerashub task": (
        bert,
        tokens,
        (
            config(2, "all-linear", layers_to_save=["logits"]),
            config(5, "attention", bias="all"),
            config(1, ["pooled_dense"], layers_to_save=["logits"]),
        ),
    ),
    "attention": (
        attention,
        lambda: {
            "q": RNG.integers(0, 31, (len(MIX), 3)).astype("float32"),
            "v": RNG.integers(0, 31, (len(MIX), 7)).astype("float32"),
        },
        (config(2, "attention"), config(3, ["query", "value"]), config(5, ["attention_output"])),
    ),
    "shared axes": (
        experts,
        lambda: {"x": normal(3, 5)},
        (config(2, ["experts"]), config(1, ["experts"], bias="all"), config(2, ["head"])),
    ),
    "dora": (
        functional,
        lambda: {"features": normal(5)},
        (
            config(2, ["up", "middle"], use_dora=True, **HEAD),
            config(5, ["up"], alpha=3, use_dora=True),
            config(3, "all-linear"),
        ),
    ),
    "dora, axes": (
        attention,
        lambda: {
            "q": RNG.integers(0, 31, (len(MIX), 3)).astype("float32"),
            "v": RNG.integers(0, 31, (len(MIX), 7)).astype("float32"),
        },
        (config(2, "attention", use_dora=True), config(3, ["query"]), config(5, ["query"])),
    ),
    "dora, shared axes": (
        experts,
        lambda: {"x": normal(3, 5)},
        (config(2, ["experts"], use_dora=True), config(1, ["experts"]), config(2, ["head"])),
    ),
    "mixed bfloat16": (
        lambda: functional(dtype="mixed_bfloat16"),
        lambda: {"features": normal(5)},
        (config(2, ["up", "middle"], **HEAD), config(5, ["up"]), config(3, ["middle"], **HEAD)),
    ),
    "bfloat16": (
        lambda: bert("bfloat16"),
        tokens,
        (config(2, "all-linear"), config(5, "attention", bias="all"), config(1, ["pooled_dense"])),
    ),
}


def adapted(make: Callable[[], keras.Model], configs: tuple[kl.LoRAConfig, ...]) -> keras.Model:
    model = make()
    for name, each in zip(NAMES, configs, strict=False):
        model = kl.apply_lora(model, each, name=name)
    randomize_adapters(model)
    rng = np.random.default_rng(13)
    for item in all_owned(model.variables):
        for name in sorted(item.names - {BASE}):
            item.assign(name, rng.normal(scale=0.3, size=item.variable.shape))
    kl.scale_adapter(model, NAMES[len(configs) - 1], 0.5)
    return model


def small() -> keras.Model:
    return adapted(CASES["functional"][0], CASES["functional"][2])


def called(model: keras.Model, feeds: Feeds) -> np.ndarray:
    values = list(feeds.values())
    given: Any = feeds if isinstance(getattr(model, "input", None), dict) else values[0]
    return np.array(keras.ops.cast(model(given, training=False), "float32"))


def answers(model: keras.Model, feeds: Feeds, names: tuple[str, ...] = MIX) -> np.ndarray:
    """The answer of each row, by the model merged with the row's adapter."""
    rows = np.zeros((0,))
    for name in dict.fromkeys(names):
        kl.set_adapter(model, name or None)
        if name:
            with kl.merged(model):
                received = called(model, feeds)
        else:
            received = called(model, feeds)
        rows = rows if len(rows) else np.zeros_like(received)
        wanted = [i for i, other in enumerate(names) if other == name]
        rows[wanted] = received[wanted]
    return rows


def served(path: Path, feeds: Feeds, adapter: Any = MIX) -> np.ndarray:
    loaded = tf.saved_model.load(str(path))
    given = {name: tf.constant(value) for name, value in feeds.items()}
    (output,) = loaded.signatures["serving_default"](adapter=tf.constant(adapter), **given).values()
    return output.numpy()


def assert_rows(received: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert received.dtype == np.float32
    scale = np.abs(expected).max()
    np.testing.assert_allclose(received / scale, expected / scale, atol=tolerance)


CLIENT = """
import json, sys
import numpy as np
sys.path.insert(0, "examples")
from run_saved_model import ModelError, SavedModel
path, inputs, outputs = sys.argv[1:4]
feeds, model = dict(np.load(inputs)), SavedModel(path)
signature = model.signatures["serving_default"]
refused = []
for bad in json.loads(sys.argv[4]):
    for name, tensor in signature.outputs.items():  # each output alone
        model.signatures["one"] = signature._replace(outputs={name: tensor})
        try:
            model.run({**feeds, "adapter": np.array(bad)}, "one")
        except ModelError as error:
            refused.append([error.code, str(error)])
np.savez(outputs, **model.run(feeds))  # the failed requests harmed nothing
assert not {"tensorflow", "keras", "keras_lora"} & sys.modules.keys()
print(json.dumps(refused))
"""


def client(path: Path, feeds: Mapping[str, Any], bad: list[list[str]]) -> tuple[Feeds, list[Any]]:
    """Answers of TensorFlow's C library, and its errors for bad adapters, one for each output."""
    folder = path.parent
    np.savez(folder / "in.npz", **{name: np.array(value) for name, value in feeds.items()})  # type: ignore[arg-type]
    block = ("keras", "keras_lora")
    arguments = (path, folder / "in.npz", folder / "out.npz", json.dumps(bad))
    printed = processes.run(CLIENT, *arguments, block=block)
    return dict(np.load(folder / "out.npz")), json.loads(printed.splitlines()[-1])
