"""Tiny models of `transformers` with adapters of PEFT, and the same models in Keras."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
from keras import ops
from safetensors.numpy import load_file

from support.hugging_face_models import HUGGING_FACE_MODELS, VOCAB

TOKENS = np.random.default_rng(2).integers(3, VOCAB, (2, 7))
IMAGES = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype("float32")
# Warnings of transformers and PEFT about each other.
peft_warnings = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:fan_in_fan_out",
    "ignore:Setting `save_embedding_layers`",
    "ignore:`lora_bias=True` was passed",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Adapter 'default'.*invalid shape",
    # It applies to parameters, but PEFT looks for modules alone.
    "ignore:The following (rank|alpha)_pattern keys did not match",
)

TOLERANCE = 1e-4
# |Keras - transformers| of the bases, without any adapter, where it is above `TOLERANCE`.
# KerasHub approximates RoBERTa's GELU by tanh.
BASE_DIFFERENCE = {"mistral": 5e-4, "roberta": 2e-2}
# Fields whose defaults do not fit the sizes of tiny models in KerasHub's converters.
CONFIG_EDITS = {name: {"query_pre_attn_scalar": 8} for name in ("gemma2", "gemma3_text")}


def _text(backbone: keras.Model) -> Any:
    inputs = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
    inputs["position_ids"] = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    names = {i.name for i in backbone.inputs}
    if "segment_ids" in names:
        inputs["segment_ids"] = np.zeros_like(TOKENS)
    outputs = backbone({k: ops.convert_to_tensor(v) for k, v in inputs.items() if k in names})
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


def _image(backbone: keras.Model) -> Any:
    dictionary = isinstance(backbone.input, dict)
    return backbone({"images": IMAGES} if dictionary else IMAGES)


def _hub_image(model: Any) -> Any:
    return model.base_model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).last_hidden_state


@dataclass(frozen=True)
class Case:
    """How the two models of an architecture are called, and the modules to adapt."""

    attention: str
    mlp: str
    keras: Callable[[keras.Model], Any] = _text
    hub: Callable[[Any], Any] = _hub_text

    def prefix(self, model: Any) -> str:
        """The `prefix` to save with; none for images, whose class has no head."""
        return "" if self.hub is _hub_image else f"{model.base_model_prefix}."

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
    **dict.fromkeys(
        ["vit", "deit", "dinov2"], Case(_LLAMA.attention, "fc1|fc2", _image, _hub_image)
    ),
}
# Mixtures whose experts alone are compared, with a projection of their attention.
MIXTURES = dict.fromkeys(["gemma4_text moe", "gpt_oss", "qwen3_5_moe"], Case("q_proj", ""))
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
    HUGGING_FACE_MODELS[name](directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | CONFIG_EDITS.get(name, {})))
    return directory


def hub_model(base: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    config._experts_implementation = (
        "eager"  # the other ways need widths that are multiples of 16 bytes
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
    case = (CASES | MIXTURES)[name]
    with torch.no_grad():
        theirs = case.hub(inner).numpy()
    ours = keras.ops.convert_to_numpy(case.keras(backbone))
    return float(np.abs(ours - theirs).max())


def assert_agree(name: str, backbone: keras.Model, model: Any) -> None:
    assert difference(name, backbone, model) <= BASE_DIFFERENCE.get(name, TOLERANCE)


def tensors(directory: Path) -> dict[str, Any]:
    return load_file(directory / "adapter_model.safetensors")


def check_back(
    name: str, model: keras.Model, base: Path, back: Path, expected: Mapping[str, Any]
) -> None:
    """An adapter that Keras has saved has these tensors bit for bit, and PEFT computes as Keras."""
    found = tensors(back)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, strict=True)
    again = peft.PeftModel.from_pretrained(hub_model(base), back).eval()
    assert_agree(name, model, again)


def wrapped(base: Path, **options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 7} | options))
    return randomized(peft.get_peft_model(hub_model(base), config))


def options(name: str) -> list[dict[str, Any]]:
    case = CASES[name]
    return [
        {"target_modules": case.targets("both"), "rank_pattern": {r".*\b0\b.*": 5}},
        {"target_modules": case.targets("attention"), "use_rslora": True},
        {"target_modules": case.targets("attention"), "use_dora": True},
    ]


def classifier(base: Path) -> keras.Model:
    return keras_hub.models.BertTextClassifier(keras_model(base), num_classes=2)
