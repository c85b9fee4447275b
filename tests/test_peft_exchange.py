"""Adapters between Keras and PEFT: real `peft` and `transformers` on torch, tiny random models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from hub_models import HUB_MODELS, VOCAB
from models import randomize_adapters
from safetensors.numpy import load_file

import keras_lora as kl

# Of transformers and PEFT about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:fan_in_fan_out")
TOKENS = np.random.default_rng(2).integers(3, VOCAB, (2, 7))
TOLERANCE = 1e-4
# |Keras - transformers| of the bases themselves, without any adapter, where it is above that.
# KerasHub computes RoBERTa's GELU by its approximation.
BASE_DIFFERENCE = {"mistral": 5e-4, "roberta": 2e-2}
# What the sizes of tiny models leave at a default that KerasHub's converters do not expect.
CONFIG_EDITS = {name: {"query_pre_attn_scalar": 8} for name in ("gemma2", "gemma3_text")}


def _text(backbone: keras.Model) -> Any:
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    names = {i.name for i in backbone.inputs}
    if "segment_ids" in names:
        inputs["segment_ids"] = np.zeros_like(TOKENS)
    outputs = backbone({k: v for k, v in inputs.items() if k in names})
    return outputs["sequence_output"] if isinstance(outputs, dict) else outputs


def _seq2seq(backbone: keras.Model) -> Any:
    ones = np.ones_like(TOKENS)
    inputs = {"encoder_token_ids": TOKENS, "encoder_padding_mask": ones}
    inputs |= {"decoder_token_ids": TOKENS[:, ::-1].copy(), "decoder_padding_mask": ones}
    return backbone(inputs)["decoder_sequence_output"]


def _hub_text(model: Any) -> Any:
    return model.base_model(torch.tensor(TOKENS)).last_hidden_state


def _hub_seq2seq(model: Any) -> Any:
    decoder = torch.tensor(TOKENS[:, ::-1].copy())
    return model.base_model(torch.tensor(TOKENS), decoder_input_ids=decoder).last_hidden_state


@dataclass(frozen=True)
class Case:
    """How the two models of an architecture are run, and the modules that an adapter gets."""

    attention: str
    mlp: str
    keras: Callable[[keras.Model], Any] = _text
    hub: Callable[[Any], Any] = _hub_text

    def targets(self, which: str) -> str:
        parts = {"attention": self.attention, "mlp": self.mlp}
        return rf".*\.({parts.get(which) or '|'.join(parts.values())})"


_LLAMA = Case("q_proj|k_proj|v_proj|o_proj", "gate_proj|up_proj|down_proj")
_BERT = Case("query|key|value|attention.output.dense", r"\d+.intermediate.dense|\d+.output.dense")
CASES: dict[str, Case] = {
    **dict.fromkeys(["llama", "llama tied", "gemma", "gemma2", "gemma3_text", "mistral"], _LLAMA),
    **dict.fromkeys(["qwen2", "qwen3", "smollm3"], _LLAMA),
    **dict.fromkeys(["mixtral", "qwen3_moe"], Case(_LLAMA.attention, "")),
    "qwen2_moe": Case(_LLAMA.attention, r"shared_expert\.(gate_proj|up_proj|down_proj)"),
    "gpt2": Case("attn.c_attn|attn.c_proj", "mlp.c_fc|mlp.c_proj"),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta"], _BERT),
    "distilbert": Case("q_lin|k_lin|v_lin|out_lin", "lin1|lin2"),
    "albert": Case("query|key|value|dense", "ffn|ffn_output"),
    "bart": Case("q_proj|k_proj|v_proj|out_proj", "fc1|fc2", _seq2seq, _hub_seq2seq),
    "t5gemma": Case(_LLAMA.attention, _LLAMA.mlp, _seq2seq, _hub_seq2seq),
}
# The routers of experts are no `nn.Linear` in transformers 5.
ROUTERS = ["sparse_feedforward_gate_dense", "shared_expert_gate_dense"]
KERAS_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"exclude": ROUTERS[:1]} for name in ("mixtral", "qwen3_moe")},
    "qwen2_moe": {"exclude": ROUTERS},
}
every_architecture = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def base(name: str, tmp_path: Path) -> Path:
    """The directory of a tiny model."""
    directory = tmp_path / "base"
    HUB_MODELS[name](directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIG_EDITS.get(name, {})))
    return directory


def hub_model(base: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    config._experts_implementation = (
        "eager"  # the others want widths that are multiples of 16 bytes
    )
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(base, config=config).eval()


def keras_model(base: Path) -> keras.Model:
    return keras_hub.models.Backbone.from_preset(str(base), dtype="float32")


def randomized(model: Any) -> Any:
    """A PEFT model whose adapters are not at zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def difference(name: str, backbone: keras.Model, model: Any) -> float:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        theirs = CASES[name].hub(inner).numpy()
    ours = keras.ops.convert_to_numpy(CASES[name].keras(backbone))
    return float(np.abs(ours - theirs).max())


def assert_agree(name: str, backbone: keras.Model, model: Any) -> None:
    assert difference(name, backbone, model) <= BASE_DIFFERENCE.get(name, TOLERANCE)


def tensors(directory: Path) -> dict[str, Any]:
    return load_file(directory / "adapter_model.safetensors")


def wrapped(base: Path, **options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 7} | options))
    return randomized(peft.get_peft_model(hub_model(base), config))


def options(name: str) -> list[dict[str, Any]]:
    case = CASES[name]
    return [
        {"target_modules": case.targets("both"), "rank_pattern": {r".*\b0\b.*": 5}},
        {"target_modules": case.targets("attention"), "use_rslora": True},
    ]


@every_architecture
@pytest.mark.parametrize("index", [0, 1], ids=["ranks", "rslora"])
def test_an_adapter_of_peft_computes_the_same_in_keras_and_comes_back_bit_for_bit(
    name: str, index: int, base: Path, tmp_path: Path
) -> None:
    theirs = wrapped(base, **options(name)[index])
    theirs.save_pretrained(tmp_path / "peft")
    backbone = keras_model(base)
    assert difference(name, backbone, theirs) > 3 * BASE_DIFFERENCE.get(name, TOLERANCE)
    kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert_agree(name, backbone, theirs)

    prefix = theirs.base_model.model.base_model_prefix + "."
    kl.save_peft_adapter(backbone, tmp_path / "back", prefix=prefix)
    back, expected = tensors(tmp_path / "back"), tensors(tmp_path / "peft")
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(back[key], value, strict=True)
    again = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "back").eval()
    assert_agree(name, backbone, again)


@every_architecture
def test_an_adapter_of_keras_computes_the_same_in_peft(
    name: str, base: Path, tmp_path: Path
) -> None:
    backbone = keras_model(base)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=3, alpha=7, **KERAS_OPTIONS.get(name, {})))
    randomize_adapters(backbone)
    model = hub_model(base)
    kl.save_peft_adapter(backbone, tmp_path / "keras", prefix=model.base_model_prefix + ".")
    with warnings.catch_warnings():
        # PEFT warns of keys that it does not take.
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
