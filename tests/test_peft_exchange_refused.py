"""What does not fit between Keras and PEFT is refused, and nothing changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import keras_hub
import pytest
from support.models import state
from support.peft_models import keras_model, peft_warnings, tensors, wrapped

import keras_lora as kl

pytest_plugins = ["support.peft_models"]

pytestmark = peft_warnings


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another size": ("qwen2", {}, r"q_proj: for a matrix of shape \(24, 24\), expected \(40, 40\)"),
    "tied table": (
        "llama tied",
        {"target_modules": ["embed_tokens"]},
        r"model\.embed_tokens: its matrix is the output head too",
    ),
    "tied table of GPT-2": ("gpt2", {"target_modules": ["wte"]}, "wte: its matrix is the output"),
    "shared table": ("bart", {"target_modules": ["shared"]}, "shared: its matrix is the output"),
    "positions": (
        "gpt2",
        {"target_modules": ["wte", "wpe"]},
        r"wpe: the model has no embedding layer that is this module; .*wte: its matrix",
    ),
    "lora_bias": (
        "llama",
        {"lora_bias": True, "bias": "none"},
        r"q_proj\.bias: the layer has no bias in Keras for lora_bias",
    ),
    "head": ("llama", {"target_modules": ["lm_head"]}, "lm_head: the model has no kernel"),
    "router": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        r"mlp\.gate: the parameters \['weight'\] are no stacked experts",
    ),
}


@pytest.mark.parametrize(
    ("name", "options", "message"), REFUSED.values(), ids=[str(case) for case in REFUSED]
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    base: Path, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    backbone = keras_model(base)
    if "for a matrix" in message:
        backbone = keras_hub.models.QwenBackbone(61, 2, 5, 1, 40, 37)
    wrapped(base, **({"target_modules": ["q_proj"]} | options)).save_pretrained(tmp_path / "peft")
    before = state(backbone)
    with pytest.raises(kl.AdapterFileError, match=message):
        kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before


@pytest.mark.parametrize("name", ["llama"])
def test_all_that_does_not_fit_is_listed(base: Path, tmp_path: Path) -> None:
    wrapped(base, target_modules=["o_proj", "down_proj"]).save_pretrained(tmp_path / "peft")
    other = keras_hub.models.BertBackbone(61, 1, 3, 24, 37)
    keys = [f"layers.{i}.{m}" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.o_proj")]
    with pytest.raises(kl.AdapterFileError, match=".*".join(keys)):
        kl.load_peft_adapter(other, tmp_path / "peft")


@pytest.mark.parametrize("name", ["llama"])
def test_a_name_that_is_taken_and_a_directory_that_is_no_adapter(
    base: Path, tmp_path: Path
) -> None:
    wrapped(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "peft")
    backbone = keras_model(base)
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    with pytest.raises(ValueError, match="name='default', which the model has"):
        kl.load_peft_adapter(backbone, tmp_path / "peft")
    with pytest.raises(kl.AdapterFileError, match="adapter_config.json"):
        kl.load_peft_adapter(backbone, tmp_path / "nothing", "other")
    kl.save_peft_adapter(backbone, tmp_path / "back")
    with pytest.raises(kl.AdapterFileError, match="overwrite=True"):
        kl.save_peft_adapter(backbone, tmp_path / "back")


def test_a_model_without_a_converter_is_refused(tmp_path: Path) -> None:
    model = kl.apply_lora(
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(5), keras.layers.Dense(2)]),
        kl.LoRAConfig(rank=2),
    )
    with pytest.raises(ValueError, match="a KerasHub backbone"):
        kl.save_peft_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["llama"])
def test_without_transformers_the_prefix_of_a_task_is_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = keras_hub.models.Llama3CausalLM(keras_model(base), preprocessor=None)
    kl.apply_lora(task, kl.LoRAConfig(targets=["query"]))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'keras-lora\[peft\]'"):
        kl.save_peft_adapter(task, tmp_path)
    kl.save_peft_adapter(task, tmp_path, prefix="model.")
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors(tmp_path))
