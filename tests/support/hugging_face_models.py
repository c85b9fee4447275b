"""Tiny random models of Hugging Face's transformers, for all that KerasHub has converters for.

`HUGGING_FACE_MODELS` maps a name to a function that saves a model in a directory, `config.json` and
`model.safetensors`, for `keras_hub.models.Backbone.from_preset(directory)`. The classes have a
head where the converters expect the prefix of its keys. Sizes differ wherever the architecture
lets them, so that a transposed matrix has the wrong shape; but a query of three heads of eight is
square.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

from support.hugging_face_files import Save, as_on_the_hub, saved, with_packed_experts, write_model

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
GEMMA4: dict[str, Any] = {
    **DECODER,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}


def _t5gemma(directory: Path) -> None:
    sizes = {**DECODER, "layer_types": ["sliding_attention", "full_attention"]}
    encoder = T5GemmaModuleConfig(**sizes)
    decoder = T5GemmaModuleConfig(
        **sizes | {"hidden_size": 32, "intermediate_size": 41, "num_attention_heads": 4}
    )
    config = transformers.T5GemmaConfig(
        encoder=encoder, decoder=decoder, vocab_size=VOCAB, tie_word_embeddings=False
    )
    write_model(transformers.T5GemmaForConditionalGeneration, config, directory)


# Packed experts are blocks of 32.
_GPT_OSS = saved(
    "GptOssForCausalLM",
    "GptOssConfig",
    **DECODER | {"hidden_size": 32, "intermediate_size": 64},
    **TOKENS,
    num_local_experts=5,
    num_experts_per_tok=2,
)
_QWEN3_MOE = saved("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **DECODER, **EXPERTS, num_experts=3)
_ESM = saved(
    "EsmForMaskedLM", "EsmConfig", **ENCODER, position_embedding_type="rotary", mask_token_id=3
)
_BART = saved(
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
    "llama": saved("LlamaForCausalLM", "LlamaConfig", **DECODER),
    "llama tied": saved(
        "LlamaForCausalLM", "LlamaConfig", **DECODER | {"tie_word_embeddings": True}
    ),
    "gemma": saved("GemmaForCausalLM", "GemmaConfig", **DECODER),
    "gemma2": saved("Gemma2ForCausalLM", "Gemma2Config", **DECODER | {"intermediate_size": 38}),
    "gemma3_text": saved("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER),
    "gemma4_text": saved("Gemma4ForCausalLM", "Gemma4TextConfig", **GEMMA4),
    "gemma4_text moe": saved(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        **GEMMA4,
        enable_moe_block=True,
        num_experts=3,
        top_k_experts=2,
        moe_intermediate_size=11,
    ),
    "gpt_oss": with_packed_experts(_GPT_OSS),
    "mistral": saved("MistralForCausalLM", "MistralConfig", **DECODER),
    "mixtral": saved(
        "MixtralForCausalLM",
        "MixtralConfig",
        **DECODER,
        num_local_experts=3,
        num_experts_per_tok=2,
        output_router_logits=False,
    ),
    "qwen2": saved("Qwen2ForCausalLM", "Qwen2Config", **DECODER),
    "qwen2_moe": saved(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **DECODER,
        **EXPERTS,
        num_experts=3,
        shared_expert_intermediate_size=13,
    ),
    "qwen3": saved("Qwen3ForCausalLM", "Qwen3Config", **DECODER),
    "qwen3_moe": as_on_the_hub(_QWEN3_MOE, {"num_experts": 3}),
    "qwen3_5": saved(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        text_config=DECODER | LINEAR_ATTENTION,
        vision_config=QWEN_VISION,
    ),
    "smollm3": saved("SmolLM3ForCausalLM", "SmolLM3Config", **DECODER, **TOKENS),
    "gpt2": saved(
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
    "bert": saved("BertForSequenceClassification", "BertConfig", **ENCODER),
    "bert without head": saved("BertModel", "BertConfig", **ENCODER),
    "roberta": saved("RobertaForMaskedLM", "RobertaConfig", **ENCODER),
    "xlm-roberta": saved("XLMRobertaForMaskedLM", "XLMRobertaConfig", **ENCODER),
    "distilbert": saved(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        vocab_size=VOCAB,
        dim=HIDDEN,
        hidden_dim=INTERMEDIATE,
        n_layers=2,
        n_heads=3,
        max_position_embeddings=32,
    ),
    "albert": saved(
        "AlbertForSequenceClassification", "AlbertConfig", **ENCODER, embedding_size=17
    ),
    "esm": as_on_the_hub(
        _ESM, keys={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    ),
    # Encoders with decoders.
    "bart": as_on_the_hub(_BART, {"num_hidden_layers": 2}),
    "t5gemma": _t5gemma,
    # Images.
    "vit": saved("ViTForImageClassification", "ViTConfig", **IMAGES, num_labels=5),
    "deit": saved("DeiTForImageClassification", "DeiTConfig", **IMAGES, num_labels=5),
    "dinov2": saved(
        "Dinov2Model",
        "Dinov2Config",
        **{k: v for k, v in IMAGES.items() if k != "intermediate_size"},
        mlp_ratio=2,
    ),
    "dinov3_vit": saved("DINOv3ViTModel", "DINOv3ViTConfig", **IMAGES),
    "swin": saved(
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
    "metaclip_2": saved(
        "MetaClip2Model",
        "MetaClip2Config",
        text_config=ENCODER | {"projection_dim": 13, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=VISION | {"projection_dim": 13},
        projection_dim=13,
    ),
    "qwen3_5_moe": saved(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        text_config=DECODER
        | LINEAR_ATTENTION
        | EXPERTS
        | {"num_experts": 3, "shared_expert_intermediate_size": 13},
        vision_config=QWEN_VISION,
    ),
    "blip-2": saved(
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
    "bert without pooler": saved("BertForMaskedLM", "BertConfig", **ENCODER),
    "albert without pooler": saved(
        "AlbertForMaskedLM", "AlbertConfig", **ENCODER, embedding_size=17
    ),
    "gpt_oss": _GPT_OSS,
    "qwen3_5_text": saved("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **DECODER, **LINEAR_ATTENTION),
    "gemma3": saved(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config=DECODER,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=3,
        boi_token_index=4,
        eoi_token_index=5,
    ),
    "paligemma": saved(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        text_config=DECODER | {"model_type": "gemma"},
        vision_config=VISION | {"projection_dim": HIDDEN},
        image_token_index=3,
        projection_dim=HIDDEN,
    ),
    "t5gemma2": saved(
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
