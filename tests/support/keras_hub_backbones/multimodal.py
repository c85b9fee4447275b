"""Tiny backbones of images and text, and of image generation."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
from keras_hub import models
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

from support.keras_hub_backbones import sizes
from support.keras_hub_backbones.inputs import (
    BATCH,
    Factory,
    Inputs,
    floats,
    ids,
    images,
    mask,
    tokens,
)


def blip2_language_model() -> keras.Model:
    return models.BLIP2CustomOPT(
        vocabulary_size=sizes.VOCAB,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=24,
        num_query_tokens=3,
        qformer_hidden_dim=16,
        max_sequence_length=12,
        dropout=0.0,
        language_projection=None,
    )


def blip2() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.BLIP2VisionEncoder(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )
    qformer = models.BLIP2QFormer(
        num_query_tokens=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=28,
        vision_dim=12,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    language_model = blip2_language_model()
    model = models.BLIP2Backbone(
        vision_encoder=vision_encoder, qformer=qformer, language_model=language_model
    )
    return model, {"images": images(16), **tokens()}


def clip() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.CLIPVisionEncoder(
        patch_size=8,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(16, 16, 3),
        name="vision_encoder",
    )
    text_encoder = models.CLIPTextEncoder(
        vocabulary_size=sizes.VOCAB,
        embedding_dim=12,
        hidden_dim=12,
        num_layers=2,
        num_heads=3,
        intermediate_dim=20,
        max_sequence_length=sizes.LENGTH,
        name="text_encoder",
    )
    model = models.CLIPBackbone(
        vision_encoder=vision_encoder, text_encoder=text_encoder, projection_dim=10
    )
    return model, {"images": images(16), "token_ids": ids()}


def flux() -> tuple[keras.Model, Inputs]:
    model = models.FluxBackbone(
        input_channels=8,
        hidden_size=32,
        mlp_ratio=1.5,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 8),
        text_shape=(5, 12),
        image_ids_shape=(4, 3),
        text_ids_shape=(5, 3),
        y_shape=(6,),
    )
    return model, {
        "image": floats(4, 8),
        "image_ids": floats(4, 3),
        "text": floats(5, 12),
        "text_ids": floats(5, 3),
        "y": floats(6),
        "timesteps": floats(),
        "guidance": floats(),
    }


def metaclip2() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.MetaCLIP2VisionEncoder(
        patch_size=8,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(16, 16, 3),
        name="vision_encoder",
    )
    text_encoder = models.MetaCLIP2TextEncoder(
        vocabulary_size=sizes.VOCAB,
        embedding_dim=12,
        hidden_dim=12,
        num_layers=2,
        num_heads=3,
        intermediate_dim=20,
        max_sequence_length=sizes.LENGTH,
        name="text_encoder",
    )
    model = models.MetaCLIP2Backbone(
        vision_encoder=vision_encoder, text_encoder=text_encoder, projection_dim=10
    )
    return model, {"images": images(16), "token_ids": ids()}


def parseq() -> tuple[keras.Model, Inputs]:
    image_encoder = models.ViTBackbone(
        image_shape=(16, 32, 3),
        patch_size=(4, 8),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=28,
        use_class_token=False,
        name="image_encoder",
    )
    model = models.PARSeqBackbone(
        image_encoder=image_encoder,
        vocabulary_size=sizes.VOCAB,
        max_label_length=sizes.LENGTH,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=20,
    )
    return model, {"images": floats(16, 32, 3), **tokens()}


def sam3_vision() -> keras.layers.Layer:
    return keras_hub.layers.SAM3VisionEncoder(
        image_shape=(28, 28, 3),
        patch_size=14,
        num_layers=2,
        hidden_dim=24,
        intermediate_dim=20,
        num_heads=2,
        fpn_hidden_dim=16,
        fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
        pretrain_image_shape=(42, 42, 3),
        window_size=2,
        global_attn_indexes=[1],
    )


def sam3() -> tuple[keras.Model, Inputs]:
    layers = keras_hub.layers
    model = models.SAM3PromptableConceptBackbone(
        vision_encoder=sam3_vision(),
        text_encoder=layers.SAM3TextEncoder(
            vocabulary_size=sizes.VOCAB,
            embedding_dim=12,
            hidden_dim=12,
            num_layers=1,
            num_heads=2,
            intermediate_dim=20,
        ),
        geometry_encoder=layers.SAM3GeometryEncoder(
            num_layers=1, hidden_dim=16, intermediate_dim=28, num_heads=2, roi_size=3
        ),
        detr_encoder=layers.SAM3DetrEncoder(
            num_layers=1, hidden_dim=16, intermediate_dim=28, num_heads=2
        ),
        detr_decoder=layers.SAM3DetrDecoder(
            image_shape=(28, 28, 3),
            patch_size=14,
            num_layers=1,
            hidden_dim=16,
            intermediate_dim=28,
            num_heads=2,
            num_queries=5,
        ),
        mask_decoder=layers.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=16, num_heads=2),
    )
    boxes = np.tile(np.array([0.5, 0.5, 0.25, 0.5, 1.0], dtype="float32"), (BATCH, 1, 1))
    return model, {
        "pixel_values": images(28),
        "token_ids": ids(32),
        "padding_mask": mask(32),
        "boxes": boxes,
        "box_labels": np.ones((BATCH, 1), dtype="int32"),
    }


def siglip() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.SigLIPVisionEncoder(
        patch_size=8,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(16, 16, 3),
        name="vision_encoder",
    )
    text_encoder = models.SigLIPTextEncoder(
        vocabulary_size=sizes.VOCAB,
        embedding_dim=12,
        hidden_dim=12,
        num_layers=2,
        num_heads=3,
        intermediate_dim=20,
        max_sequence_length=sizes.LENGTH,
        projection_dim=16,
        name="text_encoder",
    )
    model = models.SigLIPBackbone(vision_encoder=vision_encoder, text_encoder=text_encoder)
    return model, {"images": images(16), "token_ids": ids()}


def clip_text_encoder(name: str, hidden_dim: int) -> keras.Model:
    return models.CLIPTextEncoder(
        vocabulary_size=sizes.VOCAB,
        embedding_dim=hidden_dim,
        hidden_dim=hidden_dim,
        num_layers=2,
        num_heads=2,
        intermediate_dim=hidden_dim + 4,
        intermediate_output_index=-2,
        max_sequence_length=sizes.LENGTH,
        dtype="float32",
        name=name,
    )


def stable_diffusion3() -> tuple[keras.Model, Inputs]:
    vae = VAEBackbone(
        encoder_num_filters=[32, 32, 32, 32],
        encoder_num_blocks=[1, 1, 1, 1],
        decoder_num_filters=[32, 32, 32, 32],
        decoder_num_blocks=[1, 1, 1, 1],
        sampler_method="mode",
        name="vae",
    )

    model = models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=6,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=vae,
        clip_l=clip_text_encoder("clip_l", 12),
        clip_g=clip_text_encoder("clip_g", 20),
        image_shape=(32, 32, 3),
    )
    return model, {
        "images": images(32),
        "latents": floats(4, 4, 16),
        "clip_l_token_ids": ids(),
        "clip_l_negative_token_ids": ids(seed=1),
        "clip_g_token_ids": ids(),
        "clip_g_negative_token_ids": ids(seed=1),
        "num_steps": np.full((BATCH,), 2, dtype="int32"),
        "guidance_scale": np.full((BATCH,), 3.5, dtype="float32"),
    }


def video_prism() -> tuple[keras.Model, Inputs]:
    model = models.VideoPrismBackbone(
        num_frames=3,
        patch_size=8,
        hidden_dim=16,
        intermediate_dim=28,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        vocabulary_size=sizes.VOCAB,
        num_text_layers=1,
        attention_logit_soft_cap=50.0,
        image_shape=(16, 16, 3),
    )
    return model, {"pixel_values": floats(3, 16, 16, 3), **tokens()}


MULTIMODAL: dict[str, Factory] = {
    "BLIP2Backbone": blip2,
    "CLIPBackbone": clip,
    "FluxBackbone": flux,
    "MetaCLIP2Backbone": metaclip2,
    "PARSeqBackbone": parseq,
    "SAM3PromptableConceptBackbone": sam3,
    "SigLIPBackbone": siglip,
    "StableDiffusion3Backbone": stable_diffusion3,
    "VideoPrismBackbone": video_prism,
}
