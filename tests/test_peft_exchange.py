"""Adapters between Keras and PEFT: real `peft` and `transformers` on torch, tiny random models."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
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
from models import randomize_adapters, state
from safetensors.numpy import load_file

import keras_lora as kl
from keras_lora.exchange.converters import Block
from keras_lora.exchange.peft.factors import whole_magnitude

# Of transformers and PEFT about each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:fan_in_fan_out",
    "ignore:Setting `save_embedding_layers`",
    "ignore:`lora_bias=True` was passed",
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Adapter 'default'.*invalid shape",
)
TOKENS = np.random.default_rng(2).integers(3, VOCAB, (2, 7))
IMAGES = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype("float32")
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


def _image(backbone: keras.Model) -> Any:
    dictionary = isinstance(backbone.input, dict)
    return backbone({"images": IMAGES} if dictionary else IMAGES)


def _hub_image(model: Any) -> Any:
    return model.base_model(torch.tensor(IMAGES.transpose(0, 3, 1, 2))).last_hidden_state


@dataclass(frozen=True)
class Case:
    """How the two models of an architecture are run, and the modules that an adapter gets."""

    attention: str
    mlp: str
    keras: Callable[[keras.Model], Any] = _text
    hub: Callable[[Any], Any] = _hub_text

    def prefix(self, model: Any) -> str | None:
        """Given for text; for images transformers is asked, which renames the modules."""
        return None if self.hub is _hub_image else f"{model.base_model_prefix}."

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
        {"target_modules": case.targets("attention"), "use_dora": True},
    ]


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

    prefix = CASES[name].prefix(theirs.get_base_model())
    kl.save_peft_adapter(backbone, tmp_path / "back", prefix=prefix)
    back, expected = tensors(tmp_path / "back"), tensors(tmp_path / "peft")
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(back[key], value, strict=True)
    again = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "back").eval()
    assert_agree(name, backbone, again)


# The modules that are embeddings, in both directions: BERT's tied table is a head in `MaskedLM`
# only; that of a decoder must not be tied.
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
    prefix = CASES[name].prefix(theirs.get_base_model())
    kl.save_peft_adapter(backbone, tmp_path / "back", prefix=prefix)
    back, expected = tensors(tmp_path / "back"), tensors(tmp_path / "peft")
    # Beside adapters of `embed_tokens` PEFT saves the base's table and head.
    expected = {key: value for key, value in expected.items() if "lora_" in key}
    assert any("lora_embedding_A" in key for key in expected)
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(back[key], value, strict=True)
    again = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "back").eval()
    assert_agree(name, backbone, again)


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
    message = r"model\.embed_tokens\.weight: the adapter was trained with other values of it"
    with pytest.raises(kl.AdapterFileError, match=message):
        kl.load_peft_adapter(backbone, tmp_path / "peft")
    assert state(backbone) == before


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
    plain.put_adapter("default", plain.adapter_of(spec, pair))
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


def classifier(base: Path) -> keras.Model:
    return keras_hub.models.BertTextClassifier(keras_model(base), num_classes=2)


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
    "lora_bias": ("llama", {"lora_bias": True, "bias": "none"}, "a bias of B"),
    "head": ("llama", {"target_modules": ["lm_head"]}, "lm_head: the model has no kernel"),
    "experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters",
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


@pytest.mark.parametrize("name", ["llama"])
def test_one_scale_for_adapters_with_and_without_rslora(base: Path, tmp_path: Path) -> None:
    """PEFT has one `use_rslora` for all modules; `scale_adapter` acts in the files too."""
    backbone = keras_model(base)
    kl.apply_lora(backbone, kl.LoRAConfig(rank=3, alpha=7, targets="attention", use_rslora=True))
    randomize_adapters(backbone)
    kl.scale_adapter(backbone, "default", -0.5)
    kl.save_peft_adapter(backbone, tmp_path / "keras")
    theirs = peft.PeftModel.from_pretrained(hub_model(base), tmp_path / "keras").eval()
    assert_agree("llama", backbone, theirs)
