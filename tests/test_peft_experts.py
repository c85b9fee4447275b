"""Experts between Keras and PEFT's `target_parameters`: real `peft` on torch, tiny mixtures."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from support.cases import randomize
from support.peft_models import (
    MIXTURES,
    assert_agree,
    check_back,
    difference,
    hub_model,
    keras_model,
    peft_warnings,
    tensors,
    wrapped,
)

import keras_lora as kl
from keras_lora.checks import AdapterFileError
from keras_lora.layers import AdapterBank

pytest_plugins = ["support.peft_models"]

pytestmark = peft_warnings

FUSED = ["mixtral", "qwen2_moe", "qwen3_moe"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS = {"target_modules": [], "target_parameters": BOTH}


def banks(model: Any) -> dict[str, AdapterBank]:
    return {
        re.sub(r"_block_\d+/", "_block/", f"{path}/{name}"): bank
        for path, layer in kl.lora_layers(model).items()
        for name, bank in layer.banks.items()
        if bank.adapters
    }


def adapted(base: Path, targets: Any, **options: Any) -> Any:
    model = keras_model(base)
    kl.apply_lora(model, kl.LoRAConfig(**{"rank": 3, "alpha": 7, "targets": targets} | options))
    randomize([f for bank in banks(model).values() for f in bank.adapters["default"].factors])
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, EXPERTS) for name in FUSED),
        *((name, {**EXPERTS, "target_modules": ["q_proj"]}) for name in MIXTURES),
        (
            "mixtral",
            {
                "target_modules": ["q_proj", "v_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "experts.down_proj"],
                "rank_pattern": {r".*\.1\..*gate_up_proj": 5},
                "use_rslora": True,
            },
        ),
        ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    ],
)
def test_experts_of_peft_compute_the_same_in_keras_and_come_back_bit_for_bit(
    name: str, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    theirs = wrapped(base, **options)
    theirs.save_pretrained(tmp_path / "peft")
    model = keras_model(base)
    assert difference(name, model, theirs) > 1e-3
    kl.load_peft_adapter(model, tmp_path / "peft")
    assert_agree(name, model, theirs)
    kl.save_peft_adapter(model, tmp_path / "back")
    check_back(name, model, base, tmp_path / "back", tensors(tmp_path / "peft"))


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        *((name, "experts", {}) for name in FUSED),
        ("gemma4_text moe", "experts", {}),
        ("mixtral", ["query", "experts/expert_feedforward_intermediate_dense"], {}),
        ("mixtral", "experts", {"init": "pissa", "use_rslora": True}),
        ("mixtral", "experts", {"rank_pattern": {"expert_feedforward_gate_dense": 2}}),
        ("mixtral", ["value", "experts/expert_feedforward_output_dense"], {"dropout": 0.1}),
    ],
)
def test_experts_of_keras_compute_the_same_in_peft(
    name: str, targets: Any, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = adapted(base, targets, **options)
    hub = hub_model(base)
    warned: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if "dropout" in options:
        warned = pytest.warns(UserWarning, match="dropout=0.1.*the files say lora_dropout=0")
    with warned:
        kl.save_peft_adapter(model, tmp_path / "keras", prefix="model.")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys|.*unexpected")
        theirs = peft.PeftModel.from_pretrained(hub, tmp_path / "keras").eval()
    assert_agree(name, model, theirs)
    again = keras_model(base)
    kl.load_peft_adapter(again, tmp_path / "keras")
    assert_agree(name, again, theirs)
    assert banks(again).keys() == banks(model).keys()


def test_what_peft_does_not_have_for_parameters_is_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(base, "experts", use_dora=True)
    with pytest.raises(ValueError, match="gate_dense: DoRA, which PEFT does not have"):
        kl.save_peft_adapter(model, tmp_path / "keras")
    assert not (tmp_path / "keras").exists()


def test_files_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    wrapped(base, **EXPERTS).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"r": 2}, r"expected \(experts \* 2, in\)"),
        ({"r": 9}, "for experts of shape .* expected"),
        ({"target_parameters": BOTH[:1]}, "tensors of 2 parameters"),
        ({"target_parameters": ["experts.weight"]}, "no stacked experts"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(AdapterFileError, match=message):
            kl.load_peft_adapter(keras_model(base), tmp_path / "peft")


@pytest.fixture
def name() -> str:
    return "mixtral"
