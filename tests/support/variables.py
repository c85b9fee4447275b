"""Models with bare variables: of layers of one's own, tables of positions, experts of mixtures."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_lora as kl
from keras_lora.layers import AdapterBank
from support.banks import banks, randomize
from support.cases import numpy_of

RANK, ALPHA = 2, 3
STEPS, DIM, EXPERTS, INNER = 7, 5, 3, 11
Make = Callable[..., keras.layers.Layer]


class Own(keras.layers.Layer):
    """A layer with matrices of two to four axes, a vector, and a dense layer."""

    def build(self, input_shape: Any) -> None:
        dim = input_shape[-1]
        self.table = self.add_weight(shape=(STEPS, dim), name="rows")
        self.kernel = self.add_weight(shape=(EXPERTS, dim, INNER), name="stack")
        self.wide = self.add_weight(shape=(2, 3, dim, INNER), name="wide", autocast=False)
        self.vector = self.add_weight(shape=(dim,), name="vector")
        self.inner = keras.layers.Dense(dim, dtype=self.dtype_policy, name="inner")
        self.inner.build((None, dim))
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        assert isinstance(training, bool | None)
        x = self.inner(inputs + self.table[: inputs.shape[1]] + self.vector)
        wide = ops.cast(ops.mean(self.wide, (0, 1)), x.dtype)
        return ops.einsum("btd,edm->btm", x, self.kernel) + ops.matmul(x, wide)


class Held(keras.layers.Layer):
    """A layer with matrices in a list, a tuple and a dict, which Keras names by numbers."""

    def build(self, input_shape: Any) -> None:
        dim = input_shape[-1]
        self.rows = [self.add_weight(shape=(STEPS, dim)) for _ in range(2)]
        self.mixing = (self.add_weight(shape=(dim, dim)), "not a matrix")
        self.by_name = {name: self.add_weight(shape=(dim, INNER)) for name in ("up", "gate")}
        self.built = True

    def call(self, inputs: Any) -> Any:
        x = ops.matmul(inputs, self.mixing[0]) + sum(self.rows)
        up, gate = (ops.matmul(x, self.by_name[name]) for name in sorted(self.by_name))
        return ops.multiply(up, ops.sigmoid(gate))


class Gated(keras.layers.Dense):
    """A `Dense` that computes something else, with one more matrix."""

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.gate = self.add_weight(shape=(input_shape[-1], self.units), name="gate")

    def call(self, inputs: Any) -> Any:
        gate = ops.sigmoid(ops.matmul(inputs, self.gate))
        return ops.multiply(gate, ops.matmul(inputs, self.kernel) + self.bias)


class Mixture(keras.layers.Layer):
    """The experts of one of KerasHub's mixtures, on all rows alike."""

    def __init__(self, experts: keras.layers.Layer, **options: Any) -> None:
        super().__init__(**options)
        self.experts = experts

    def build(self, input_shape: Any) -> None:
        self.experts.build(input_shape)
        self.built = True

    def call(self, inputs: Any) -> Any:
        rows = ops.reshape(inputs, (-1, DIM))
        if type(self.experts).__name__ == "Gemma4MoEBlock":
            outputs = self.experts(rows, ops.softmax(rows[:, :EXPERTS]))
        else:
            outputs = ops.sum(self.experts(rows), axis=0)
        return ops.reshape(outputs, ops.shape(inputs))


def experts(module: str, class_name: str) -> Make:
    experts_class = vars(importlib.import_module(f"keras_hub.src.models.{module}"))[class_name]

    def make(name: str = "mixture", **options: Any) -> keras.layers.Layer:
        bank = experts_class(EXPERTS, DIM, INNER, name="experts", **options)
        return Mixture(bank, name=name)

    return make


MIXTURES: dict[str, Make] = {
    "mixtral": experts("mixtral.mixtral_decoder", "MixtralMoeExperts"),
    "qwen_moe": experts("qwen_moe.qwen_moe_decoder", "QwenMoeExperts"),
    "qwen3_moe": experts("qwen3_moe.qwen3_moe_decoder", "Qwen3MoeExperts"),
    "qwen3_5_moe": experts("qwen3_5_moe.qwen3_5_moe_decoder", "Qwen3_5MoeExperts"),
    "gpt_oss": experts("gpt_oss.gpt_oss_decoder", "GptOssExperts"),
    "gemma4": experts("gemma4.gemma4_moe", "Gemma4MoEBlock"),
}


def positions(**options: Any) -> keras.layers.Layer:
    return keras_hub.layers.PositionEmbedding(STEPS + 2, name="positions", **options)


def own(**options: Any) -> keras.layers.Layer:
    return Own(name="own", **options)


def held(**options: Any) -> keras.layers.Layer:
    return Held(name="held", **options)


def gated(**options: Any) -> keras.layers.Layer:
    return Gated(INNER, name="gated", **options)


HELD = [f"held/{name}" for name in ("rows_0", "rows_1", "mixing_0", "by_name_up", "by_name_gate")]
OWN = ["own/rows", "own/stack", "own/wide"]
CASES: dict[str, tuple[Make, Any]] = {
    "positions": (positions, ["positions/embeddings"]),
    "own": (own, OWN),
    "one of own": (own, ["stack"]),
    "held": (held, HELD),
    "one of held": (held, ["by_name_gate"]),
    "gated": (gated, ["gated/kernel", "gated/gate"]),
    **{name: (make, "experts") for name, make in MIXTURES.items()},
}


def made(name: str, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(7)
    layer = CASES[name][0](**options)
    model = keras.Sequential([keras.Input((STEPS, DIM)), layer], name="net")
    rng = np.random.default_rng(3)
    for variable in model.weights:
        variable.assign(rng.normal(scale=0.5, size=variable.shape))
    return model


def inputs() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, STEPS, DIM)).astype("float32")


def adapted(name: str, base: keras.Model | None = None, **options: Any) -> keras.Model:
    config = kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=CASES[name][1], **options)
    model = kl.apply_lora(made(name) if base is None else base, config)
    randomize(model)
    return model


def delta(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`A B`, of each expert where there are experts."""
    return np.einsum("edr,erk->edk", a, b) if b.ndim == 3 else np.tensordot(a, b, 1)


def effective(bank: AdapterBank) -> np.ndarray:
    """In float64."""
    w = numpy_of(bank.site.matrix).astype("float64")
    a, b, *m = (numpy_of(f).astype("float64") for f in bank.adapters["default"].factors)
    w = w + ALPHA / RANK * delta(a, b)
    return m[0][:, None] * w / np.linalg.norm(w, axis=1, keepdims=True) if m else w


def reference(name: str, model: keras.Model) -> keras.Model:
    """A plain model with the effective matrices."""
    plain = made(name)
    base = [v for v in model.weights if "lora" not in v.path]
    for bank in banks(model):
        index = [v is bank.site.matrix for v in base].index(True)
        plain.weights[index].assign(effective(bank))
    return plain
