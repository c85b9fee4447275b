"""`train_tokens` between Keras and the `trainable_token_indices` of the real PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import peft
import pytest
import torch
from support.models import randomize_adapters
from support.peft_models import (
    CASES,
    TOKENS,
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

pytest_plugins = ["support.peft_models"]

pytestmark = peft_warnings

IDS = [int(token) for token in TOKENS[0, [3, 0, 5]]]
EMBEDDING = {"llama": "embed_tokens", "llama tied": "embed_tokens", "bert": "word_embeddings"}


def with_rows(base: Path, name: str, indices: Any) -> Any:
    targets = CASES[name].targets("attention")
    model = wrapped(base, target_modules=targets, trainable_token_indices=indices)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "trainable_tokens_delta" in key:
                parameter.copy_(torch.randn_like(parameter))
    return model


def logits(backbone: keras.Model, name: str) -> np.ndarray:
    hidden = CASES[name].keras(backbone)
    return keras.ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))


@pytest.mark.parametrize("name", EMBEDDING)
def test_rows_of_peft_compute_the_same_in_keras_and_come_back(
    name: str, base: Path, tmp_path: Path
) -> None:
    given = IDS if name == "bert" else {EMBEDDING[name]: IDS}
    theirs = with_rows(base, name, given)
    theirs.save_pretrained(tmp_path / "peft")
    backbone = keras_model(base)
    assert difference(name, backbone, theirs) > 0.02
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert_agree(name, backbone, theirs)
    if name == "llama tied":
        with torch.no_grad():
            expected = theirs(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits(backbone, name), expected, atol=1e-4)

    kl.save_peft_adapter(backbone, tmp_path / "back")
    written = tensors(tmp_path / "peft")
    own = {k: v[np.argsort(IDS)] if "trainable_tokens" in k else v for k, v in written.items()}
    check_back(name, backbone, base, tmp_path / "back", own)


@pytest.mark.parametrize("name", ["llama tied"])
def test_rows_of_keras_compute_the_same_in_peft(name: str, base: Path, tmp_path: Path) -> None:
    backbone = keras_model(base)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=2, targets=["query"], train_tokens=IDS))
    randomize_adapters(backbone)
    kl.save_peft_adapter(backbone, tmp_path / "peft", prefix="model.")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": sorted(IDS)}
    theirs = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "peft").eval()
    assert_agree(name, backbone, theirs)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(backbone, name), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["bert"])
def test_a_and_b_beside_rows_are_refused_since_peft_has_one_of_both(
    name: str, base: Path, tmp_path: Path
) -> None:
    backbone = keras_model(base)
    targets = ["query", "token_embedding"]
    kl.apply_lora(backbone, kl.LoRAConfig(rank=2, targets=targets, train_tokens=IDS))
    with pytest.raises(ValueError, match="token_embedding: A and B beside rows"):
        kl.save_peft_adapter(backbone, tmp_path / name, prefix="bert.")


@pytest.mark.parametrize("name", ["bart"])
def test_rows_of_an_embedding_in_several_modules_are_refused(
    name: str, base: Path, tmp_path: Path
) -> None:
    with_rows(base, name, {"shared": IDS}).save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterFileError, match="shared: encoder and decoder share its matrix"):
        kl.load_peft_adapter(keras_model(base), tmp_path / "peft")


CHANGED: dict[str, tuple[Any, str]] = {
    "fewer": ([7, 2], r"trainable_tokens_delta: of shape \(3, 24\) for the tokens \[7, 2\]"),
    "twice": ([7, 2, 7], r"trainable_tokens_delta: .*different token ids"),
    "of another module": ({"embed": [7, 2, 9]}, r"of shape \(3, 24\) for the tokens \[\]"),
    "no such token": ([7, 2, 10**6], r"rows that a matrix of \(\d+, 24\) has not"),
    "none": (None, r"of shape \(3, 24\) for the tokens \[\]"),
}


@pytest.mark.parametrize("name", ["bert"])
def test_a_config_that_does_not_fit_the_rows_is_refused(
    name: str, base: Path, tmp_path: Path
) -> None:
    with_rows(base, name, IDS).save_pretrained(tmp_path / "peft")
    backbone, file = keras_model(base), tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    for indices, message in CHANGED.values():
        file.write_text(json.dumps(config | {"trainable_token_indices": indices}))
        with pytest.raises(AdapterFileError, match=message):
            kl.load_peft_adapter(backbone, tmp_path / "peft")
