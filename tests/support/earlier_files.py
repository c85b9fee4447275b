"""Models and adapters without random numbers, whose files version 0.1.0 wrote; only public names.

`tests/fixtures/v0_1_0/write.py` writes the files with version 0.1.0 and
`tests/test_earlier_files.py` reads them with this one: both take the models from this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

import keras_lora as kl

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1_0"
EPOCHS = 2
Values = dict[str, Any]  # arrays


def fill(variables: Iterable[Any], start: int = 0) -> None:
    """Set variables to fixed numbers between -1/3 and 1/3."""
    for i, variable in enumerate(variables, start):
        if np.issubdtype(np.dtype(variable.dtype), np.floating):
            numbers = (37 * np.arange(np.prod(variable.shape)) + 11 * i) % 101
            variable.assign(((numbers - 50) / 150).reshape(variable.shape))


def dense() -> keras.Model:
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(7, activation="gelu", name="up")(inputs)
    x = keras.layers.Dense(11, activation="tanh", name="middle")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="dense")
    fill(model.weights)
    return model


def tokens() -> keras.Model:
    inputs = keras.Input((7,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(13, 5, name="embedding")(inputs)
    x = keras.layers.EinsumDense("abc,cde->abde", (7, 2, 3), bias_axes="de", name="heads")(x)
    x = keras.layers.Dense(3, name="head")(keras.layers.Flatten(name="flat")(x))
    model = keras.Model(inputs, x, name="tokens")
    fill(model.weights)
    return model


def bert() -> keras.Model:
    model = keras_hub.models.BertBackbone(
        vocabulary_size=13,
        num_layers=1,
        num_heads=2,
        hidden_dim=6,
        intermediate_dim=10,
        max_sequence_length=7,
        name="bert",
    )
    fill(model.weights)
    return model


def feed(model: keras.Model) -> Any:
    numbers = np.arange(3 * 7).reshape(3, 7)
    if model.name == "dense":
        return (((numbers[:, :5] * 29) % 17 - 8) / 8).astype("float32")
    token_ids = ((numbers * 5) % 13).astype("int32")
    if model.name == "tokens":
        return token_ids
    padding, segments = np.ones((3, 7), "int32"), (numbers % 2).astype("int32")
    return {"token_ids": token_ids, "padding_mask": padding, "segment_ids": segments}


def factors(model: keras.Model, name: str) -> Values:
    return {
        f"{path}/{i}": np.array(keras.ops.convert_to_numpy(factor))
        for path, layer in kl.lora_layers(model).items()
        if name in layer.adapters
        for i, factor in enumerate(layer.adapters[name].factors)
    }


def values(model: keras.Model) -> Values:
    """For each adapter, while it is active: its factors, the base's values, and the outputs."""
    layers = kl.lora_layers(model).values()
    own = {id(v) for layer in layers for v in layer.adapter_variables}
    found: Values = {}
    for name in sorted({name for layer in layers for name in layer.adapters}):
        kl.set_adapter(model, name)
        base = [keras.ops.convert_to_numpy(v) for v in model.weights if id(v) not in own]
        found |= {f"{name}/base/{i}": np.array(value) for i, value in enumerate(base)}
        found |= {f"{name}/factors/{path}": value for path, value in factors(model, name).items()}
        outputs = model(feed(model))
        outputs = outputs["sequence_output"] if isinstance(outputs, dict) else outputs
        found[f"{name}/outputs"] = np.array(keras.ops.convert_to_numpy(outputs))
    return found


def seeds(model: keras.Model) -> Values:
    """The states of the dropouts."""
    states = [v for v in model.variables if np.issubdtype(np.dtype(v.dtype), np.integer)]
    return {f"seed/{i}": np.array(keras.ops.convert_to_numpy(v)) for i, v in enumerate(states)}


@dataclass(frozen=True)
class Earlier:
    """A model with adapters, of which version 0.1.0 wrote a file."""

    make: Callable[[], keras.Model]
    configs: dict[str, kl.LoRAConfig]
    options: dict[str, Any] = field(default_factory=dict)  # options of the function that saves
    factor: float = 1.0  # the factor of `scale_adapter`

    def untrained(self) -> keras.Model:
        """The model with its adapters as `apply_lora` starts them."""
        model = self.make()
        for name, config in self.configs.items():
            kl.apply_lora(model, config, name)
        return model

    def adapted(self) -> keras.Model:
        model = self.untrained()
        for start, name in enumerate(self.configs):
            kl.set_adapter(model, name)
            fill(model.trainable_variables, 3 + 17 * start)
            if self.factor != 1.0:
                kl.scale_adapter(model, name, self.factor)
        return model


def one(make: Callable[[], keras.Model], **config: Any) -> Earlier:
    return Earlier(make, {"default": kl.LoRAConfig(**({"rank": 2, "alpha": 3} | config))})


TRAINED: dict[str, Any] = {"bias": "lora_only", "layers_to_save": ["head"]}
ADAPTERS = {
    "plain": one(dense),
    "float16": Earlier(dense, {"default": kl.LoRAConfig(rank=2, alpha=3)}, {"dtype": "float16"}),
    "dora": one(dense, use_dora=True),
    "embedding": one(tokens, targets=["embedding", "heads"], use_rslora=True),
    "head and biases": one(
        dense, rank_pattern={"middle": 3}, alpha_pattern={"up": 5.0}, dropout=0.1, **TRAINED
    ),
    "scaled": Earlier(dense, {"default": kl.LoRAConfig(rank=2, alpha=3)}, factor=0.5),
}
TWO = {"first": kl.LoRAConfig(rank=2, alpha=3, dropout=0.2), "second": kl.LoRAConfig(rank=3)}
WEIGHTS = {
    "two adapters": Earlier(dense, TWO),
    "dora": ADAPTERS["dora"],
    "waiting head": Earlier(
        dense,
        {
            "first": kl.LoRAConfig(rank=2, **TRAINED),
            "second": kl.LoRAConfig(rank=2, **TRAINED),
        },
    ),
}
WITH_DROPOUT = {
    "first": kl.LoRAConfig(rank=2, dropout=0.2),
    "second": kl.LoRAConfig(rank=3, dropout=0.1),
}
KERAS = {"two adapters": Earlier(dense, WITH_DROPOUT), "head": one(dense, dropout=0.1, **TRAINED)}
PEFT = {
    "plain": one(bert, targets=[r"re:.*(query|key|value|feedforward_.*_dense)"]),
    "embedding": one(bert, targets=[r"re:.*(query|token_embedding)"]),
    "dora": one(bert, targets=[r"re:.*(query|value)"], use_dora=True),
}
LORA_H5 = {"plain": one(bert, targets=[r"re:.*(query|value)"])}
TRAINING = one(dense, dropout=0.2, **TRAINED)


def trained(model: keras.Model, checkpoint: Any, epochs: int) -> keras.Model:
    """The model after epochs with a checkpoint, in batches of a fixed order."""
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x = feed(model)
    y = np.arange(9, dtype="float32").reshape(3, 3) / 9
    model.fit(x, y, batch_size=1, shuffle=False, epochs=epochs, verbose=0, callbacks=[checkpoint])
    return model
