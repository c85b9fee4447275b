"""Adapters between Keras and PEFT: real `peft` and `transformers` on torch, tiny random models."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.models import randomize_adapters
from support.peft_models import (
    BASE_DIFFERENCE,
    CASES,
    KERAS_OPTIONS,
    TOLERANCE,
    assert_agree,
    check_back,
    difference,
    every_architecture,
    hub_model,
    keras_model,
    options,
    peft_warnings,
    tensors,
    wrapped,
)

import keras_lora as kl
from keras_lora.exchange.converters import Block
from keras_lora.exchange.peft.factors import whole_magnitude
from keras_lora.layers import layer_adapter

pytest_plugins = ["support.peft_models"]

pytestmark = peft_warnings


@pytest.mark.parametrize(
    ("name", "index"), [*product(CASES, (0, 1)), *product(("llama", "bert", "gpt2"), (2,))]
)
def test_an_adapter_of_peft_computes_the_same_in_keras_and_comes_back_bit_for_bit(
    name: str, index: int, base: Path, tmp_path: Path
) -> None:
    theirs = wrapped(base, **options(name)[index])
    theirs.save_pretrained(tmp_path / "peft")
    backbone = keras_model(base)
    assert difference(name, backbone, theirs) > 3 * BASE_DIFFERENCE.get(name, TOLERANCE)
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert_agree(name, backbone, theirs)

    # Under the prefix that it came with, unless transformers 5 has renamed the modules.
    given = CASES[name].prefix(theirs.get_base_model()) if name == "dinov2" else None
    kl.save_peft_adapter(backbone, tmp_path / "back", prefix=given)
    check_back(name, backbone, base, tmp_path / "back", tensors(tmp_path / "peft"))


@every_architecture
def test_an_adapter_of_keras_computes_the_same_in_peft(
    name: str, base: Path, tmp_path: Path
) -> None:
    backbone = keras_model(base)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=3, alpha=7, **KERAS_OPTIONS.get(name, {})))
    randomize_adapters(backbone)
    model = hub_model(base)
    kl.save_peft_adapter(backbone, tmp_path / "keras", prefix=CASES[name].prefix(model))
    with warnings.catch_warnings():
        # PEFT warns of missing and unexpected keys.
        warnings.filterwarnings("error", "Found missing adapter keys|.*unexpected")
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "keras").eval()
    assert_agree(name, backbone, theirs)
    again = keras_model(base)
    kl.load_peft_adapter(again, tmp_path / "keras")
    pairs = zip(kl.lora_layers(backbone).values(), kl.lora_layers(again).values(), strict=True)
    for layer, other in pairs:
        ours, back = layer.adapters["default"], other.adapters["default"]
        np.testing.assert_array_equal(ours.a, back.a)
        np.testing.assert_array_equal(ours.b, back.b)
        assert back.scaling == pytest.approx(ours.scaling)


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("gpt2", {"use_rslora": True})])
def test_an_adapter_with_a_counterpart_is_ordinary_lora_of_twice_the_rank_in_peft(
    name: str, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    backbone = keras_model(base)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=3, alpha=7, init="pissa", **options))
    for layer in kl.lora_layers(backbone).values():
        for factor in layer.adapters["default"].factors:
            factor.assign(1.1 * np.array(factor))
    model = hub_model(base)
    kl.save_peft_adapter(backbone, tmp_path / "keras", prefix=CASES[name].prefix(model))
    assert difference(name, backbone, model) > 3 * TOLERANCE
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "keras").eval()
    assert_agree(name, backbone, theirs)
    again = keras_model(base)
    kl.load_peft_adapter(again, tmp_path / "keras")
    assert_agree(name, again, theirs)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_dora_of_keras_computes_the_same_in_peft(name: str, base: Path, tmp_path: Path) -> None:
    """Beside a layer without DoRA, and kernels of a fused matrix that have no adapter."""
    backbone = keras_model(base)
    targets = ["query", "value", *(["key"] if name == "llama" else [])]
    config = kl.LoRAConfig(rank=3, alpha=7, targets=targets, use_dora=True)
    kl.apply_lora(backbone, config)
    randomize_adapters(backbone)
    plain = next(iter(kl.lora_layers(backbone).values()))
    pair = plain.adapters["default"].factors[:2]
    spec = kl.LoRAConfig(rank=3, alpha=7).spec()
    plain.bank.put("default", layer_adapter(spec, pair))
    model = hub_model(base)
    kl.save_peft_adapter(backbone, tmp_path / "keras", prefix=CASES[name].prefix(model))
    written = json.loads((tmp_path / "keras" / "adapter_config.json").read_text())
    assert written["use_dora"] is True
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "keras").eval()
    assert_agree(name, backbone, theirs)

    again = keras_model(base)
    kl.load_peft_adapter(again, tmp_path / "keras")
    assert kl.lora_layers(again).keys() == kl.lora_layers(backbone).keys()
    for path, layer in kl.lora_layers(backbone).items():
        ours, back = (x.adapters["default"] for x in (layer, kl.lora_layers(again)[path]))
        for factor, other in zip(ours.factors, back.factors, strict=False):
            np.testing.assert_array_equal(factor, other)
    assert_agree(name, again, theirs)


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_magnitude_alone_reaches_a_kernel_of_a_fused_matrix(base: Path, tmp_path: Path) -> None:
    """As PEFT may train it: B is zero for the keys, and their magnitude is not their norm."""
    theirs = wrapped(base, target_modules=["attn.c_attn"], use_dora=True)
    with torch.no_grad():
        for module in theirs.modules():
            if hasattr(module, "lora_magnitude_vector"):
                width = module.lora_B["default"].weight.shape[0] // 3
                module.lora_B["default"].weight[width : 2 * width] = 0
    theirs.save_pretrained(tmp_path)
    backbone = keras_model(base)
    kl.load_peft_adapter(backbone, tmp_path)
    assert len(kl.lora_layers(backbone)) % 3 == 0
    assert_agree("gpt2", backbone, theirs)


def test_a_magnitude_needs_all_of_a_matrix() -> None:
    def block(rows: Any, columns: Any = range(5)) -> Block:
        return Block("q.weight", (7, 5), False, np.array(rows), np.array(columns))

    norms = np.arange(7.0)
    whole = whole_magnitude([(block([6, 5, 4]), norms[:3]), (block(range(4)), norms[3:])])
    np.testing.assert_array_equal(whole, [3, 4, 5, 6, 2, 1, 0])
    assert whole_magnitude([(block(range(6)), norms[:6])]) is None
    assert whole_magnitude([(block(range(7), range(4)), norms)]) is None


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("bert", "bert."), ("qwen3", "model.")]
)
def test_a_backbone_alone_is_told_the_prefix_of_a_class_with_a_head(
    name: str,  # noqa: ARG001, of which `base` is made
    prefix: str,
    base: Path,
    tmp_path: Path,
) -> None:
    backbone = kl.apply_lora(keras_model(base), kl.LoRAConfig(rank=2, targets="attention"))
    with pytest.warns(UserWarning, match=rf"pass prefix='{prefix}', or save the task"):
        kl.save_peft_adapter(backbone, tmp_path / "bare")
    kl.save_peft_adapter(backbone, tmp_path / "asked", prefix="")
    assert tensors(tmp_path / "asked").keys() == tensors(tmp_path / "bare").keys()


@pytest.mark.parametrize("name", ["llama"])
def test_one_scale_for_adapters_with_and_without_rslora(base: Path, tmp_path: Path) -> None:
    """PEFT has one `use_rslora` for all modules; the files have `scale_adapter`'s factor too."""
    backbone = keras_model(base)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=3, alpha=7, targets="attention", use_rslora=True))
    randomize_adapters(backbone)
    kl.scale_adapter(backbone, "default", -0.5)
    kl.save_peft_adapter(backbone, tmp_path / "keras")
    theirs = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "keras").eval()
    assert_agree("llama", backbone, theirs)
