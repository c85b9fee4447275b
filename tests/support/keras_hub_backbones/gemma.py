"""Tiny Gemmas that take several modalities."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras_hub import models

from support.keras_hub_backbones import sizes
from support.keras_hub_backbones.inputs import (
    BATCH,
    Factory,
    Inputs,
    floats,
    ids,
    images,
    mask,
    rows,
    tokens,
)


def gemma3() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        output_dim=16,
    )
    model = models.Gemma3Backbone(
        vocabulary_size=sizes.VOCAB,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=28,
        head_dim=6,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=5,
        vision_encoder=vision_encoder,
    )
    return model, {
        **tokens(10),
        "images": floats(1, 16, 16, 3),
        "vision_mask": rows([0, 0, 1, 1, 1, 1, 0, 0, 0, 0]),
        "vision_indices": rows([2, 3, 4, 5]),
    }


def gemma3n_vision() -> keras.Model:
    return models.MobileNetV5Backbone(
        stackwise_block_types=[["er"]],
        stackwise_num_blocks=[1],
        stackwise_num_filters=[[8]],
        stackwise_strides=[[1]],
        stackwise_act_layers=[["relu"]],
        stackwise_exp_ratios=[[1.0]],
        stackwise_se_ratios=[[0.0]],
        stackwise_dw_kernel_sizes=[[0]],
        stackwise_dw_start_kernel_sizes=[[0]],
        stackwise_dw_end_kernel_sizes=[[0]],
        stackwise_exp_kernel_sizes=[[3]],
        stackwise_pw_kernel_sizes=[[1]],
        stackwise_num_heads=[[0]],
        stackwise_key_dims=[[0]],
        stackwise_value_dims=[[0]],
        stackwise_kv_strides=[[0]],
        stackwise_use_cpe=[[False]],
        num_features=4,
        image_shape=(8, 8, 3),
        use_msfa=False,
    )


def gemma3n_audio_config() -> dict[str, Any]:
    return {
        "hidden_size": 8,
        "input_feat_size": 12,
        "sscp_conv_channel_size": [2, 4],
        "sscp_conv_kernel_size": [(1, 1), (1, 1)],
        "sscp_conv_stride_size": [(2, 2), (2, 2)],
        "sscp_conv_group_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1.0,
        "residual_weight": 0.5,
        "num_attention_heads": 2,
        "attention_chunk_size": 2,
        "num_attention_context_right": 1,
        "num_attention_context_left": 1,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 3,
        "reduction_factor": 1,
    }


def gemma3n() -> tuple[keras.Model, Inputs]:
    vision_encoder = gemma3n_vision()
    image_token, audio_token = sizes.VOCAB - 2, sizes.VOCAB - 1
    audio_encoder_config = gemma3n_audio_config()
    model = models.Gemma3nBackbone(
        text_vocab_size=sizes.VOCAB,
        text_hidden_size=16,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=[28, 28],
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        rope_theta=10_000.0,
        max_position_embeddings=16,
        vocab_size_per_layer_input=sizes.VOCAB,
        hidden_size_per_layer_input=5,
        altup_num_inputs=2,
        laurel_rank=3,
        vision_encoder_config=vision_encoder.get_config(),
        vision_hidden_size=8,
        image_token_id=image_token,
        audio_encoder_config=audio_encoder_config,
        audio_hidden_size=8,
        audio_token_id=audio_token,
    )
    token_ids = ids()
    token_ids[:, 1:3] = image_token
    token_ids[:, 3:5] = audio_token
    return model, {
        "token_ids": token_ids,
        "padding_mask": mask(sizes.LENGTH, "bool"),
        "images": floats(1, 8, 8, 3),
        "input_features": floats(1, 8, 12),
        "input_features_mask": np.zeros((BATCH, 1, 8), dtype="bool"),
    }


def gemma4_audio() -> keras.Model:
    return models.Gemma4AudioEncoder(
        input_feat_size=12,
        hidden_size=8,
        num_heads=2,
        num_layers=1,
        chunk_size=4,
        context_left=5,
        context_right=0,
        sscp_conv_channels=(4, 2),
        sscp_kernel_sizes=((3, 3), (3, 3)),
        sscp_stride_sizes=((2, 2), (2, 2)),
        output_proj_dims=10,
        output_dim=16,
    )


def gemma4_vision() -> keras.Model:
    return models.Gemma4VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=1,
        num_heads=3,
        head_dim=4,
        num_key_value_heads=3,
        hidden_dim=12,
        intermediate_dim=20,
        output_dim=16,
    )


def gemma4() -> tuple[keras.Model, Inputs]:
    vision_encoder = gemma4_vision()
    audio_encoder = gemma4_audio()
    model = models.Gemma4Backbone(
        vocabulary_size=sizes.VOCAB,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=28,
        head_dim=6,
        sliding_window_size=5,
        sliding_window_pattern=2,
        vision_encoder=vision_encoder,
        audio_encoder=audio_encoder,
        num_audio_tokens_per_clip=4,
    )
    patch_positions = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(16, 2)
    return model, {
        **tokens(14),
        "position_ids": rows(list(range(14))),
        "pixel_values": floats(1, 16, 48),
        "pixel_position_ids": np.tile(patch_positions, (BATCH, 1, 1, 1)).astype("int32"),
        "vision_mask": rows([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        "vision_indices": rows([2, 3, 4, 5]),
        "audio_mel": floats(1, 16, 12),
        "audio_mel_mask": np.ones((BATCH, 1, 16), dtype="int32"),
        "audio_mask": rows([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]),
        "audio_indices": rows([7, 8, 9, 10]),
    }


def pali_gemma() -> tuple[keras.Model, Inputs]:
    model = models.PaliGemmaBackbone(
        vocabulary_size=sizes.VOCAB,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=56,
        head_dim=6,
        vit_patch_size=8,
        vit_num_layers=2,
        vit_num_heads=2,
        vit_hidden_dim=12,
        vit_intermediate_dim=20,
    )
    return model, {
        **tokens(),
        "images": images(16),
        "response_mask": rows([0, 0, 0, 0, 1, 1, 1]),
    }


GEMMAS: dict[str, Factory] = {
    "Gemma3Backbone": gemma3,
    "Gemma3nBackbone": gemma3n,
    "Gemma4Backbone": gemma4,
    "PaliGemmaBackbone": pali_gemma,
}
