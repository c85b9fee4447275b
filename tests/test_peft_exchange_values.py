"""Embeddings, heads, biases and the prefix of a task, between Keras and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import peft
import pytest
import torch
from support.models import randomize_adapters, state
from support.peft_models import (
    TOKENS,
    TOLERANCE,
    assert_agree,
    check_back,
    classifier,
    difference,
    hub_model,
    keras_model,
    peft_warnings,
    tensors,
    wrapped,
)

import keras_lora as kl

pytest_plugins = ["support.peft_models"]

pytestmark = peft_warnings


# The modules that are embeddings, in both directions: BERT's tied embedding matrix is a head in
# `MaskedLM` only; a decoder's must not be tied.
TABLES = {
    "bert": r".*\.(word_embeddings|token_type_embeddings|query)",
    "xlm-roberta": r".*\.word_embeddings",
    "albert": r".*\.(word_embeddings|token_type_embeddings)",
    "llama": r".*\.(embed_tokens|q_proj)",
    "qwen3": r".*\.embed_tokens",
    "t5gemma": r".*\.embed_tokens",
}


@pytest.mark.parametrize("name", TABLES)
def test_adapters_of_embeddings_both_ways(name: str, base: Path, tmp_path: Path) -> None:
    theirs = wrapped(base, target_modules=TABLES[name])
    theirs.save_pretrained(tmp_path / "peft")
    backbone = keras_model(base)
    assert difference(name, backbone, theirs) > 10 * TOLERANCE
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert_agree(name, backbone, theirs)
    kl.save_peft_adapter(backbone, tmp_path / "back")  # under the prefix that it came with
    expected = tensors(tmp_path / "peft")
    # Beside adapters of `embed_tokens` PEFT saves the base's embedding matrix and head.
    expected = {key: value for key, value in expected.items() if "lora_" in key}
    assert any("lora_embedding_A" in key for key in expected)
    check_back(name, backbone, base, tmp_path / "back", expected)


@pytest.mark.parametrize("name", ["llama"])
def test_tables_that_are_saved_along_must_be_those_of_the_base(base: Path, tmp_path: Path) -> None:
    wrapped(base, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "peft")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors(tmp_path / "peft")
    backbone = keras_model(base)
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    kl.load_peft_adapter(backbone, tmp_path / "peft", "again")
    assert {v.name for v in backbone.trainable_variables} == {"lora_a", "lora_b"}
    kl.unload_lora(backbone)
    table = backbone.token_embedding.embeddings
    table.assign(1.1 * np.array(table))
    before = state(backbone)
    message = r"model\.embed_tokens\.weight: the adapter was trained with other values of this"
    with pytest.raises(kl.AdapterFileError, match=message):
        kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before


def assert_logits_agree(task: keras.Model, model: Any) -> None:
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    ours = task.predict(inputs | {"segment_ids": np.zeros_like(TOKENS)}, verbose=0)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


HEADS = {"logits": "classifier"}


@pytest.mark.parametrize("name", ["bert"])
def test_heads_and_biases_go_with_an_adapter_both_ways(base: Path, tmp_path: Path) -> None:
    task = classifier(base)
    config = kl.LoRAConfig(rank=3, targets="attention", layers_to_save=["logits"], bias="lora_only")
    kl.apply_lora(task, config)
    rng = np.random.default_rng(1)
    for variable in task.trainable_variables:
        variable.assign(rng.normal(scale=0.3, size=variable.shape))
    with pytest.raises(ValueError, match=r"logits/kernel: .*; logits/bias: .*heads=\{"):
        kl.save_peft_adapter(task, tmp_path / "keras")
    kl.save_peft_adapter(task, tmp_path / "keras", heads=HEADS, base_model_name="tiny/bert")
    written = json.loads((tmp_path / "keras" / "adapter_config.json").read_text())
    assert written["bias"] == "lora_only"
    assert written["modules_to_save"] == ["classifier"]
    assert written["task_type"] == "SEQ_CLS"
    assert written["base_model_name_or_path"] == "tiny/bert"
    theirs = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "keras").eval()
    assert_logits_agree(task, theirs)

    options = {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"}
    other = wrapped(base, task_type="SEQ_CLS", **options)
    other.save_pretrained(tmp_path / "peft")
    kl.load_peft_adapter(task, tmp_path / "peft", "other", heads=HEADS)
    assert_logits_agree(task, theirs)
    kl.set_adapter(task, "other")
    assert_logits_agree(task, other)
    kl.set_adapter(task, "default")
    assert_logits_agree(task, theirs)


@pytest.mark.parametrize(
    ("name", "modules", "bias"),
    [
        ("bert", ["query", "output.dense"], "none"),
        ("bert", ["value"], "lora_only"),
        ("gpt2", ["attn.c_attn", "c_fc"], "none"),
    ],
)
def test_a_bias_of_b_becomes_a_trained_bias(
    name: str, modules: list[str], bias: str, base: Path, tmp_path: Path
) -> None:
    theirs = wrapped(base, target_modules=modules, lora_bias=True, bias=bias)
    theirs.save_pretrained(tmp_path / "peft")
    assert any(key.endswith("lora_B.bias") for key in tensors(tmp_path / "peft"))
    backbone = keras_model(base)
    before = state(backbone)
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert {v.name for v in backbone.trainable_variables} == {"lora_a", "lora_b", "bias"}
    assert_agree(name, backbone, theirs)
    kl.load_peft_adapter(backbone, tmp_path / "peft", "again")  # beside the first one
    kl.set_adapter(backbone, "again")
    assert_agree(name, backbone, theirs)
    kl.save_peft_adapter(backbone, tmp_path / "back", "again")
    back = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "back").eval()
    assert_agree(name, backbone, back)
    kl.unload_lora(backbone)
    assert state(backbone) == before


@pytest.mark.parametrize("name", ["gpt2"])
def test_the_prefix_of_a_task_comes_from_transformers(base: Path, tmp_path: Path) -> None:
    task = keras_hub.models.GPT2CausalLM(keras_model(base), preprocessor=None)
    kl.apply_lora(task, kl.LoRAConfig(rank=2, targets=["query", "value"]))
    randomize_adapters(task)
    kl.save_peft_adapter(task, tmp_path / "keras")
    config = json.loads((tmp_path / "keras" / "adapter_config.json").read_text())
    expected = {"r": 4, "target_modules": ["attn.c_attn"], "task_type": "CAUSAL_LM"}
    assert {field: config[field] for field in expected} == expected
    assert config["fan_in_fan_out"] is True
    theirs = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "keras").eval()
    assert_agree("gpt2", task.backbone, theirs)
