"""What KerasHub's classes of attention call their query, key, value and output projections."""

from __future__ import annotations

from collections.abc import Mapping

QUERY_KEY_VALUE_OUTPUT = ("query_dense", "key_dense", "value_dense", "output_dense")
PRIVATE = tuple(f"_{name}" for name in QUERY_KEY_VALUE_OUTPUT)
SHORT = ("q_dense", "k_dense", "v_dense", "o_dense")
PROJ = ("q_proj", "k_proj", "v_proj", "o_proj")
LONG_PROJ = ("query_proj", "key_proj", "value_proj", "out_proj")
PROJECTORS = ("query_projector", "key_projector", "value_projector", "output_projector")

# The attributes by the name of the class. A class that is not here has none of these projections.
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        [
            "BloomAttention",
            "CachedMistralAttention",
            "CachedMultiHeadAttention",
            "DisentangledSelfAttention",
            "LlamaAttention",
            "MoonshineMultiHeadAttention",
            "MultiHeadAttention",
            "Qwen3Attention",
            "Qwen3MoeAttention",
            "Qwen3_5Attention",
            "QwenAttention",
            "TwoStreamRelativeAttention",
            "WhisperCachedMultiHeadAttention",
        ],
        PRIVATE,
    ),
    **dict.fromkeys(
        [
            "CachedGemma3Attention",
            "CachedGemmaAttention",
            "CachedMixtralAttention",
            "DINOV3Attention",
            "FalconAttention",
            "Gemma4TextAttention",
            "GptOssAttention",
            "Phi3Attention",
            "T5Gemma2Attention",
            "T5Gemma2MergedAttention",
            "T5GemmaAttention",
            "VideoPrismAttention",
        ],
        QUERY_KEY_VALUE_OUTPUT,
    ),
    **dict.fromkeys(["EsmSelfAttention", "RoformerAttention"], SHORT),
    **dict.fromkeys(
        ["Gemma3nTextAttention", "SAM3Attention", "SAM3RoPEAttention", "SmolLM3Attention"], PROJ
    ),
    **dict.fromkeys(
        [
            "Gemma3VisionAttention",
            "MultiHeadAttentionWithDownsampling",
            "PaliGemmaVitAttention",
        ],
        LONG_PROJ,
    ),
    "DFineMultiheadAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "DismantledBlock": (
        *("attention_qkv", "attention_proj"),
        *("attention_qkv2", "attention_proj2"),
    ),
    "GPTNeoXAttention": ("_qkv_dense", "_output_dense"),
    "Gemma3nAudioAttention": ("q_proj", "k_proj", "v_proj"),
    "Gemma3nAudioConformerAttention": ("post",),
    "Gemma4AudioAttention": ("q_proj", "k_proj", "v_proj"),
    "Gemma4AudioConformerAttention": ("out_proj",),
    "Gemma4VisionAttention": QUERY_KEY_VALUE_OUTPUT,
    "MultiHeadAttentionWithRelativePE": ("qkv", "projection"),
    # Linear attention: queries, keys and values by one projection, beside those to its gates.
    "Qwen3_5GatedDeltaNet": ("in_proj_qkv", "out_proj"),
    "QwenMoeAttention": ("query_dense", "key_dense", "value_dense", "_output_dense"),
    # Linear attention too: the receptance takes the part of the query.
    "RWKV7TimeMix": ("receptance", "key", "value", "output_layer"),
    "SegFormerMultiheadAttention": ("q", "k", "v", "proj"),
    "SelfAttention": ("qkv", "proj"),
    # Each projects to, or from, attention and the feed-forward part at once.
    "SingleStreamBlock": ("linear1", "linear2"),
    "T5MultiHeadAttention": PROJECTORS,
    "WindowAttention": ("qkv", "proj"),
}
