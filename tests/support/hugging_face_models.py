"""Tiny random models of Hugging Face's transformers, for all that KerasHub has converters for.

`HUGGING_FACE_MODELS` maps a name to a function that saves a model in a directory, `config.json` and
`model.safetensors`, for `keras_hub.models.Backbone.from_preset(directory)`. The classes have a
head where the converters expect the prefix of its keys. Sizes differ wherever the architecture
lets them, so that a transposed matrix has the wrong shape; but a query of three heads of eight is
square.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

Save = Callable[[Path], None]

HIDDEN, INTERMEDIATE, VOCAB = 24, 37, 61

DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}
IMAGES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 11}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 19,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 19,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
}


def _saved(model: str, config: str, **settings: Any) -> Save:
    """A function that writes a random model of these classes of transformers."""

    def save(directory: Path) -> None:
        made = getattr(transformers, config)(**settings)
        _save(getattr(transformers, model), made, directory)

    return save


def _save(model_class: Any, config: Any, directory: Path) -> None:
    torch.manual_seed(3)
    model = model_class(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide a mix-up
            parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)


def _as_on_the_hub(
    save: Save, config: Mapping[str, Any] | None = None, keys: Mapping[str, str] | None = None
) -> Save:
    """Edit the files of transformers 5 to be like those on the Hugging Face Hub.

    `config` is added to `config.json`; `keys` maps endings of keys to the endings on the Hub.
    """

    def edited(directory: Path) -> None:
        save(directory)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config or {})))
        path = directory / "model.safetensors"
        tensors = load_file(path)
        for key in list(tensors):
            for ending, new in (keys or {}).items():
                if key.endswith(ending):
                    tensors[key.removesuffix(ending) + new] = tensors.pop(key)
        save_file(tensors, path, {"format": "pt"})

    return edited


def _t5gemma(directory: Path) -> None:
    sizes = {**DECODER, "layer_types": ["sliding_attention", "full_attention"]}
    encoder = T5GemmaModuleConfig(**sizes)
    decoder = T5GemmaModuleConfig(
        **sizes | {"hidden_size": 32, "intermediate_size": 41, "num_attention_heads": 4}
    )
    config = transformers.T5GemmaConfig(
        encoder=encoder, decoder=decoder, vocab_size=VOCAB, tie_word_embeddings=False
    )
    _save(transformers.T5GemmaForConditionalGeneration, config, directory)


_QWEN3_MOE = _saved("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **DECODER, **EXPERTS, num_experts=3)
_ESM = _saved(
    "EsmForMaskedLM", "EsmConfig", **ENCODER, position_embedding_type="rotary", mask_token_id=3
)
_BART = _saved(
    "BartForConditionalGeneration",
    "BartConfig",
    vocab_size=VOCAB,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=3,
    decoder_attention_heads=3,
    encoder_ffn_dim=INTERMEDIATE,
    decoder_ffn_dim=INTERMEDIATE,
    max_position_embeddings=32,
)

HUGGING_FACE_MODELS: dict[str, Save] = {
    # Text decoders.
    "llama": _saved("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "llama tied": _saved(
        "LlamaForCausalLM", "LlamaConfig", **DECODER | {"tie_word_embeddings": True}
    ),
    "gemma": _saved("GemmaForCausalLM", "GemmaConfig", **DECODER),
    "gemma2": _saved("Gemma2ForCausalLM", "Gemma2Config", **DECODER | {"intermediate_size": 38}),
    "gemma3_text": _saved("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER),
    "gemma4_text": _saved(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        **DECODER,
        global_head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": _saved("MistralForCausalLM", "MistralConfig", **DECODER),
    "mixtral": _saved(
        "MixtralForCausalLM",
        "MixtralConfig",
        **DECODER,
        num_local_experts=3,
        num_experts_per_tok=2,
        output_router_logits=False,
    ),
    "qwen2": _saved("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
    "qwen2_moe": _saved(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **DECODER,
        **EXPERTS,
        num_experts=3,
        shared_expert_intermediate_size=13,
    ),
    "qwen3": _saved("Qwen3ForCausalLM", "Qwen3Config", **DECODER),
    "qwen3_moe": _as_on_the_hub(_QWEN3_MOE, {"num_experts": 3}),
    "qwen3_5": _saved(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        text_config=DECODER | LINEAR_ATTENTION,
        vision_config=QWEN_VISION,
    ),
    "smollm3": _saved("SmolLM3ForCausalLM", "SmolLM3Config", **DECODER, **TOKENS),
    "gpt2": _saved(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=3,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # Text encoders.
    "bert": _saved("BertForSequenceClassification", "BertConfig", **ENCODER),
    "bert without head": _saved("BertModel", "BertConfig", **ENCODER),
    "roberta": _saved("RobertaForMaskedLM", "RobertaConfig", **ENCODER),
    "xlm-roberta": _saved("XLMRobertaForMaskedLM", "XLMRobertaConfig", **ENCODER),
    "distilbert": _saved(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        vocab_size=VOCAB,
        dim=HIDDEN,
        hidden_dim=INTERMEDIATE,
        n_layers=2,
        n_heads=3,
        max_position_embeddings=32,
    ),
    "albert": _saved(
        "AlbertForSequenceClassification", "AlbertConfig", **ENCODER, embedding_size=17
    ),
    "esm": _as_on_the_hub(
        _ESM, keys={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    ),
    # Encoders with decoders.
    "bart": _as_on_the_hub(_BART, {"num_hidden_layers": 2}),
    "t5gemma": _t5gemma,
    # Images.
    "vit": _saved("ViTForImageClassification", "ViTConfig", **IMAGES, num_labels=5),
    "deit": _saved("DeiTForImageClassification", "DeiTConfig", **IMAGES, num_labels=5),
    "dinov2": _saved(
        "Dinov2Model",
        "Dinov2Config",
        **{k: v for k, v in IMAGES.items() if k != "intermediate_size"},
        mlp_ratio=2,
    ),
    "dinov3_vit": _saved("DINOv3ViTModel", "DINOv3ViTConfig", **IMAGES),
    "swin": _saved(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=32,
        patch_size=4,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=4,
        mlp_ratio=1.5,
        num_labels=5,
    ),
    # Several modalities.
    "metaclip_2": _saved(
        "MetaClip2Model",
        "MetaClip2Config",
        text_config=ENCODER | {"projection_dim": 13, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=VISION | {"projection_dim": 13},
        projection_dim=13,
    ),
    "qwen3_5_moe": _saved(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        text_config=DECODER
        | LINEAR_ATTENTION
        | EXPERTS
        | {"num_experts": 3, "shared_expert_intermediate_size": 13},
        vision_config=QWEN_VISION,
    ),
    "blip-2": _saved(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        num_query_tokens=4,
        vision_config=VISION,
        qformer_config=ENCODER
        | {"encoder_hidden_size": 16, "cross_attention_frequency": 2, "pad_token_id": 0},
        text_config={
            "model_type": "opt",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "ffn_dim": INTERMEDIATE,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": HIDDEN,
        },
        image_token_index=3,
    ),
}

# Models whose files from transformers 5 KerasHub 0.32 cannot read.
UNREADABLE: dict[str, Save] = {
    "qwen3_moe": _QWEN3_MOE,
    "esm": _ESM,
    "bart": _BART,
    "bert without pooler": _saved("BertForMaskedLM", "BertConfig", **ENCODER),
    "albert without pooler": _saved(
        "AlbertForMaskedLM", "AlbertConfig", **ENCODER, embedding_size=17
    ),
    "gpt_oss": _saved(
        "GptOssForCausalLM",
        "GptOssConfig",
        **DECODER,
        **TOKENS,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "qwen3_5_text": _saved(
        "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **DECODER, **LINEAR_ATTENTION
    ),
    "gemma3": _saved(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config=DECODER,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=3,
        boi_token_index=4,
        eoi_token_index=5,
    ),
    "paligemma": _saved(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        text_config=DECODER | {"model_type": "gemma"},
        vision_config=VISION | {"projection_dim": HIDDEN},
        image_token_index=3,
        projection_dim=HIDDEN,
    ),
    "t5gemma2": _saved(
        "T5Gemma2ForConditionalGeneration",
        "T5Gemma2Config",
        encoder={
            "text_config": DECODER,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
        decoder=DECODER,
        image_token_index=3,
    ),
}
# Fields of `config.json` that tell KerasHub's converter the language model.
NEEDS_CONFIG = {"blip-2": {"text_config": {"model_type": "opt"}}}
