"""Against PEFT on torch: the same factors give the same outputs and the same merged matrix."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import peft
import pytest
import torch

import keras_lora as kl

D, K, R = 11, 19, 7


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha", [3.0, 16.0])
def test_lora_equals_peft(alpha: float, use_rslora: bool, use_dora: bool) -> None:
    rng = np.random.default_rng(0)
    w, a, b, m, x = (
        rng.normal(size=shape).astype("float32") for shape in [(D, K), (D, R), (R, K), (K,), (5, D)]
    )
    factors = (a, b, m) if use_dora else (a, b)
    options: dict[str, Any] = {"use_rslora": use_rslora, "use_dora": use_dora}
    module = torch.nn.ModuleDict({"up": torch.nn.Linear(D, K, bias=False)})
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["up"], **options), module
    )["up"]
    with torch.no_grad():
        theirs.base_layer.weight.copy_(torch.tensor(w.T))
        for factor, value in zip(peft_factors(theirs), factors, strict=True):
            factor.copy_(torch.tensor(value.T))
        expected = theirs(torch.tensor(x)).numpy()
        theirs.merge()
        merged = theirs.base_layer.weight.numpy().T

    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(K, use_bias=False, name="up")])
    model.get_layer("up").kernel.assign(w)
    kl.apply_lora(model, kl.LoRAConfig(rank=R, alpha=alpha, targets=["up"], **options))
    for variable, value in zip(model.trainable_variables, factors, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(np.array(model(x)), expected, rtol=1e-4, atol=1e-4)
    kl.merge_lora(model)
    np.testing.assert_allclose(np.array(model.get_layer("up").kernel), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_its_factors_train_as_in_peft(
    use_dora: bool, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of plain gradient descent on both sides moves A, B and m alike."""
    rng = np.random.default_rng(1)
    shapes = [(D, K), (K,), (D, R), (R, K), (K,), (5, D)]
    w, bias, *values, x = (rng.normal(scale=0.3, size=s).astype("float32") for s in shapes)
    mask = rng.integers(0, 2, (5, D)).astype("float32") / (1 - dropout) if dropout else None
    values = values[: 3 if use_dora else 2]
    theirs = peft_layer(w, bias, values, mask)
    expected = theirs(torch.tensor(x))
    factors = peft_factors(theirs)
    optimizer = torch.optim.SGD(factors, lr=0.1)
    expected.pow(2).mean().backward()
    optimizer.step()

    monkeypatch.setattr("keras_lora.layers.slot_adapters.dropped", lambda x, *_: x * mask)
    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(K, name="up")])
    model.set_weights([w, bias])
    options: dict[str, Any] = {"use_dora": use_dora, "dropout": dropout}
    kl.apply_lora(model, kl.LoRAConfig(rank=R, alpha=14, targets=["up"], **options))
    for variable, value in zip(model.trainable_variables, values, strict=True):
        variable.assign(value)
    output = np.array(model(x, training=True))
    np.testing.assert_allclose(output, expected.detach(), rtol=1e-4, atol=1e-5)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, np.zeros((5, K), "float32"))
    for variable, factor in zip(model.trainable_variables, factors, strict=True):
        received, moved = np.array(variable), factor.detach().numpy().T
        np.testing.assert_allclose(received, moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_embedding_equals_peft(use_rslora: bool) -> None:
    rng, vocabulary, dim = np.random.default_rng(2), 13, 11
    e, a, b = (
        rng.normal(size=shape).astype("float32")
        for shape in [(vocabulary, dim), (vocabulary, R), (R, dim)]
    )
    x = rng.integers(0, vocabulary, (3, 5))
    module = torch.nn.ModuleDict({"up": torch.nn.Embedding(vocabulary, dim)})
    config = peft.LoraConfig(r=R, lora_alpha=3, use_rslora=use_rslora, target_modules=["up"])
    theirs = peft.inject_adapter_in_model(config, module)["up"]
    start = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]

    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Embedding(vocabulary, dim, name="up")(inputs))
    model.get_layer("up").embeddings.assign(e)
    kl.apply_lora(model, kl.LoRAConfig(rank=R, alpha=3, use_rslora=use_rslora, targets=["up"]))
    for ours, factor in zip(model.trainable_variables, start, strict=True):
        # Each factor starts as PEFT's does: zeros in both, or a standard deviation near 1 in both.
        np.testing.assert_allclose(np.std(ours), factor.detach().numpy().std(), atol=0.4)
    with torch.no_grad():
        theirs.base_layer.weight.copy_(torch.tensor(e))
        for factor, value in zip(start, (a, b), strict=True):
            factor.copy_(torch.tensor(value.T))
        expected = theirs(torch.tensor(x)).numpy()
        theirs.merge()
    for variable, value in zip(model.trainable_variables, (a, b), strict=True):
        variable.assign(value)
    np.testing.assert_allclose(np.array(model(x)), expected, rtol=1e-4, atol=1e-4)
    kl.merge_lora(model)
    merged = theirs.base_layer.weight.numpy()
    np.testing.assert_allclose(
        np.array(model.get_layer("up").embeddings), merged, rtol=1e-5, atol=1e-5
    )


def peft_layer(w: Any, bias: Any, values: list[Any], mask: Any) -> Any:
    """A layer in training with these factors; `mask` takes the place of dropout."""
    module = torch.nn.ModuleDict({"up": torch.nn.Linear(D, K)})
    options: dict[str, Any] = {"use_dora": len(values) == 3, "lora_dropout": 0.5}
    config = peft.LoraConfig(r=R, lora_alpha=14, target_modules=["up"], **options)
    layer = peft.inject_adapter_in_model(config, module)["up"].train()
    dropout = torch.nn.Identity() if mask is None else Masked(torch.tensor(mask))
    layer.lora_dropout["default"] = dropout
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(w.T))
        layer.base_layer.bias.copy_(torch.tensor(bias))
        for factor, value in zip(peft_factors(layer), values, strict=True):
            factor.copy_(torch.tensor(value.T))
    return layer


def peft_factors(layer: Any) -> list[Any]:
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [part["default"].weight for part in parts if "default" in part]


class Masked(torch.nn.Module):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Any) -> Any:
        return x * self.mask
