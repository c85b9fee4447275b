"""Against PEFT on torch: the same factors give the same outputs and the same merged matrix."""

from __future__ import annotations

import keras
import numpy as np
import peft
import pytest
import torch

import keras_lora as kl

D, K, R = 11, 19, 7


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("alpha", [3.0, 16.0])
def test_lora_equals_peft(alpha: float, use_rslora: bool) -> None:
    rng = np.random.default_rng(0)
    w, a, b, x = (
        rng.normal(size=shape).astype("float32") for shape in [(D, K), (D, R), (R, K), (5, D)]
    )
    module = torch.nn.ModuleDict({"up": torch.nn.Linear(D, K, bias=False)})
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=R, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["up"]), module
    )["up"]
    with torch.no_grad():
        theirs.base_layer.weight.copy_(torch.tensor(w.T))
        theirs.lora_A["default"].weight.copy_(torch.tensor(a.T))
        theirs.lora_B["default"].weight.copy_(torch.tensor(b.T))
        expected = theirs(torch.tensor(x)).numpy()
        theirs.merge()
        merged = theirs.base_layer.weight.numpy().T

    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(K, use_bias=False, name="up")])
    model.get_layer("up").kernel.assign(w)
    config = kl.LoRAConfig(rank=R, alpha=alpha, use_rslora=use_rslora, targets=["up"])
    kl.apply_lora(model, config)
    for variable, value in zip(model.trainable_variables, (a, b), strict=True):
        variable.assign(value)
    np.testing.assert_allclose(np.array(model(x)), expected, rtol=1e-4, atol=1e-4)
    kl.merge_lora(model)
    np.testing.assert_allclose(np.array(model.get_layer("up").kernel), merged, rtol=1e-5, atol=1e-5)


def test_a_trains_as_in_peft() -> None:
    """One step of plain gradient descent on both sides moves A and B alike."""
    rng = np.random.default_rng(1)
    w, a, b, x = (
        rng.normal(scale=0.3, size=shape).astype("float32")
        for shape in [(D, K), (D, R), (R, K), (5, D)]
    )
    module = torch.nn.ModuleDict({"up": torch.nn.Linear(D, K, bias=False)})
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=R, lora_alpha=14, target_modules=["up"]), module
    )["up"]
    factors = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        theirs.base_layer.weight.copy_(torch.tensor(w.T))
        for factor, value in zip(factors, (a, b), strict=True):
            factor.copy_(torch.tensor(value.T))
    optimizer = torch.optim.SGD(factors, lr=0.1)
    theirs(torch.tensor(x)).pow(2).mean().backward()
    optimizer.step()

    model = keras.Sequential([keras.Input((D,)), keras.layers.Dense(K, use_bias=False, name="up")])
    model.get_layer("up").kernel.assign(w)
    kl.apply_lora(model, kl.LoRAConfig(rank=R, alpha=14, targets=["up"]))
    for variable, value in zip(model.trainable_variables, (a, b), strict=True):
        variable.assign(value)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, np.zeros((5, K), "float32"))
    for variable, factor in zip(model.trainable_variables, factors, strict=True):
        received, expected = np.array(variable), factor.detach().numpy().T
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)


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
        # At the start zeros here and there, or of standard deviation 1.
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
